"""What a selection takes into account beside its table: what is owned, what is excluded, the scale of quality."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.dpp.objective import Score, robust_scale
from raydpp.errors import UserError
from raydpp.ingest.files import RawFile, read_rows
from raydpp.ingest.rows import kind_of
from raydpp.select.request import numbers
from raydpp.storage import Folder
from raydpp.tables import (
    GradientTable,
    Part,
    counted,
    open_table,
    parquet_at,
    read_columns,
    same_fingerprint,
    vectors,
)


@dataclass(frozen=True, eq=False)
class Owned:
    """What is there already, and what is never to be picked.

    Attributes:
        features: A reference to the (O, D) features of what is there; None if nothing is.
        count: O.
        excluded: The ids of both, as they are not to be picked.
        unknown: How many ids of what is there are in no table: they cannot be taken into account.
    """

    features: Any
    count: int
    excluded: pa.Array
    unknown: int = 0


def find_owned(owned: Sequence[str], exclude: Sequence[str], table: GradientTable) -> Owned:
    """Read what is owned and excluded: output folders of extract or select, Parquet files, or files of ids.

    A file of ids holds one a line, or JSON lines with an ``id``. Features come from the tables named, or for bare ids
    from the table itself.

    Raises:
        UserError: A file that is not there or has no ids, or a table whose numbers were made differently.
    """
    import ray

    tables, ids = [], set[str]()
    for url in owned:
        found = _table_or_ids(url, table.column)
        if isinstance(found, GradientTable):
            tables.append(found)
        else:
            ids.update(found)
    same_fingerprint([table, *tables])
    shut = set[str]()
    for url in exclude:
        listed = _table_or_ids(url, table.column)
        shut.update(_ids_of(listed.parts) if isinstance(listed, GradientTable) else listed)
    if not owned:
        return Owned(None, 0, pa.array(sorted(shut), pa.string()))
    task: Any = ray.remote(num_returns=2)(_owned_features)
    features, facts = task.remote(table, tables, sorted(ids))
    known, unknown, count = ray.get(facts)
    return Owned(features, count, pa.array(sorted(shut | ids | set(known)), pa.string()), unknown)


def quality_scales(table: GradientTable, scores: Sequence[Score]) -> tuple[Score, ...]:
    """The same scores with the center and scale of their columns over the whole table, read by a task."""
    import ray

    if not scores:
        return ()
    columns = [score.column for score in scores]
    own = [name for name in columns if name not in table.scored]
    read_columns(table.parts[:1], own)  # says in words where there is no such column
    scales = ray.get(ray.remote(_scales).remote(table, columns))
    return tuple(replace(score, center=c, scale=s) for score, (c, s) in zip(scores, scales, strict=True))


def source_counts(table: GradientTable) -> dict[str, int]:
    """How many rows of a table each source has; one short column, a file at a time."""
    counts: dict[str, int] = {}
    for part in table.parts:
        for entry in read_columns([part], ["source"])["source"].value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts


def _table_or_ids(url: str, column: str) -> GradientTable | list[str]:
    folder, name = Folder.holding(url)
    if Folder.at(url).names() is not None:
        return open_table(url, column)
    if url.endswith(".parquet"):
        parts = parquet_at(url)
        return open_table(url, column) if column in parts[0].columns else _ids_of(parts)
    text = folder.read_text(name)
    if text is None:
        raise UserError(f"there is no file or folder {url}: give a run's folder, a Parquet file or a file of ids")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if url.endswith((".jsonl", ".ndjson")):
        try:
            return [str(json.loads(line)["id"]) for line in lines]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{url} is not JSON lines with an id in each: {error!r}") from error
    return lines


def _ids_of(parts: Sequence[Part]) -> list[str]:
    return [str(one) for one in read_columns(parts, ["id"])["id"].to_pylist()]


def _owned_features(
    table: GradientTable, tables: Sequence[GradientTable], ids: Sequence[str]
) -> tuple[np.ndarray, tuple[list[str], int, int]]:
    """(O, D) features in the order of ids, and: the ids found in tables, how many were not found, O."""
    found = []
    for other in tables:
        rows = read_columns(other.parts, ["id", other.column])
        found.append(rows.rename_columns(["id", "features"]))
    known = [str(one) for rows in found for one in rows["id"].to_pylist()]
    missing = pa.array(sorted(set(ids) - set(known)), pa.string())
    for part in table.parts:
        rows = read_columns([part], ["id", table.column]).rename_columns(["id", "features"])
        found.append(rows.filter(pc.is_in(rows["id"], missing)))
    everything = pa.concat_tables(found, promote_options="permissive").sort_by("id")
    everything = everything.take(pa.array(np.unique(everything["id"].to_numpy(), return_index=True)[1]))
    unknown = len(set(ids) - set(everything["id"].to_pylist()))
    return vectors(everything["features"]), (known, unknown, len(everything))


def _scales(table: GradientTable, columns: Sequence[str]) -> list[tuple[float, float]]:
    rows = table.read_columns(table.parts, columns)
    return [robust_scale(numbers(rows, column)) for column in columns]


log = logging.getLogger(__name__)

_BATCH = 65_536  # rows of a text file that are Python objects at a time
_BLOCK = 2**20  # bytes


def digest(file: RawFile) -> str:
    """A hash of a file's bytes (hex): scores are edited in place, often without a change of size."""
    found = hashlib.blake2b(digest_size=16)
    with file.folder.system.open_input_stream(file.name, compression=None) as stream:
        while block := stream.read(_BLOCK):
            found.update(block)
    return found.hexdigest()


