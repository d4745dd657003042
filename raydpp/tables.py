"""The tables between the stages: their schemas, and reading and writing them on any file system.

A stage's output folder holds its table in a folder of plain Parquet files, ``rejects/`` (JSON lines), ``run.json``, and
``_SUCCESS`` once it is whole. Every file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpp import runs
from raydpp.cluster import value_of
from raydpp.errors import UserError
from raydpp.storage import Folder, last_name, of_storage

NO_SOURCE = "(no source)"
"""What a row belongs to whose source is null."""

_ROW_GROUP = 4096

MESSAGES = pa.list_(
    pa.struct(
        [("role", pa.string()), ("content", pa.string()), ("reasoning_content", pa.string()), ("weight", pa.int8())]
    )
)
"""Turns: reasoning_content is null where there is none, weight is 0 for an assistant's that is context, else null."""


def corpus_schema(carried: Mapping[str, pa.DataType] | None = None) -> pa.Schema:
    """The corpus table: one conversation a row, plus the columns the user asked to carry.

    ``extra`` holds all columns of the row that the conversation is not made of, as one JSON object.
    """
    own = [("id", pa.string()), ("source", pa.string()), ("messages", MESSAGES), ("extra", pa.string())]
    return pa.schema([*own, *(carried or {}).items()])


def gradient_schema(dimension: int, dtype: str = "int8", difficulty: bool = False) -> pa.Schema:
    """The gradient table: one feature of length ``dimension`` a row, stored as int8, float16 or float32.

    Of floating point type a feature has unit norm; of whole numbers it is what they are divided by their norm.
    Whatever the representation, the column is named ``gradient``. ``loss`` is null where the model has none (a text
    encoder). With ``difficulty`` there is a column for instruction-following difficulty.
    """
    element = {"int8": pa.int8(), "float16": pa.float16(), "float32": pa.float32()}[dtype]
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


def write_table(folder: Folder, name: str, table: pa.Table) -> None:
    """One Parquet file. Floating point vectors get no dictionary, which would cost time and save nothing."""
    # Small row groups, so that some rows of a large file can be read without the rest.
    few = [field.name for field in table.schema if pa.types.is_string(field.type)]
    few += [f"{field.name}.list.element" for field in table.schema if vector_type(field.type) == pa.int8()]
    folder.write(
        name,
        lambda stream: pq.write_table(
            table, stream, compression="zstd", use_dictionary=few or False, row_group_size=_ROW_GROUP
        ),
    )


@dataclass(frozen=True)
class Part:
    """One Parquet file of a table, and how many rows it has."""

    folder: Folder
    name: str
    rows: int = 0
    footer: pa.Schema | None = field(default=None, compare=False, repr=False)  # where it was read with the rows

    def __str__(self) -> str:
        return self.folder.url_of(self.name)

    @property
    def columns(self) -> list[str]:
        """The names of its columns, those in the names of its folders (``source=a/``) among them."""
        own = list(self.schema.names)
        return [*own, *(name for name in self._of_folders if name not in own)]

    @property
    def schema(self) -> pa.Schema:
        return self.footer or pq.read_schema(self.name, filesystem=self.folder.system)

    def read(self, columns: Sequence[str]) -> pa.Table:
        """Some of its columns, ids and sources as text. UserError naming the columns it has where one is missing."""
        own, more = self.schema.names, self._of_folders
        if missing := [column for column in columns if column not in own and column not in more]:
            raise UserError(f"{self} has no column {missing[0]!r}; it has {', '.join(self.columns)}")
        held = [column for column in columns if column in own]
        try:
            table = pq.read_table(self.name, columns=held, filesystem=self.folder.system, partitioning=None)
        except (pa.ArrowException, OSError) as error:
            if of_storage(error):
                raise
            raise UserError(f"{self} cannot be read, its footer is whole but not its pages: {error}") from error
        for name in columns:
            if name not in own:
                table = table.append_column(name, pa.repeat(pa.scalar(more[name], pa.string()), self._length(table)))
        for name in {"id", "source"} & set(columns):
            table = table.set_column(table.column_names.index(name), name, self._texts(table[name], name))
        return table.select(list(columns))

    @property
    def _of_folders(self) -> dict[str, str]:
        pairs = (folder.partition("=") for folder in self.name.split("/")[:-1])
        return {unquote(name): unquote(value) for name, equals, value in pairs if name and equals}

    def _length(self, table: pa.Table) -> int:
        if table.num_columns:
            return int(table.num_rows)
        return int(pq.read_metadata(self.name, filesystem=self.folder.system).num_rows)

    def _texts(self, column: pa.ChunkedArray, name: str) -> pa.ChunkedArray:
        """Ids and sources as others wrote them: numbers, dictionaries, views, and a source that is not there."""
        if not pa.types.is_string(column.type):
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            try:
                column = column.cast(pa.string())
            except pa.ArrowException as error:
                raise UserError(f"the column {name!r} of {self} is {column.type}, not text or numbers") from error
        if column.null_count and name == "id":
            raise UserError(f"{column.null_count} rows of {self} have no id (null)")
        return pc.fill_null(column, NO_SOURCE) if column.null_count else column


