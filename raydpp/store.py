"""The tables between the stages: their schemas, and reading and writing them on any file system.

A stage's output folder holds its table in a folder of plain Parquet files, ``rejects/`` (JSON lines), ``run.json``, and
``_SUCCESS`` once it is whole. Every file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from raydpp.errors import UserError
from raydpp.filesystem import child_url, resolve, split_options

_ROW_GROUP = 4096

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def corpus_schema(carried: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """The corpus table: one conversation a row, plus the columns the user asked to carry."""
    own = [("id", pa.string()), ("source", pa.string()), ("messages", MESSAGES)]
    return pa.schema([*own, *(carried or {}).items()])


def gradient_schema(dimension: int, dtype: str = "float16", difficulty: bool = False) -> pa.Schema:
    """The gradient table: one unit-norm feature of length ``dimension`` a row, stored as float16 or float32.

    Whatever the representation, the column is named ``gradient``. ``loss`` is null where the model has none (a text
    encoder). With ``difficulty`` there is a column for instruction-following difficulty.
    """
    element = {"float16": pa.float16(), "float32": pa.float32()}[dtype]
    return pa.schema(
        [
            ("id", pa.string()),
            ("source", pa.string()),
            ("gradient", pa.list_(element, dimension)),
            ("gradient_norm", pa.float32()),
            ("loss", pa.float32()),
            ("prompt_tokens", pa.int32()),
            ("response_tokens", pa.int32()),
            ("truncated", pa.bool_()),
            *([("difficulty", pa.float32())] if difficulty else []),
        ]
    )


SELECTION_SCHEMA = pa.schema(
    [
        ("rank", pa.int64()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("log_gain", pa.float64()),
        ("log_det", pa.float64()),
        ("quality", pa.float64()),
    ]
)


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


def write_table(url: str, table: pa.Table) -> None:
    """One Parquet file. Vector columns get no dictionary: it costs time and saves nothing."""
    # Small row groups, so that some rows of a large file can be read without the rest.
    plain = [field.name for field in table.schema if pa.types.is_string(field.type)]
    write_whole(
        url,
        lambda stream: pq.write_table(
            table, stream, compression="zstd", use_dictionary=plain or False, row_group_size=_ROW_GROUP
        ),
    )


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


@dataclass(frozen=True)
class Part:
    """One Parquet file of a table: its URL and how many rows it has."""

    url: str
    rows: int


def parquet_parts(url: str) -> list[Part]:
    """The Parquet files at a URL (a file, or a folder's files), in name order, with their numbers of rows."""
    system, path = resolve(url)
    info = system.get_file_info(path)
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"there is no table at {url}")
    if info.type == pafs.FileType.File:
        paths = [path]
    else:
        found = system.get_file_info(pafs.FileSelector(path, recursive=True))
        paths = sorted(f.path for f in found if f.path.endswith(".parquet"))
    if not paths:
        raise UserError(f"there is no Parquet file in {url}")

    def rows(file: str) -> int:
        try:
            return int(pq.read_metadata(file, filesystem=system).num_rows)
        except pa.ArrowException as error:
            raise UserError(f"{file} is not a readable Parquet file: {error}") from error

    with ThreadPoolExecutor(16) as pool:  # footers only: waiting, not computing
        urls = [url] if info.type == pafs.FileType.File else [child_url(url, path, file) for file in paths]
        return [Part(u, n) for u, n in zip(urls, pool.map(rows, paths), strict=True)]


def partitions(parts: Sequence[Part], count: int) -> list[list[Part]]:
    """Split files, in order, into at most ``count`` groups of about the same number of rows; none is empty."""
    total = sum(part.rows for part in parts)
    groups: list[list[Part]] = [[] for _ in range(max(1, min(count, len(parts))))]
    seen = 0
    for part in parts:
        middle = (seen + part.rows / 2) / max(total, 1)
        groups[min(int(middle * len(groups)), len(groups) - 1)].append(part)
        seen += part.rows
    return [group for group in groups if group]


def partition_count(rows: int, rows_per_partition: int) -> int:
    return max(1, math.ceil(rows / rows_per_partition))


def read_columns(parts: Sequence[Part], columns: Sequence[str]) -> pa.Table:
    """Some columns of some files, in order. Raises UserError naming the columns a file has where one is missing."""
    tables = []
    for part in parts:
        system, path = resolve(part.url)
        names = pq.read_schema(path, filesystem=system).names
        if missing := [column for column in columns if column not in names]:
            raise UserError(f"{part.url} has no column {missing[0]!r}; it has {', '.join(names)}")
        tables.append(pq.read_table(path, columns=list(columns), filesystem=system, partitioning=None))
    return pa.concat_tables(tables)


def read_whole(parts: Sequence[Part]) -> pa.Table:
    """All columns of files that have the same ones, in order."""
    system, path = resolve(parts[0].url)
    return read_columns(parts, pq.read_schema(path, filesystem=system).names)


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A FixedSizeList column as an (n, D) array of its own floating point type."""
    if not pa.types.is_fixed_size_list(column.type):
        raise UserError(f"a feature column must be a fixed-size list of numbers, not {column.type}")
    if column.null_count:
        raise UserError(f"{column.null_count} rows have no feature (null)")
    flat = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)  # (n * D,)
    return flat.reshape(-1, column.type.list_size)


def vector_array(values: np.ndarray, element: pa.DataType) -> pa.FixedSizeListArray:
    """An (n, D) array as a FixedSizeList column of that element type."""
    flat = pa.array(np.ascontiguousarray(values, dtype=element.to_pandas_dtype()).reshape(-1), element)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])
