"""Raw files: which ones an input means, and their rows one after the other.

Nothing here fails for what is inside a file: a row that cannot be read comes with a reason in words and the
reading goes on, so that no row is lost in silence. Only bytes that cannot be fetched raise, because a second
try may help.
"""

from __future__ import annotations

import glob
import io
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper

from raydpp.errors import UserError
from raydpp.ingest.rows import CODECS, DAMAGE, SUFFIXES, RawRow, kind_of, rows_of
from raydpp.storage import child_url, resolve, split_options

_KNOWN = f"{', '.join(SUFFIXES)}, and all but Parquet with {', '.join(CODECS)} behind it"


@dataclass(frozen=True)
class RawFile:
    """A file to read: its URL, as `resolve` takes it, and its size (0 where the server does not say)."""

    url: str
    bytes: int


def list_files(inputs: Sequence[str]) -> list[RawFile]:
    """The files that a user's inputs mean.

    Args:
        inputs: Each a file, a folder or a glob (`*`, `?`, `[..]`, `**`), local or a URL. Folders, those that
            a glob matches too, are searched through; in them only files with a known suffix count, and names
            that begin with a dot or an underscore do not (unless the glob says so itself).

    Returns:
        The files, sorted by URL, each once.

    Raises:
        UserError: An input leads to no file, to one of an unknown suffix, or cannot be listed.
    """
    if not inputs:
        raise UserError("Nothing to read: give at least one file, folder or glob.")
    files = {}
    for url in inputs:
        try:
            files.update({file.url: file for file in _files_of(url)})
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{url} cannot be listed: {error}") from error
    return sorted(files.values(), key=lambda file: file.url)


def read_rows(url: str) -> Iterator[RawRow]:
    """Reads a file row by row; the memory taken does not grow with the file.

    JSON lines (.jsonl, .ndjson), JSON (.json: an array, an object whose one list of objects holds the rows,
    or JSON lines), CSV and TSV with a header (all values text), Parquet; the text ones plain or compressed. A
    file damaged in the middle gives its rows so far and then one row with the reason.

    Args:
        url: A file as `list_files` returns it.

    Raises:
        UserError: The suffix is unknown.
        OSError: The bytes cannot be fetched.
    """
    file_system, path = resolve(url)
    kind = kind_of(path)
    if kind is None:
        raise UserError(f"{url} has an unknown suffix. Known are {_KNOWN}.")
    with (
        file_system.open_input_file(path)
        if kind.suffix == ".parquet"
        else file_system.open_input_stream(path, compression=None)
    ) as file:
        source, row = _Source(file), 0
        try:
            for raw in rows_of(source, kind):
                row = raw.row + 1
                yield raw
        except DAMAGE as error:
            if source.failure is not None:
                raise source.failure from None
            yield RawRow(row, None, f"the file cannot be read from here on: {error}")


def _files_of(url: str) -> list[RawFile]:
    file_system, path = resolve(url)
    info = file_system.get_file_info(path)
    if info.type == pafs.FileType.File:
        if kind_of(path) is None:
            raise UserError(f"{url} has an unknown suffix. Known are {_KNOWN}.")
        return [RawFile(child_url(url, path, path), info.size or 0)]
    bare, options = split_options(url)
    hidden_wanted, folder_url = False, url
    if info.type == pafs.FileType.Directory:
        found, failure = [info], "has no file"
    elif magic := re.search(r"[*?\[]", bare):
        folder_end = bare.rfind("/", 0, magic.start()) + 1
        folder_url, pattern = (bare[:folder_end] or ".") + options, bare[folder_end:]
        file_system, path = resolve(folder_url)
        matches = ArrowFSWrapper(file_system).glob(posixpath.join(glob.escape(path), pattern))
        hidden_wanted = any(name.startswith((".", "_")) for name in pattern.split("/"))
        found, failure = file_system.get_file_info(list(matches)), "matches no file"
    else:
        raise UserError(f"{url} does not exist.")
    for folder in [info for info in found if info.type == pafs.FileType.Directory]:
        found += file_system.get_file_info(pafs.FileSelector(folder.path, recursive=True))
    files = [
        RawFile(child_url(folder_url, path, info.path), info.size or 0)
        for info in found
        if info.type == pafs.FileType.File and kind_of(info.path) is not None
        if hidden_wanted or not _is_hidden(info.path, path)
    ]
    if not files:
        raise UserError(f"{url} {failure} to read. Known suffixes are {_KNOWN}.")
    return files


def _is_hidden(path: str, folder: str) -> bool:
    below = path.strip("/")[len(folder.strip("/")) :].strip("/")
    return any(name.startswith((".", "_")) for name in below.split("/"))


class _Source(io.RawIOBase):
    """The bytes of a file; remembers a failure to fetch them, to tell it from a decoder's complaint."""

    def __init__(self, file: pa.NativeFile) -> None:
        self.file = file
        self.failure: Exception | None = None

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self.file.seekable())

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return int(self.file.seek(offset, whence))

    def tell(self) -> int:
        return int(self.file.tell())

    def readinto(self, buffer: Any) -> int:
        try:
            return int(self.file.readinto(buffer))
        except Exception as failure:
            self.failure = failure
            raise