def parquet_parts(folder: Folder) -> list[Part]:
    """The Parquet files below a folder, in name order, with their numbers of rows."""
    if folder.names() is None:
        raise UserError(f"there is no table at {folder}")
    if not (names := [name for name in folder.files() if is_parquet(name)]):
        raise UserError(f"there is no Parquet file in {folder}")
    with ThreadPoolExecutor(16) as pool:  # footers only: waiting, not computing
        return list(pool.map(lambda name: counted(Part(folder, name)), names))


def is_parquet(name: str) -> bool:
    """Whether a file is one of Parquet by its name; hidden ones, which some systems put beside others, are not."""
    hidden = any(part.startswith((".", "_")) for part in name.split("/"))
    return name.lower().endswith((".parquet", ".pq", ".parq")) and not hidden


def parquet_at(url: str) -> list[Part]:
    """The Parquet files that a URL means: itself, or those below it where it is a folder."""
    folder, name = Folder.holding(url)
    return [counted(Part(folder, name))] if folder.has(name) else parquet_parts(Folder.at(url))


def counted(part: Part) -> Part:
    """The same file with its number of rows and its schema, read from its footer."""
    try:
        found = pq.read_metadata(part.name, filesystem=part.folder.system)
        footer = found.schema.to_arrow_schema()
        require_plain(footer)
        return replace(part, rows=found.num_rows, footer=footer)
    except pa.ArrowException as error:
        raise UserError(f"{part} is not a readable Parquet file: {error}") from error


def require_plain(schema: pa.Schema) -> None:
    """ArrowInvalid where a column, at any depth, holds Python objects as Ray Data pickles them.

    Where Ray Data is loaded, to read one is to unpickle it, which runs what its writer put there.
    """
    if b"ray.data.arrow_pickled_object" in schema.serialize().to_pybytes():
        raise pa.ArrowInvalid("it holds pickled Python objects, which can run code: write plain columns")


def partition_files(parts: Sequence[Part], count: int) -> list[list[Part]]:
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
    return concatenated([part.read(columns) for part in parts])


def concatenated(tables: Sequence[pa.Table]) -> pa.Table:
    """Tables one below the other; where a column's types differ, it gets the wider one."""
    try:
        return pa.concat_tables(tables, promote_options="permissive")
    except pa.ArrowException as error:
        raise UserError(f"the files of the table do not go together: {error}") from error


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    """A column of vectors as an (n, D) array of its own type, int8 or floating point (float32 for other integers).

    Lists of fixed size, lists that are all of the same length, and the tensors of Arrow and Ray are vectors.
    """
    if vector_type(column.type) is None:
        raise UserError(f"a feature column must hold lists of numbers, not {column.type}")
    if column.null_count:
        raise UserError(f"{column.null_count} rows have no feature (null)")
    if isinstance(column.type, pa.BaseExtensionType):
        column = pa.chunked_array([chunk.storage for chunk in column.chunks], column.type.storage_type)
    if not pa.types.is_fixed_size_list(column.type):
        lengths = pc.unique(pc.list_value_length(column)).to_pylist()
        if len(lengths) > 1:
            raise UserError(f"the features have different numbers of dimensions ({min(lengths)} to {max(lengths)})")
        dimension = lengths[0] if lengths else 0
    else:
        dimension = column.type.list_size
    numbers = column.combine_chunks().flatten()
    if numbers.null_count:
        raise UserError(f"{numbers.null_count} entries of features are null")
    flat = numbers.to_numpy(zero_copy_only=False)  # (n * D,)
    return flat.astype(_read_as(flat.dtype), copy=False).reshape(len(column), dimension)


