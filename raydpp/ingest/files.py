"""Raw files: which ones an input means, and their rows one after the other.

Nothing here fails for what is inside a file: a row that cannot be read comes with a reason, and reading goes on. Only
bytes that cannot be fetched raise, because a second try may help.
"""

from __future__ import annotations

import glob
import io
import os
import posixpath
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.implementations.arrow import ArrowFSWrapper

from raydpp.errors import UserError
from raydpp.ingest.rows import CODECS, COLUMNAR, DAMAGE, SUFFIXES, RawRow, kind_of, rows_of
from raydpp.ingest.schemas import is_row
from raydpp.storage import Folder, of_storage, resolve, split_glob

_KNOWN = f"{', '.join(SUFFIXES)}, and all but {' and '.join(COLUMNAR)} with {', '.join(CODECS)} behind it"
_DESCRIPTIONS = frozenset({"dataset_info.json", "dataset_infos.json", "dataset_dict.json"})
"""Files that say something about a dataset of the Hugging Face hub or of LLaMA-Factory, and hold no row of it."""
_STATE = "state.json"  # one more, where it stands beside .arrow files


@dataclass(frozen=True)
class RawFile:
    """A file to read, its size and when it was last modified (in ns), each None where the server does not say."""

    folder: Folder
    name: str
    bytes: int | None
    modified: int | None = None

    @property
    def url(self) -> str:
        """Where it is, for people."""
        return self.folder.url_of(self.name)


def list_files(inputs: Sequence[str]) -> list[RawFile]:
    """The files that a user's inputs mean, sorted by URL, each once.

    Args:
        inputs: Each a file, a folder or a glob (`*`, `?`, `[..]`, `**`), local or a URL. Folders, those that a glob
            matches too, are searched through; in them only files with a known suffix count, those that describe a
            dataset (dataset_info.json and the like) do not, nor do names that begin with a dot or an underscore (unless
            the glob says so itself). What links lead to counts once.

    Raises:
        UserError: An input leads to no file, to one of an unknown suffix, or may not be listed.
        OSError: The storage does not answer, or refuses.
    """
    if not inputs:
        raise UserError("Nothing to read: give at least one file, folder or glob.")
    files: dict[str, RawFile] = {}
    for url in inputs:
        try:
            for file in sorted(_files_of(url), key=lambda file: (len(file.url), file.url)):
                files.setdefault(_target(file.folder, file.name), file)
        except UnicodeError as error:
            raise UserError(f"{url} has a file whose name is not UTF-8 ({error}): rename it") from error
        except (OSError, pa.ArrowException) as error:
            if of_storage(error) and not isinstance(error, PermissionError):
                raise
            raise UserError(f"{url} cannot be listed: {error}") from error
    return sorted(files.values(), key=lambda file: file.url)


def read_rows(file: RawFile, is_row: Callable[[Collection[str]], bool] = is_row) -> Iterator[RawRow]:
    """Read a file row by row; the memory taken does not grow with the file.

    JSON lines (.jsonl, .ndjson), JSON (.json: an array, an object that is a row (``is_row`` of its keys) or whose one
    list of objects holds the rows, or JSON lines), CSV and TSV with a header (all values text), Parquet, Arrow; the
    text ones plain or compressed. A file damaged in the middle gives its rows so far and then one row with the reason.

    Raises:
        UserError: The suffix is unknown.
        OSError: The bytes cannot be fetched.
    """
    kind = kind_of(file.name)
    if kind is None:
        raise UserError(f"{file.url} has an unknown suffix. Known are {_KNOWN}.")
    system = file.folder.system
    with (
        system.open_input_file(file.name)
        if kind.suffix in COLUMNAR
        else system.open_input_stream(file.name, compression=None)
    ) as stream:
        source, row = _Source(stream), 0
        try:
            for raw in rows_of(source, kind, is_row):
                row = raw.row + 1
                yield raw
        except DAMAGE as error:
            if source.failure is not None:
                raise source.failure from None
            yield RawRow(row, None, f"the file cannot be read from here on: {error}")


def _files_of(url: str) -> list[RawFile]:
    system, path = resolve(url)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.File:
        if kind_of(path) is None:
            raise UserError(f"{url} has an unknown suffix. Known are {_KNOWN}.")
        return [RawFile(*Folder.holding(url), info.size, info.mtime_ns)]
    if info.type == pafs.FileType.Directory:
        folder, found, hidden_wanted, failure = Folder.at(url), [""], False, "has no file"
    elif glob_of := split_glob(url):
        folder, pattern = Folder.at(glob_of[0]), glob_of[1]
        base = folder.system.base_path
        matches = ArrowFSWrapper(folder.system.base_fs).glob(posixpath.join(glob.escape(base), pattern))
        found = [match.lstrip("/")[len(base.lstrip("/")) :] for match in matches]
        hidden_wanted = any(name.startswith((".", "_")) for name in pattern.split("/"))
        failure = "matches no file"
    else:
        raise UserError(f"{url} does not exist.")
    infos = folder.system.get_file_info(found)
    seen: set[str] = set()
    for below in [info for info in infos if info.type == pafs.FileType.Directory]:
        infos += _infos_below(folder, below.path, seen)
    stored = {posixpath.dirname(info.path) for info in infos if info.path.endswith(".arrow")}
    files = [
        RawFile(folder, info.path, info.size, info.mtime_ns)
        for info in infos
        if info.type == pafs.FileType.File and kind_of(info.path) is not None
        if hidden_wanted or not any(name.startswith((".", "_")) for name in info.path.split("/"))
        if not (
            info.base_name in _DESCRIPTIONS or (info.base_name == _STATE and posixpath.dirname(info.path) in stored)
        )
    ]
    if not files:
        raise UserError(f"{url} {failure} to read. Known suffixes are {_KNOWN}.")
    return files


def _infos_below(folder: Folder, path: str, seen: set[str]) -> list[pafs.FileInfo]:
    """What is in a folder at any depth; a local one folder by folder, since links may lead round in a circle."""
    if not isinstance(folder.system.base_fs, pafs.LocalFileSystem):
        return list(folder.system.get_file_info(pafs.FileSelector(path, recursive=True)))
    target = _target(folder, path)
    if target in seen:
        return []
    seen.add(target)
    infos = list(folder.system.get_file_info(pafs.FileSelector(path)))
    for below in sorted((info.path for info in infos if info.type == pafs.FileType.Directory), key=_is_link_in(folder)):
        infos += _infos_below(folder, below, seen)
    return infos


def _is_link_in(folder: Folder) -> Callable[[str], bool]:
    """A folder itself is searched before a link to it, so that its files go by their own names."""
    return lambda path: os.path.islink(folder.url_of(path))


def _target(folder: Folder, path: str) -> str:
    """What a path leads to, through links: the same for all paths that lead there."""
    url = folder.url_of(path)
    return os.path.realpath(url) if isinstance(folder.system.base_fs, pafs.LocalFileSystem) else url


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
