"""Folders on any file system: pyarrow's own file systems first, fsspec's for everything else.

A path is made absolute once, where the user gave it; from then on a ``Folder`` travels, which every process reads the
same way. A file appears under its name only when it is complete: it is written as NAME.unfinished and then moved, which
an object store does by a copy, whole or not at all, and a deletion. Its final name cannot be written to directly:
pyarrow completes an upload when its stream is closed, as every exception closes it, and half an object would be there.
"""

from __future__ import annotations

import errno
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

_LASTING = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG}
"""What of a file system does not pass by itself."""

REFUSED = (
    r"AWS Error (?:ACCESS_DENIED|EXPIRED_TOKEN|INVALID_ACCESS_KEY_ID|INVALID_CLIENT_TOKEN_ID|INVALID_SIGNATURE"
    r"|MISSING_AUTHENTICATION_TOKEN|NO_SUCH_BUCKET|SIGNATURE_DOES_NOT_MATCH|UNRECOGNIZED_CLIENT"
    r"|UNKNOWN \(HTTP status (?:301|400|401|403|404)\))|Bucket '[^']*' not found|Could not create a OAuth2 access token"
)
"""What pyarrow says of object stores, without an errno, that does not pass by itself."""

_SERVICE = re.compile(r"AWS Error|google::cloud::Status|Azure Error")
_GCS_SECONDS = 30  # of trying again; pyarrow's own limit for gs:// is a quarter of an hour for every request

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*)(?:::.*)?://")
_ARROW_SCHEMES = frozenset({"file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss"})
_WITHOUT_FOLDERS = frozenset({"s3", "gcs"})  # pyarrow would write every folder's marker again for every file
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
        parent, slash, name = path.rstrip("/").rpartition("/")
        bare, options = split_options(absolute(url))
        first, chained, rest = bare.partition("::")
        shown = (first.rstrip("/").rpartition("/")[0] or "/") + chained + rest + options
        return cls(shown, pafs.SubTreeFileSystem(parent or slash, system)), name  # nothing holds a bucket

    def __str__(self) -> str:
        return self.url

    def below(self, name: str) -> Folder:
        """A folder in this folder."""
        return Folder(self.url_of(name), pafs.SubTreeFileSystem(self._base(name), self.system.base_fs))

    def url_of(self, name: str) -> str:
        """Where something in this folder is; the options of the folder's URL (``?region=...``) stay at the end."""
        bare, options = split_options(self.url)
        first, chained, rest = bare.partition("::")
        below = quote(name) if _scheme(self.url) in _ARROW_SCHEMES else name
        return f"{first.rstrip('/')}/{below}" + chained + rest + options

    def names(self) -> list[str] | None:
        """The names directly below but those of unfinished files, sorted; None where there is no folder."""
        if self.system.get_file_info("").type != pafs.FileType.Directory:
            return None
        found = self.system.get_file_info(pafs.FileSelector(""))
        return sorted(info.base_name for info in found if not info.base_name.endswith(UNFINISHED))

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
        if self.system.base_fs.type_name not in _WITHOUT_FOLDERS:
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
    return url.rstrip("/") if not split_options(url)[1] else url


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
        if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in url:
            uri += f"{'&' if split_options(url)[1] else '?'}retry_limit_seconds={_GCS_SECONDS}"
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


def of_storage(error: Exception) -> bool:
    """Whether an error of reading is the storage's, and says nothing about what the file holds."""
    return isinstance(error, OSError) and bool(error.errno or _SERVICE.search(str(error)))


def may_pass(error: OSError) -> bool:
    """Whether the same may work later without anybody's help."""
    return error.errno not in _LASTING and not re.search(REFUSED, str(error))


def split_glob(url: str) -> tuple[str, str] | None:
    """A glob's folder and the pattern below it: `s3://b/in/*.json?region=x` -> (`s3://b/in/?region=x`, `*.json`).

    None where there is nothing of a glob (`*`, `?`, `[`) in the URL.
    """
    bare, options = split_options(url)
    magic = re.search(r"[*?\[]", bare)
    if magic is None:
        return None
    end = bare.rfind("/", 0, magic.start()) + 1
    return (bare[:end] or ".") + options, bare[end:]


def last_name(url: str) -> str:
    """The last name in a URL: `s3://bucket/runs/table/?region=x` -> `table`."""
    return split_options(url)[0].rstrip("/").rpartition("/")[2]


def split_options(url: str) -> tuple[str, str]:
    """`s3://b/k?region=x` -> (`s3://b/k`, `?region=x`); only pyarrow's URLs have options."""
    match = _QUERY.search(url) if _scheme(url) in _ARROW_SCHEMES else None
    return (url[: match.start()], url[match.start() :]) if match else (url, "")


def _scheme(url: str) -> str | None:
    match = _SCHEME.match(url)
    return match.group(1).lower() if match else None
