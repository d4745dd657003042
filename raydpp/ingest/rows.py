"""The rows of one file's bytes: JSON lines, JSON, CSV, TSV, Parquet and Arrow."""

from __future__ import annotations

import csv
import gzip
import io
import json
import posixpath
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raydpp.ingest.json_stream import MAX_RECORD, BrokenJson, is_utf8, read_records
from raydpp.tables import require_plain

COLUMNAR = (".parquet", ".arrow")  # compressed inside, if at all
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", *COLUMNAR)
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}
DAMAGE = (OSError, EOFError, zlib.error, pa.ArrowException, BrokenJson, csv.Error)  # raised where a file is broken

_BUFFER = 2**16  # bytes; also what decides whether a .json file holds JSON lines
_BATCH = 1024  # rows of Parquet or Arrow in memory
_ARROW_FILE = b"ARROW1"  # what Arrow's file format begins with; its stream format, which datasets writes, does not
_BOM = b"\xef\xbb\xbf"
_BAD_VALUE = (ValueError, OverflowError, pa.ArrowException)  # text that is not UTF-8, a date beyond Python's


class Kind(NamedTuple):
    suffix: str  # one of SUFFIXES
    codec: str | None  # one of CODECS' values


@dataclass(frozen=True, slots=True)
class RawRow:
    """A row of a raw file: its value, or the reason why it has none."""

    row: int  # from 0: the line of a JSON-lines file, the index of the record in all others
    value: dict[str, Any] | None
    reason: str | None


def kind_of(path: str) -> Kind | None:
    """How to read a file by its name, in upper or lower case; None if there is no way."""
    stem, suffix = posixpath.splitext(path.lower())
    codec = CODECS.get(suffix)
    if codec is not None:
        suffix = posixpath.splitext(stem)[1]
    return Kind(suffix, codec) if suffix in SUFFIXES and not (codec and suffix in COLUMNAR) else None


def rows_of(source: io.RawIOBase, kind: Kind, is_row: Callable[[Collection[str]], bool]) -> Iterator[RawRow]:
    """The rows of a file, seekable if it is one of ``COLUMNAR``.

    ``is_row`` says of the keys of a JSON object whether it is a row, or holds them. Raises one of ``DAMAGE`` where the
    file cannot be read any further.
    """
    if kind.suffix == ".parquet":
        yield from _parquet_rows(source)
        return
    if kind.suffix == ".arrow":
        yield from _arrow_rows(source)
        return
    stream = io.BufferedReader(_decompressed(source, kind.codec), _BUFFER)
    if kind.suffix in (".csv", ".tsv"):
        yield from _csv_rows(stream, "," if kind.suffix == ".csv" else "\t")
        return
    head = stream.peek(_BUFFER)
    if not _is_json_lines(head) if kind.suffix == ".json" else _is_one_document(head):
        yield from _json_rows(stream, is_row)
    else:
        yield from _line_rows(stream)


def _decompressed(source: io.RawIOBase, codec: str | None) -> Any:
    if codec == "gzip":  # Python's own: Arrow's gives nothing of a file that has zeros behind it
        return _Gzip(source)
    return pa.CompressedInputStream(pa.PythonFile(source, "r"), codec) if codec else source


class _Gzip(io.RawIOBase):
    """Gives what could be decompressed before it complains about what follows."""

    def __init__(self, source: io.RawIOBase) -> None:
        self.file = gzip.GzipFile(fileobj=source, mode="rb")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        found = self.file.read1(len(buffer))
        buffer[: len(found)] = found
        return len(found)


def _is_one_document(head: bytes) -> bool:
    """Whether a file that is named for JSON lines holds an array, or objects over several lines."""
    first = head.removeprefix(_BOM).lstrip().partition(b"\n")[0].strip()
    return first.startswith(b"[") or first == b"{"


def _is_json_lines(head: bytes) -> bool:
    """Whether a .json file holds JSON lines, by its first bytes."""
    first, _, rest = head.removeprefix(_BOM).lstrip().partition(b"\n")
    opened = first.startswith(b"[") or first.rstrip().endswith((b"[", b"{", b",", b":"))
    return not opened and bool(rest.strip() or not first.startswith(b"{"))


