"""What a selection takes into account beside its table: what is owned, what is excluded, the scale of quality."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.cluster import Here
from raydpp.dpp.objective import Objective, Score, quantile_scale, robust_scale
from raydpp.errors import UserError
from raydpp.select.request import Request, numbers
from raydpp.storage import Folder
from raydpp.tables import (
    GradientTable,
    Part,
    concatenated,
    ids_named,
    partition_count,
    partition_files,
    read_columns,
    same_fingerprint,
    table_or_ids,
    vectors,
    with_vectors,
)

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

    from raydpp.select.partition_cache import PartitionCache

log = logging.getLogger(__name__)

ROWS_PER_PARTITION = 65_536
_LEAST_ROWS = 4_096
_SAMPLE = 4_000  # rows that tell how far diversity tells examples apart
_ENOUGH_SHARDS = 64  # from here on, shards get more threads: each costs the rounds a call and some candidates

_READ = "Parquet, CSV, TSV, JSON or JSON lines, each also compressed (.gz, .zst, .bz2)"


@dataclass(frozen=True, eq=False)
class Owned:
    """What is there already, and what is never to be picked."""

    features: Any  # a reference to the (O, D) features of what is there; None if nothing is
    count: int  # O
    excluded: pa.Array  # the ids of both, as they are not to be picked
    unknown: int = 0  # how many ids of what is there are in no table: they cannot be taken into account

    @classmethod
    def nothing(cls) -> Owned:
        return cls(None, 0, pa.array([], pa.string()))


@dataclass(frozen=True, eq=False)
class SelectionJob:
    """A selection from a table, and where its tasks run."""

    table: GradientTable
    partitions: list[list[Part]]  # the table's files
    request: Request
    given: Owned
    title: str  # of progress bars and messages
    tasks: Here
    targets: Sequence[GradientTable] = ()  # what to aim at
    cache: PartitionCache | None = None  # of what partitions picked

    @property
    def partition_rows(self) -> list[int]:
        """How many rows each partition has."""
        return [sum(part.rows for part in parts) for parts in self.partitions]


def partitioned(
    table: GradientTable, partitions: int | None, exact: bool, tasks: Here, stable: bool = False
) -> list[list[Part]]:
    """A table's files in so many partitions; by default one for every ``ROWS_PER_PARTITION`` rows, or for exact rounds
    one for every CPU that has a few thousand rows to work on, or every node where there are many.

    ``stable``: filled one after the other in the order in which the files came, so that what comes to a table later
    changes the last one alone.
    """
    if stable:
        groups: list[list[Part]] = [[]]
        for part in sorted(table.parts, key=lambda part: part.name.rpartition("-")[2]):  # the owner's token: a time
            if groups[-1] and sum(one.rows for one in groups[-1]) + part.rows > ROWS_PER_PARTITION:
                groups.append([])
            groups[-1].append(part)
        return groups
    if partitions is None and exact:
        partitions = min(tasks.cpus, max(tasks.nodes, _ENOUGH_SHARDS), partition_count(table.rows, _LEAST_ROWS))
    return partition_files(table.parts, partitions or partition_count(table.rows, ROWS_PER_PARTITION))


def find_owned(tasks: Here, owned: Sequence[str], exclude: Sequence[str], table: GradientTable) -> Owned:
    """Read what is owned and excluded: output folders of extract or select, Parquet files, or files of ids.

    A file of ids holds one a line, or JSON lines with an ``id``. Features come from the tables named, or for bare ids
    from the table itself.

    Raises:
        UserError: A file that is not there or has no ids, or a table whose numbers were made differently.
    """
    tables, ids = [], set[str]()
    for url in owned:
        found = table_or_ids(url, table.column)
        if isinstance(found, GradientTable):
            tables.append(found)
        else:
            ids.update(found)
    same_fingerprint([table, *tables])
    blocked = ids_named(exclude, table.column)
    if exclude:
        known = tasks.get(tasks.submit(_count_ids, table, blocked))
        if known < len(blocked):
            few = "none" if not known else f"{known:,}"
            log.warning("select: %s of the %s ids to exclude are in %s", few, f"{len(blocked):,}", table.name)
    if not owned:
        return Owned(None, 0, pa.array(blocked, pa.string()))
    features, facts = tasks.submit(_owned_features, table, tables, sorted(ids), returns=2)
    known, unknown, count = tasks.get(facts)
    return Owned(features, count, pa.array(sorted({*blocked, *ids, *known}), pa.string()), unknown)


def check_tokens(tasks: Here, table: GradientTable, cost: str, tokens: int, excluded: pa.Array) -> None:
    """UserError where a budget of tokens buys nothing, before the search for it."""
    least = tasks.get(tasks.submit(_least_cost, table, cost, excluded))
    if least > tokens:
        raise UserError(f"--tokens {tokens}: the cheapest example costs {least:,.0f} ({cost}), so that nothing fits")


def fit_objective(
    tasks: Here, table: GradientTable, objective: Objective, auto: bool, spread: bool, size: int | None = None
) -> Objective:
    """The same with what a sample of the table tells, in one task.

    With ``auto`` the gamma of an rbf kernel; with ``spread`` the unit of quality, that of log residuals after ``size``
    picks, where the weight leaves room for both.
    """
    auto, spread = auto and objective.kernel.name == "rbf", spread and 0 < objective.quality_weight < 1
    return tasks.get(tasks.submit(_fit, table, objective, auto, spread, size)) if auto or spread else objective


def _fit(table: GradientTable, objective: Objective, auto: bool, spread: bool, size: int | None) -> Objective:
    from raydpp.dpp.scale import MOST_PICKS, PAIRS_OF, median_gamma, residual_spread

    features = table.sample(_SAMPLE if spread else PAIRS_OF)  # (n, D)
    if auto:
        objective = replace(objective, kernel=replace(objective.kernel, gamma=median_gamma(features)))
    if spread:
        objective = replace(objective, quality_unit=residual_spread(features, size or MOST_PICKS, objective.kernel))
    return objective


def quality_scales(
    tasks: Here, table: GradientTable, scores: Sequence[Score], quantiles: bool = False
) -> tuple[Score, ...]:
    """The same scores with the center and scale of their columns over the whole table, read by a task.

    With ``quantiles`` those that make them 0 to 1 between two quantiles (``objective.QUANTILES``).
    """
    if not scores:
        return ()
    columns = [score.column for score in scores]
    own = [name for name in columns if name not in table.scored]
    read_columns(table.parts[:1], own)  # refuses a column that is not there
    scales = tasks.get(tasks.submit(_scales, table, columns, quantiles))
    return tuple(
        replace(score, center=c, scale=s, bounded=quantiles) for score, (c, s) in zip(scores, scales, strict=True)
    )


def source_counts(table: GradientTable) -> dict[str, int]:
    """How many rows of a table each source has; one short column, a file at a time."""
    counts: dict[str, int] = {}
    for part in table.parts:
        for entry in read_columns([part], ["source"])["source"].value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts


def _owned_features(
    table: GradientTable, tables: Sequence[GradientTable], ids: Sequence[str]
) -> tuple[np.ndarray, tuple[list[str], int, int]]:
    """(O, D) features in the order of ids, and: the ids found in tables, how many were not found, O."""
    found = []
    for other in tables:
        for part in other.parts:
            rows = with_vectors(part.read(["id", other.column]), other.column, table.kind, part)
            found.append(rows.rename_columns(["id", "features"]))
    known = [one for rows in found for one in rows["id"].to_pylist()]
    missing = pa.array(sorted(set(ids) - set(known)), pa.string())
    for part in table.parts:
        rows = with_vectors(part.read(["id", table.column]), table.column, table.kind, part)
        rows = rows.rename_columns(["id", "features"])
        found.append(rows.filter(pc.is_in(rows["id"], missing)))
    everything = concatenated(found).sort_by("id")
    everything = everything.take(pa.array(np.unique(everything["id"].to_numpy(), return_index=True)[1]))
    unknown = len(set(ids) - set(everything["id"].to_pylist()))
    return vectors(everything["features"]), (known, unknown, len(everything))


def _count_ids(table: GradientTable, ids: Sequence[str]) -> int:
    """How many of some ids a table has, a file at a time."""
    wanted = pa.array(ids, pa.string())
    return sum(pc.sum(pc.is_in(part.read(["id"])["id"], wanted)).as_py() for part in table.parts)


def _least_cost(table: GradientTable, cost: str, excluded: pa.Array) -> float:
    least = np.inf
    for part in table.parts:
        rows = table.read_columns([part], ["id", cost])
        rows = rows.filter(pc.invert(pc.is_in(rows["id"], excluded)))
        least = min(least, numbers(rows, cost).min(initial=np.inf))
    return 0.0 if least == np.inf else float(least)  # nothing is left to pick from: the search says so


def _scales(table: GradientTable, columns: Sequence[str], quantiles: bool) -> list[tuple[float, float]]:
    rows, scale = table.read_columns(table.parts, columns), quantile_scale if quantiles else robust_scale
    return [scale(numbers(rows, column)) for column in columns]


def score_files(urls: Sequence[str]) -> list[Part]:
    """The files of scores that URLs mean: themselves, or those below them where they are folders."""
    files = []
    for url in urls:
        folder, name = Folder.holding(url)
        names = [name] if folder.has(name) else (folder := Folder.at(url)).files()
        found = [Part(folder, one) for one in names if not one.rpartition("/")[2].startswith((".", "_"))]
        if not found:
            raise UserError(f"there is no file at {url}: --scores takes {_READ}, or folders of them")
        files += found
    for part in files:
        _format(part)
    return files


def digest(file: Part) -> str:
    """A hash of a file's bytes (hex): scores are edited in place, often without a change of size."""
    found = hashlib.blake2b(digest_size=16)
    with file.folder.system.open_input_stream(file.name, compression=None) as stream:
        while block := stream.read(2**20):
            found.update(block)
    return found.hexdigest()


