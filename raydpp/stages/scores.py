"""A user's own scores: files of ids and numbers, joined to a gradient table by id as its rows are read."""

from __future__ import annotations

import functools
import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpp import store
from raydpp.corpus.files import RawFile, read_rows
from raydpp.corpus.rows import kind_of
from raydpp.errors import UserError
from raydpp.filesystem import resolve
from raydpp.stages.tables import GradientTable

log = logging.getLogger(__name__)

_BATCH = 65_536  # rows of a text file that are Python objects at a time
_BLOCK = 2**20  # bytes


def digest(file: RawFile) -> str:
    """A hash of a file's bytes (hex): scores are edited in place, often without a change of size."""
    system, path = resolve(file.url)
    found = hashlib.blake2b(digest_size=16)
    with system.open_input_stream(path, compression=None) as stream:
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
        found = _read(file.url, [name for name in dict.fromkeys(columns) if name != "id"])
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
    ids = store.read_columns(table.parts, ["id"])["id"].cast(pa.string())
    without = ids.filter(pc.invert(pc.or_(pc.is_in(ids, scores["id"]), pc.is_in(ids, excluded))))
    if len(without):
        raise UserError(
            f"{len(without):,} of the {table.rows:,} examples of {table.name} have no"
            f" {' or no '.join(map(repr, scores.column_names[1:]))} in --scores, such as {without[0]}: give each a"
            " number, or name them to --exclude"
        )
    return int(pc.sum(pc.is_in(scores["id"], ids)).as_py() or 0)


def _read(url: str, columns: Sequence[str]) -> pa.Table:
    """id as text and some columns, at least one, of one file as float64."""
    kind = kind_of(resolve(url)[1])
    parts = list(_parquet(url, columns) if kind and kind.suffix == ".parquet" else _text(url, columns))
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


def _parquet(url: str, columns: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    """The names of all columns, and what there is of id and some columns."""
    system, path = resolve(url)
    parts = store.parquet_parts(url)
    names = list(pq.read_schema(path, filesystem=system).names)
    rows = store.read_columns(parts, [name for name in ("id", *columns) if name in names])
    ids = {"id": pc.cast(rows["id"], pa.string())} if "id" in names else {}
    yield names, pa.table({**ids, **{name: _floats(rows[name], url, name) for name in columns if name in names}})


def _text(url: str, columns: Sequence[str]) -> Iterator[tuple[list[str], pa.Table]]:
    """The same, of one batch of rows after the other; what a row lacks or leaves empty is null."""
    rows = read_rows(url)
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