def _line_rows(stream: io.BufferedReader) -> Iterator[RawRow]:
    row = 0
    while line := stream.readline(MAX_RECORD):  # splits at \n alone: U+2028 and the like are text
        tail = line
        while len(tail) == MAX_RECORD and not tail.endswith(b"\n"):
            tail = stream.readline(MAX_RECORD)
        if tail is not line:
            yield RawRow(row, None, f"the line is longer than {MAX_RECORD:,} bytes")
        elif line.strip():
            yield _line_row(row, line.removeprefix(_BOM) if row == 0 else line)
        row += 1


def _line_row(row: int, line: bytes) -> RawRow:
    try:
        return _object_row(row, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError:
        return RawRow(row, None, "the line is not UTF-8")
    except (ValueError, RecursionError) as error:
        return RawRow(row, None, f"the line is not JSON: {error}")


def _json_rows(stream: io.BufferedReader, is_row: Callable[[Collection[str]], bool]) -> Iterator[RawRow]:
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    for row, (value, intact) in enumerate(read_records(text, is_row)):
        yield _object_row(row, value) if intact else RawRow(row, None, "the record is not UTF-8")


def _object_row(row: int, value: Any) -> RawRow:
    if isinstance(value, dict):
        return RawRow(row, value, None)
    return RawRow(row, None, "the record is not an object with columns")


def _csv_rows(stream: io.BufferedReader, delimiter: str) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_RECORD)
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(text, delimiter=delimiter, strict=True)  # strict: a quote left open is an error
    header = next((fields for fields in reader if fields), [])
    if len(set(header)) < len(header):
        raise csv.Error("the header names a column twice")
    if not is_utf8("".join(header)):
        raise csv.Error("the header is not UTF-8")
    row = 0
    while True:
        try:
            fields = next(reader)
            if not fields:  # a blank line
                continue
        except StopIteration:
            return
        except csv.Error as error:
            yield RawRow(row, None, f"the row is not CSV: {error}")
        else:
            if len(fields) != len(header):
                yield RawRow(row, None, f"the row has {len(fields)} fields, the header has {len(header)}")
            elif not is_utf8("".join(fields)):
                yield RawRow(row, None, "the row is not UTF-8")
            else:
                yield RawRow(row, dict(zip(header, fields, strict=True)), None)
        row += 1


def _parquet_rows(source: io.RawIOBase) -> Iterator[RawRow]:
    file = pq.ParquetFile(source)
    require_plain(file.schema_arrow)
    groups = range(file.num_row_groups)  # one by one: a batch does not reach into a damaged group
    return _batch_rows(chain.from_iterable(file.iter_batches(_BATCH, row_groups=[group]) for group in groups))


def _arrow_rows(source: io.RawIOBase) -> Iterator[RawRow]:
    file = pa.PythonFile(source, "r")
    begin = file.read(len(_ARROW_FILE))
    file.seek(0)
    batches: Iterable[pa.RecordBatch]
    if begin == _ARROW_FILE:
        whole = pa.ipc.open_file(file)
        batches = map(whole.get_batch, range(whole.num_record_batches))
    else:
        whole = batches = pa.ipc.open_stream(file)
    require_plain(whole.schema)
    pieces = (batch.slice(start, _BATCH) for batch in batches for start in range(0, batch.num_rows, _BATCH))
    return _batch_rows(pieces)


def _batch_rows(batches: Iterable[pa.RecordBatch]) -> Iterator[RawRow]:
    row = 0
    for batch in batches:
        try:
            yield from [RawRow(row + index, value, None) for index, value in enumerate(batch.to_pylist())]
        except _BAD_VALUE:
            yield from [_batch_row(row + index, batch.slice(index, 1)) for index in range(batch.num_rows)]
        row += batch.num_rows


def _batch_row(row: int, batch: pa.RecordBatch) -> RawRow:
    try:
        return RawRow(row, batch.to_pylist()[0], None)
    except _BAD_VALUE as error:
        return RawRow(row, None, f"the row holds a value that cannot be read: {error}")