def join_scores(
    tasks: Here, table: GradientTable, files: Sequence[Part], columns: Sequence[str], excluded: pa.Array
) -> GradientTable:
    """The table with those of some columns that the files hold; ids in ``excluded`` need no score.

    Raises:
        UserError: A file that holds no such scores, a column that the table has too, an id with two scores or none.
    """
    if not files:
        return table
    scores = read_scores(files, columns)
    scored = tuple(scores.column_names[1:])
    if both := [name for name in scored if table.has(name)]:
        raise UserError(f"--scores and {table.name} both have the column {both[0]!r}: give one of them another name")
    kept = tasks.put(scores)
    if unused := len(scores) - tasks.get(tasks.submit(_check, table, kept, excluded)):
        log.info("select: %d of the %d ids in --scores are not in the table: they are ignored", unused, len(scores))
    return replace(table, scores=kept, scored=scored)


def read_scores(files: Sequence[Part], columns: Sequence[str]) -> pa.Table:
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
    ids = read_columns(table.parts, ["id"])["id"]
    without = ids.filter(pc.invert(pc.or_(pc.is_in(ids, scores["id"]), pc.is_in(ids, excluded))))
    if len(without):
        raise UserError(
            f"{len(without):,} of the {table.rows:,} examples of {table.name} have no"
            f" {' or no '.join(map(repr, scores.column_names[1:]))} in --scores, such as {without[0]}: give each a"
            " number, or name them to --exclude"
        )
    return int(pc.sum(pc.is_in(scores["id"], ids)).as_py() or 0)


