"""Folders on any file system: pyarrow's own file systems first, fsspec's for everything else.

A path is made absolute once, where the user gave it; from then on a ``Folder`` travels, which every process reads the
same way. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs

from raydpp.errors import UserError

UNFINISHED = ".unfinished"
"""The ending of a file that is being written."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:::.*)?://")
_ARROW_SCHEMES = frozenset({"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"})
_QUERY = re.compile(r"\?[A-Za-z_]+=")  # the options of a file system, as opposed to a glob's question mark
_URI_CHARACTERS = "%/:?=&@!$'()*+,;~"
_SUBMITTED = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # what Ray sets for the entry point of a submitted job


@dataclass(frozen=True)
class Folder:
    """A folder on any file system; it need not exist.

    Attributes:
        url: Where it is, for people and for run.json: an absolute path, or a URL.
        system: The file system as seen from the folder: paths are names below it.
    """

    url: str
    system: pafs.SubTreeFileSystem = field(compare=False, repr=False)

    @classmethod
    def at(cls, url: str | os.PathLike[str]) -> Folder:
        """The folder at a path or URL. See ``resolve``."""
        system, path = resolve(os.fspath(url))
        return cls(absolute(os.fspath(url)), pafs.SubTreeFileSystem(path or "/", system))

    @classmethod
    def holding(cls, url: str) -> tuple[Folder, str]:
        """The folder that holds a file, and the file's name there."""
        system, path = resolve(url)
        parent, _, name = path.rstrip("/").rpartition("/")
        bare, options = _split_options(absolute(url))
        first, chained, rest = bare.partition("::")
        shown = (first.rstrip("/").rpartition("/")[0] or "/") + chained + rest + options
        return cls(shown, pafs.SubTreeFileSystem(parent or "/", system)), name

    def __str__(self) -> str:
        return self.url

    def below(self, name: str) -> Folder:
        """A folder in this folder."""
        return Folder(self.url_of(name), pafs.SubTreeFileSystem(self._base(name), self.system.base_fs))

    def url_of(self, name: str) -> str:
        """Where something in this folder is; the options of the folder's URL (``?region=...``) stay at the end."""
        bare, options = _split_options(self.url)
        first, chained, rest = bare.partition("::")
        below = quote(name) if _scheme(self.url) in _ARROW_SCHEMES else name
        return f"{first.rstrip('/')}/{below}" + chained + rest + options

    def names(self) -> list[str] | None:
        """The names directly below, sorted; None where there is no folder."""
        if self.system.get_file_info("").type != pafs.FileType.Directory:
            return None
        return sorted(info.base_name for info in self.system.get_file_info(pafs.FileSelector("")))

    def files(self, ending: str = "") -> list[str]:
        """The names of all files below, at any depth, that end so; sorted, and none where there is no folder."""
        found = self.system.get_file_info(pafs.FileSelector("", allow_not_found=True, recursive=True))
        return sorted(i.path for i in found if i.type == pafs.FileType.File and i.path.endswith(ending))

    def has(self, name: str) -> bool:
        """Whether there is a file of this name."""
        return bool(self.system.get_file_info(name).type == pafs.FileType.File)

    def read_text(self, name: str) -> str | None:
        """A file's text, or None where there is no such file."""
        if not self.has(name):
            return None
        with self.system.open_input_stream(name, compression=None) as stream:
            return bytes(stream.read()).decode()

    def write(self, name: str, write: Callable[[Any], Any]) -> None:
        """Write a file through ``write(stream)``; it gets its name only once it is complete, and on the disk."""
        self.system.base_fs.create_dir(self._base(name.rpartition("/")[0]), recursive=True)
        with self.system.open_output_stream(name + UNFINISHED) as stream:
            write(stream)
        if isinstance(self.system.base_fs, pafs.LocalFileSystem):  # or a crash of the machine may leave it empty
            with open(self._base(name + UNFINISHED), "rb") as written:
                os.fsync(written.fileno())
        self.system.move(name + UNFINISHED, name)

    def write_bytes(self, name: str, content: bytes) -> None:
        self.write(name, lambda stream: stream.write(content))

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Strict JSON: NaN and infinities are refused."""
        self.write_text(name, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_json_lines(self, name: str, values: Iterable[Any]) -> None:
        self.write_text(name, "".join(json.dumps(value, ensure_ascii=False) + "\n" for value in values))

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with everything in it; nothing where there is neither."""
        kind = self.system.get_file_info(name).type
        if kind == pafs.FileType.File:
            self.system.delete_file(name)
        elif kind == pafs.FileType.Directory:
            self.system.delete_dir(name)

    def clear(self) -> None:
        """Delete everything in it."""
        self.system.delete_dir_contents("", accept_root_dir=True)

    def _base(self, name: str) -> str:
        return (self.system.base_path.rstrip("/") + "/" + name if name else self.system.base_path) or "/"


def absolute(url: str) -> str:
    """A path or URL that means the same in every process: local paths become absolute, ``~`` is the home folder.

    Raises:
        UserError: A relative path in a submitted job, whose working folder is lost with the cluster.
    """
    scheme = _scheme(url)
    if scheme is None:
        if os.environ.get(_SUBMITTED) and is_relative(url):
            raise UserError(
                f"{url} is a relative path, and the working folder of a submitted job is lost with the cluster: give a"
                " URL such as s3://bucket/..., or the absolute path of storage that all nodes share"
            )
        return os.path.abspath(os.path.expanduser(url))
    if scheme == "file" and "::" not in url:
        return resolve(url)[1]
    return url.rstrip("/") if not _split_options(url)[1] else url


def is_relative(url: str) -> bool:
    """Whether a path depends on the process that reads it."""
    return _scheme(url) is None and not os.path.isabs(os.path.expanduser(url))


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
        return pafs.LocalFileSystem(), absolute(url)
    if scheme in _ARROW_SCHEMES and "::" not in url:
        uri = quote(scheme + url[len(scheme) :], safe=_URI_CHARACTERS)
        try:
            file_system, path = pafs.FileSystem.from_uri(uri)
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{url} cannot be opened: {error}") from error
        return file_system, path
    import fsspec

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


def split_glob(url: str) -> tuple[str, str] | None:
    """A glob's folder and the pattern below it: `s3://b/in/*.json?region=x` -> (`s3://b/in/?region=x`, `*.json`).

    None where there is nothing of a glob (`*`, `?`, `[`) in the URL.
    """
    bare, options = _split_options(url)
    magic = re.search(r"[*?\[]", bare)
    if magic is None:
        return None
    end = bare.rfind("/", 0, magic.start()) + 1
    return (bare[:end] or ".") + options, bare[end:]


def last_name(url: str) -> str:
    """The last name in a URL: `s3://bucket/runs/table/?region=x` -> `table`."""
    return _split_options(url)[0].rstrip("/").rpartition("/")[2]


def _split_options(url: str) -> tuple[str, str]:
    """`s3://b/k?region=x` -> (`s3://b/k`, `?region=x`); only pyarrow's URLs have options."""
    match = _QUERY.search(url) if _scheme(url) in _ARROW_SCHEMES else None
    return (url[: match.start()], url[match.start() :]) if match else (url, "")


def _scheme(url: str) -> str | None:
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else None