def join_scores(
    table: GradientTable, files: Sequence[RawFile], columns: Sequence[str], excluded: pa.Array
) -> GradientTable:
    """The table with those of some columns that the files hold; they go to the object store once.

    Args:
        table: What is joined with them.
        files: Of scores; none is no change.
        columns: Their names, in the table or in the files.
        excluded: The ids that need no score.

    Raises:
        UserError: A file that holds no such scores, a column that the table has too, an id with two scores or none.
    """
    import ray

    if not files:
        return table
    scores = read_scores(files, columns)
    scored = tuple(scores.column_names[1:])
    if both := [name for name in scored if table.has(name)]:
        raise UserError(f"--scores and {table.name} both have the column {both[0]!r}: give one of them another name")
    kept = ray.put(scores)
    if unused := len(scores) - ray.get(ray.remote(_check).remote(table, kept, excluded)):
        log.info("select: %d of the %d ids in --scores are not in the table: they are ignored", unused, len(scores))
    return replace(table, scores=kept, scored=scored)


def read_scores(files: Sequence[RawFile], columns: Sequence[str]) -> pa.Table:
    """id and those of some columns that the files hold, in the order of ids, without ids that lack one of them.

    A column may be spread over files, and each file may hold another one.
    """
    held: dict[str, list[pa.Table]] = {}
    for file in files:
        found = _read(file, [name for name in dict.fromkeys(columns) if name != "id"])
        for name in found.column_names[1:]:
            held.setdefault(name, []).append(found.select(["id", name]).drop_null())
    tables = []
    for name, parts in held.items():
        whole = pa.concat_tables(parts).combine_chunks()
        counts = whole["id"].value_counts()
        if len(counts) < len(whole):
            twice = counts.filter(pc.greater(counts.field("counts"), 1))[0]["values"]
            raise UserError(f"--scores have the id {twice} twice with {name!r}: keep one number for each id")
        tables.append(whole)
    return functools.reduce(lambda one, other: one.join(other, "id", join_type="inner"), tables).sort_by("id")


def _check(table: GradientTable, scores: pa.Table, excluded: pa.Array) -> int:
    """How many scores belong to the table; each of its examples that may be picked must have one."""
    ids = read_columns(table.parts, ["id"])["id"].cast(pa.string())
    without = ids.filter(pc.invert(pc.or_(pc.is_in(ids, scores["id"]), pc.is_in(ids, excluded))))
    if len(without):
        raise UserError(
            f"{len(without):,} of the {table.rows:,} examples of {table.name} have no"
            f" {' or no '.join(map(repr, scores.column_names[1:]))} in --scores, such as {without[0]}: give each a"
            " number, or name them to --exclude"
        )
    return int(pc.sum(pc.is_in(scores["id"], ids)).as_py() or 0)


def _read(file: RawFile, columns: Sequence[str]) -> pa.Table:
    """id as text and some columns, at least one, of one file as float64."""
    kind, url = kind_of(file.name), file.url
    parts = list(_parquet(file, columns) if kind and kind.suffix == ".parquet" else _text(file, columns))
    names = list(dict.fromkeys(name for names, _ in parts for name in names))
    if "id" not in names:
        raise UserError(f"{url} has no column 'id' to join its scores by; it has {', '.join(names) or 'no rows'}")
    wanted = [name for name in columns if name in names]
    if not wanted:
        raise UserError(
            f"{url} has {', '.join(names)}, but --quality and --cost-column name {', '.join(columns)}: name one of its"
            " columns, or leave it out"
        )
    rows = pa.concat_tables([part.select(["id", *wanted]) for _, part in parts])
    if rows["id"].null_count:
        raise UserError(f"{rows['id'].null_count} rows of {url} have no id: give each one, or drop them")
    return rows


def _parquet(file: RawFile, columns: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    """The names of all columns, and what there is of id and some columns."""
    part = counted(Part(file.folder, file.name))
    names = part.columns
    rows = part.read([name for name in ("id", *columns) if name in names])
    ids = {"id": pc.cast(rows["id"], pa.string())} if "id" in names else {}
    yield names, pa.table({**ids, **{name: _floats(rows[name], file.url, name) for name in columns if name in names}})


def _text(file: RawFile, columns: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    """The same, of one batch of rows after the other; what a row lacks or leaves empty is null."""
    rows, url = read_rows(file), file.url
    while batch := list(islice(rows, _BATCH)):
        values = []
        for raw in batch:
            if raw.value is None:
                raise UserError(f"{url}, row {raw.row + 1}: {raw.reason}")
            values.append({name: None if value == "" else value for name, value in raw.value.items()})
        ids = [None if value.get("id") is None else str(value["id"]) for value in values]
        held = {name: _floats([value.get(name) for value in values], url, name) for name in columns}
        yield (
            list(dict.fromkeys(name for row in values for name in row)),
            pa.table({"id": pa.array(ids, pa.string()), **held}),
        )


def _floats(values: Any, url: str, name: str) -> Any:
    try:
        return pc.cast(pa.array(values) if isinstance(values, list) else values, pa.float64())
    except (pa.ArrowException, OverflowError) as error:
        raise UserError(f"the column {name!r} of {url} does not hold numbers: {error}") from error
