"""The rows of one file's bytes: JSON lines, JSON, CSV, TSV and Parquet."""

from __future__ import annotations

import csv
import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from raydpp.ingest.json_stream import MAX_RECORD, BrokenJson, is_utf8, read_records

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2"}  # of all but Parquet, which compresses its own pages
DAMAGE = (OSError, pa.ArrowException, BrokenJson, csv.Error)  # what rows_of raises where a file is broken

_BUFFER = 2**16  # bytes; also what decides whether a .json file holds JSON lines
_BATCH = 1024  # rows of Parquet in memory
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
    return Kind(suffix, codec) if suffix in SUFFIXES and not (codec and suffix == ".parquet") else None


def rows_of(source: io.RawIOBase, kind: Kind) -> Iterator[RawRow]:
    """The rows of a file (seekable if it is Parquet); raises one of ``DAMAGE`` where it cannot be read any further."""
    if kind.suffix == ".parquet":
        return _parquet_rows(source)
    plain = source if kind.codec is None else pa.CompressedInputStream(pa.PythonFile(source, "r"), kind.codec)
    stream = io.BufferedReader(plain, _BUFFER)
    if kind.suffix in (".csv", ".tsv"):
        return _csv_rows(stream, "," if kind.suffix == ".csv" else "\t")
    if kind.suffix == ".json" and not _is_json_lines(stream.peek(_BUFFER)):
        return _json_rows(stream)
    return _line_rows(stream)


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


def _json_rows(stream: io.BufferedReader) -> Iterator[RawRow]:
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    for row, (value, intact) in enumerate(read_records(text)):
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
    row = 0
    file = pq.ParquetFile(source)
    groups = range(file.num_row_groups)  # one by one: a batch does not reach into a damaged group
    for batch in chain.from_iterable(file.iter_batches(_BATCH, row_groups=[group]) for group in groups):
        try:
            yield from [RawRow(row + index, value, None) for index, value in enumerate(batch.to_pylist())]
        except _BAD_VALUE:
            yield from [_parquet_row(row + index, batch.slice(index, 1)) for index in range(batch.num_rows)]
        row += batch.num_rows


def _parquet_row(row: int, batch: pa.RecordBatch) -> RawRow:
    try:
        return RawRow(row, batch.to_pylist()[0], None)
    except _BAD_VALUE as error:
        return RawRow(row, None, f"the row holds a value that cannot be read: {error}")