def _read(file: Part, columns: Sequence[str]) -> pa.Table:
    """id as text and some columns, at least one, of one file as float64."""
    try:
        held = _dataset(file, columns)
    except (pa.ArrowException, ValueError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    names = held.schema.names
    if "id" not in names:
        raise UserError(f"{file} has no column 'id' to join its scores by; it has {', '.join(names) or 'no rows'}")
    wanted = [name for name in columns if name in names]
    if not wanted:
        raise UserError(
            f"{file} has {', '.join(names)}, but --quality and --cost-column name {', '.join(columns)}: name one of its"
            " columns, or leave it out"
        )
    rows = held.to_table(["id", *wanted])
    for place, name in enumerate(rows.column_names):
        try:
            rows = rows.set_column(place, name, pc.cast(rows[name], pa.float64() if place else pa.string()))
        except pa.ArrowException as error:
            raise UserError(f"the column {name!r} of {file} does not hold numbers: {error}") from error
    if rows["id"].null_count:
        raise UserError(f"{rows['id'].null_count} rows of {file} have no id: give each one, or drop them")
    return rows


def _format(file: Part) -> str:
    """csv, tsv, json (lines, or one array) or parquet, by the name's ending."""
    suffixes = [suffix for suffix in file.name.lower().split(".")[1:] if suffix not in ("gz", "zst", "bz2")]
    kind = {"ndjson": "json", "jsonl": "json"}.get(suffixes[-1], suffixes[-1]) if suffixes else ""
    if kind not in ("csv", "tsv", "json", "parquet"):
        raise UserError(f"{file} has an unknown ending: --scores takes {_READ}")
    return kind


def _dataset(file: Part, columns: Sequence[str]) -> Dataset:
    """A file, compressed or not; where it is CSV, ids and these columns are text, and what is empty is null."""
    from pyarrow import csv, dataset
    from pyarrow import json as json_lines

    system, kind = file.folder.system, _format(file)
    if kind == "parquet":
        return dataset.dataset(file.name, format="parquet", filesystem=system)
    if kind == "json":
        with system.open_input_stream(file.name) as stream:
            content = stream.read()
        if content.lstrip()[:1] == b"[":
            return dataset.dataset(pa.Table.from_pylist(json.loads(content)))
        return dataset.dataset(json_lines.read_json(pa.BufferReader(content)) if content.strip() else pa.table({}))
    form = dataset.CsvFileFormat(
        csv.ParseOptions(delimiter="," if kind == "csv" else "\t", newlines_in_values=True),
        convert_options=csv.ConvertOptions(
            column_types=dict.fromkeys(["id", *columns], pa.string()), null_values=[""], strings_can_be_null=True
        ),
    )
    return dataset.dataset(file.name, format=form, filesystem=system)