def _read_as(stored: np.dtype) -> np.dtype:
    return stored if stored.kind == "f" or stored == np.int8 else np.dtype(np.float32)


def vector_type(kind: pa.DataType) -> pa.DataType | None:
    """The type of the numbers in a column of vectors; None where it is no such column."""
    if isinstance(kind, pa.BaseExtensionType):
        kind = kind.storage_type
    lists = (pa.types.is_fixed_size_list, pa.types.is_list, pa.types.is_large_list)
    if not any(is_list(kind) for is_list in lists):
        return None
    element = kind.value_type
    return element if pa.types.is_floating(element) or pa.types.is_integer(element) else None


STEP = 0.5
"""What a whole number stands for, in standard deviations of a row's coordinates.

Rounding adds STEP^2 / 12, 2 %, to the square of a row's length and nothing to inner products: cosines of different rows
come out 2 % smaller. Coordinates of a projection take 4 bits each in Parquet. Nothing is cut off: large numbers are
rare, and cost a few bits more."""


def vector_array(values: np.ndarray, element: pa.DataType) -> pa.FixedSizeListArray:
    """(n, D) features as a FixedSizeList column of that type; between whole numbers and unit norm if need be."""
    wanted = np.dtype(element.to_pandas_dtype())
    if (wanted == np.int8) != (values.dtype == np.int8):
        values = values.astype(np.promote_types(values.dtype, np.float32))
        lengths = np.linalg.norm(values, axis=1, keepdims=True)  # (n, 1)
        values = values / np.where(lengths == 0, 1, lengths)
        if wanted == np.int8:
            values = np.rint(values * (math.sqrt(values.shape[1]) / STEP)).clip(-127, 127)
    flat = pa.array(np.ascontiguousarray(values, dtype=wanted).reshape(-1), element)
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


GRADIENTS = "gradients"


