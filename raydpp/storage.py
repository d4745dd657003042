"""Where a URL leads: pyarrow's own file systems first, fsspec's for everything else."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import quote

import fsspec
import pyarrow as pa
import pyarrow.fs as pafs

from raydpp.errors import UserError

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:::.*)?://")
_ARROW_SCHEMES = frozenset({"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"})
_QUERY = re.compile(r"\?[A-Za-z_]+=")  # the options of a file system, told apart from a glob's question mark
_URI_CHARACTERS = "%/:?=&@!$'()*+,;~"


def split_options(url: str) -> tuple[str, str]:
    """Splits the options of a file system off a URL: `s3://b/k?region=x` -> (`s3://b/k`, `?region=x`).

    Args:
        url: A URL or a local path; only pyarrow's URLs have options, all else comes back whole.
    """
    match = _QUERY.search(url) if _scheme(url) in _ARROW_SCHEMES else None
    return (url[: match.start()], url[match.start() :]) if match else (url, "")


def resolve(url: str) -> tuple[pafs.FileSystem, str]:
    """The file system a URL lives on, and its path there. Nothing has to exist at that path.

    Args:
        url: A local path (relative ones become absolute, `~` is the home folder), a URL of one of pyarrow's
            file systems (file, s3, gs, gcs, hdfs, viewfs, abfs, abfss; options as in
            `s3://bucket/key?region=eu-west-1&endpoint_override=localhost:9000`; percent signs in a key are
            written `%25`), or any URL that fsspec knows, chained ones among them.

    Returns:
        A pyarrow file system and the path to hand to its methods.

    Raises:
        UserError: The URL makes no sense, or no handler for it is installed.
        OSError: The file system cannot be reached.
    """
    scheme = _scheme(url)
    if scheme is None:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(url))
    if scheme in _ARROW_SCHEMES and "::" not in url:
        uri = quote(scheme + url[len(scheme) :], safe=_URI_CHARACTERS)
        try:
            file_system, path = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}") from error
        return file_system, path
    try:
        foreign, path = fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise UserError(f"{url} cannot be opened, the package for {scheme}:// is missing: {error}") from error
    except ValueError as error:
        known = ", ".join(sorted(_ARROW_SCHEMES))
        raise UserError(
            f"{url} cannot be opened: {error}. Give a local path, a URL that starts with one of {known}, "
            "or one whose fsspec package is installed."
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(foreign)), path


def child_url(folder_url: str, folder: str, path: str) -> str:
    """The URL of a path that a file system listed below a folder: the way back from `resolve`.

    Args:
        folder_url: What was given to `resolve` to find the folder.
        folder: The folder's path, as `resolve` returned it.
        path: A path in or below that folder, as the file system lists it.

    Returns:
        The plain absolute path for local files, otherwise the folder's URL and the rest of the path.
    """
    scheme = _scheme(folder_url)
    if scheme in (None, "file"):
        return path
    bare, options = split_options(folder_url)
    below = path.strip("/")[len(folder.strip("/")) :].strip("/")
    if scheme in _ARROW_SCHEMES:
        below = quote(below)
    return (bare.rstrip("/") + "/" + below if below else bare) + options


def _scheme(url: str) -> str | None:
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else None


def join(folder_url: str, *names: str) -> str:
    """The URL of a name below a folder; options of the folder's URL (``?region=...``) stay at the end."""
    bare, options = split_options(folder_url)
    return "/".join([bare.rstrip("/"), *names]) + options


def write_whole(url: str, write: Callable[[Any], None]) -> None:
    """Write a file through ``write(stream)`` such that it has its name only once it is complete."""
    system, path = resolve(url)
    system.create_dir(path.rsplit("/", 1)[0], recursive=True)
    unfinished = f"{path}.unfinished"
    with system.open_output_stream(unfinished) as stream:
        write(stream)
    system.move(unfinished, path)


def write_text(url: str, text: str) -> None:
    write_whole(url, lambda stream: stream.write(text.encode()))


def write_json(url: str, value: Any) -> None:
    """Strict JSON: NaN and infinities are refused."""
    write_text(url, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_json_lines(url: str, values: Iterable[Any]) -> None:
    write_text(url, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))


def read_text(url: str) -> str | None:
    """A file's text, or None where there is no such file."""
    system, path = resolve(url)
    if system.get_file_info(path).type != pafs.FileType.File:
        return None
    with system.open_input_stream(path) as stream:
        return bytes(stream.read()).decode()


def names_in(url: str) -> list[str] | None:
    """The names directly below a folder, sorted; None where there is no folder."""
    system, path = resolve(url)
    if system.get_file_info(path).type != pafs.FileType.Directory:
        return None
    return sorted(info.base_name for info in system.get_file_info(pafs.FileSelector(path)))