@dataclass(frozen=True)
class GradientTable:
    """A table of features, unread."""

    name: str  # for people: the last part of its URL
    parts: tuple[Part, ...]  # its files, with the number of rows in each that belong to it
    column: str  # the one with the features
    kind: pa.FixedSizeListType  # what the features are read as, however each file stores them
    fingerprint: dict[str, Any] | None = None  # what its numbers depend on; None for a plain Parquet file
    corpus: str | None = None  # the one it was made from, if known
    identity: Any = None  # strict JSON that changes when the table does
    learning_rate: float | None = None  # of the checkpoint that its gradients were taken at, if known
    source: str | None = None  # where set, only rows of this source belong to the table
    scores: Any = None  # a reference to a table of id and more columns, which rows are joined with as they are read
    scored: tuple[str, ...] = ()  # the names of these columns

    @property
    def dimension(self) -> int:
        """D, the length of a feature."""
        return int(self.kind.list_size)

    @property
    def rows(self) -> int:
        """Its number of rows."""
        return sum(part.rows for part in self.parts)

    @property
    def projected(self) -> bool:
        """Whether its features are projections of which each half is one too (``diversity.fidelity``)."""
        return ((self.fingerprint or {}).get("projection") or {}).get("halves") == "independent"

    def some_parts(self, rows: int) -> tuple[Part, ...]:
        """Files that together have so many rows, or all: always the same ones.

        Those of a table that raydpp wrote are random partitions of it; of another there are eight, if it has as many.
        """
        drawn = [self.parts[i] for i in np.random.default_rng(0).permutation(len(self.parts))]
        enough = int(np.searchsorted(np.cumsum([part.rows for part in drawn]), rows)) + 1
        return tuple(drawn[: max(enough, 1 if self.fingerprint else 8)])

    def sample(self, rows: int) -> np.ndarray:
        """The features of some of its rows, drawn without replacement, always the same ones: (at most rows, D)."""
        held = self.read(self.some_parts(rows))
        drawn = np.sort(np.random.default_rng(0).permutation(len(held))[:rows])
        return vectors(held[self.column].take(pa.array(drawn)))

    def has(self, column: str) -> bool:
        """Whether its files, or what they are joined with, have a column."""
        return column in self.scored or column in self.parts[0].columns

    def read(self, parts: Sequence[Part], more: Sequence[str] = ()) -> pa.Table:
        """The rows of some of its files, in the order of their ids: a gradient table's columns and ``more``."""
        columns = [name for name in parts[0].columns if name in _KEPT or name == self.column]
        return self.read_columns(parts, [*columns, *more]).sort_by("id")

    def read_columns(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Table:
        """Some columns of its rows in some files; where scores are among them, without the rows that have none."""
        columns = list(dict.fromkeys(columns))
        if self.source is None:
            return self._read_scored(parts, columns)
        table = self._read_scored(parts, list(dict.fromkeys([*columns, "source"])))
        return table.filter(pc.equal(table["source"], self.source)).select(columns)

    def _read_scored(self, parts: Sequence[Part], columns: list[str]) -> pa.Table:
        joined = [name for name in columns if name in self.scored]
        if not joined:
            return self._read(parts, columns)
        table = self._read(parts, list(dict.fromkeys(["id", *(c for c in columns if c not in joined)])))
        scores = value_of(self.scores)
        ids = table["id"]
        scores = scores.filter(pc.is_in(scores["id"], ids))  # the ids here are few: only they are hashed
        places = pc.index_in(ids, scores["id"])
        table, scores = table.filter(pc.is_valid(places)), scores.take(places.drop_null())
        for name in joined:
            table = table.append_column(name, scores[name])
        return table.select(columns)

    def _read(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Table:
        return concatenated([with_vectors(part.read(columns), self.column, self.kind, part) for part in parts])


def with_vectors(table: pa.Table, column: str, kind: pa.FixedSizeListType, part: Part) -> pa.Table:
    """A table whose features are of this type; UserError, naming the file, where they cannot be."""
    if column not in table.column_names or table[column].type == kind:
        return table
    try:
        values = vectors(table[column])
    except UserError as error:
        raise UserError(f"{part}: {error}") from error
    if values.shape[1] != kind.list_size and len(values):
        raise UserError(f"{part} has features of {values.shape[1]} dimensions, other files of {kind.list_size}")
    whole = values.reshape(-1, kind.list_size)
    return table.set_column(table.column_names.index(column), column, vector_array(whole, kind.value_type))


_KEPT = frozenset(gradient_schema(1).names)


def open_table(url: str, column: str) -> GradientTable:
    """Find a table's files and check what can be checked without reading it.

    Args:
        url: The output folder of raydpp extract, select or cut, or a Parquet file, or a folder of them, with the
            columns id and ``column``.
        column: The column with the features, lists of numbers with unit norm; see ``vectors``.
    """
    folder = Folder.at(url)
    identity: Any
    rate = None
    if folder.has(runs.RECORD) or not _holds_parquet(url, folder):
        record = runs.load_finished(("extract", "select", "cut"), folder)
        parts = parquet_parts(folder.below(GRADIENTS))
        runs.check_rows(record["stage"], folder, record["counts"]["rows"], sum(part.rows for part in parts))
        fingerprint, corpus, identity = record["fingerprint"], record["corpus"], runs.identity(record)
        column, rate = record.get("feature_column", column), record.get("learning_rate")
    else:
        parts = parquet_at(url)
        fingerprint, corpus = None, None
        identity = [[str(part), part.rows] for part in parts]
    parts = [part for part in parts if part.rows]
    if not parts:
        raise UserError(f"{url} has no rows")
    kind = _kind_of(parts, column)
    return GradientTable(last_name(url), tuple(parts), column, kind, fingerprint, corpus, identity, rate)


def table_or_ids(url: str, column: str) -> GradientTable | list[str]:
    """What people name examples by: the folder of a run, or Parquet with features or without, or a file of ids.

    A file of ids holds one a line, or JSON lines with an ``id``.
    """
    folder, name = Folder.holding(url)
    if Folder.at(url).names() is not None:
        return open_table(url, column)
    if is_parquet(name):
        parts = parquet_at(url)
        return open_table(url, column) if column in parts[0].columns else ids_of(parts)
    text = folder.read_text(name)
    if text is None:
        raise UserError(f"there is no file or folder {url}: give a run's folder, a Parquet file or a file of ids")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if name.endswith((".jsonl", ".ndjson")):
        try:
            return [str(json.loads(line)["id"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{url} is not JSON lines with an id in each: {error!r}") from error
    return lines


def ids_named(urls: Sequence[str], column: str) -> list[str]:
    """The ids that ``table_or_ids`` finds at some URLs, each once, ascending."""
    ids = set[str]()
    for url in urls:
        found = table_or_ids(url, column)
        ids.update(ids_of(found.parts) if isinstance(found, GradientTable) else found)
    return sorted(ids)


def ids_of(parts: Sequence[Part]) -> list[str]:
    """The ids in some files, in their order."""
    return list(read_columns(parts, ["id"])["id"].to_pylist())


def _holds_parquet(url: str, folder: Folder) -> bool:
    return Folder.holding(url)[0].has(last_name(url)) or any(map(is_parquet, folder.files()))


def _kind_of(parts: Sequence[Part], column: str) -> pa.FixedSizeListType:
    """What features are read as: of the widest of the files' types, with as many dimensions as the first has."""
    elements = []
    for part in parts:
        for needed in ("id", column):
            if needed not in part.columns:
                raise UserError(
                    f"{part} has no column {needed!r}; it has {', '.join(part.columns)}."
                    " --feature-column names the column with the features"
                )
        held = part.schema.field(column).type
        element = vector_type(held)
        if element is None:
            raise UserError(f"the column {column!r} of {part} is {held}, not lists of numbers")
        elements.append(np.dtype(element.to_pandas_dtype()))
    read = [_read_as(element) for element in elements]
    kind = parts[0].schema.field(column).type
    if pa.types.is_fixed_size_list(kind):
        dimension = kind.list_size
    else:
        file = pq.ParquetFile(parts[0].name, filesystem=parts[0].folder.system)
        first = next(file.iter_batches(1, columns=[column]))
        dimension = vectors(pa.chunked_array([first.column(0)])).shape[1]
    return pa.list_(pa.from_numpy_dtype(max(read, key=lambda one: one.itemsize)), dimension)


def by_source(table: GradientTable) -> list[GradientTable]:
    """One table for every source of this one, made of the files it occurs in."""
    found: dict[str, list[Part]] = {}
    for part in table.parts:  # one short column, a file at a time
        for entry in read_columns([part], ["source"])["source"].value_counts().to_pylist():
            found.setdefault(entry["values"], []).append(replace(part, rows=entry["counts"]))
    return [replace(table, name=name, source=name, parts=tuple(found[name])) for name in sorted(found)]


def same_fingerprint(tables: Sequence[GradientTable], but: Sequence[str] = ()) -> None:
    """Refuse to compare tables whose numbers were made differently; the message names the field.

    Fields named in ``but`` may differ.
    """
    first = tables[0]
    for other in tables[1:]:
        if first.dimension != other.dimension:
            raise UserError(
                f"{first.name} has {first.dimension} dimensions and {other.name} {other.dimension}:"
                " distances compare only within one dimension"
            )
        if first.fingerprint is None or other.fingerprint is None:
            continue
        one, two = ({k: v for k, v in made.items() if k not in but} for made in (first.fingerprint, other.fingerprint))
        if difference := runs.first_difference(one, two):
            name, before, now = difference
            raise UserError(
                f"{first.name} and {other.name} cannot be compared: their {name} differs ({before} and {now})."
                " Extract both with the same options"
            )
