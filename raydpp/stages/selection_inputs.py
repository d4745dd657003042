"""What a selection takes into account beside its table: what is owned, what is excluded, the scale of quality."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpp import store
from raydpp.errors import UserError
from raydpp.filesystem import resolve
from raydpp.selection.budget import OTHERS
from raydpp.selection.partition import numbers
from raydpp.selection.quality import Score, robust_scale
from raydpp.stages.tables import GradientTable, open_table, same_fingerprint
from raydpp.store import Part


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
    store.read_columns(table.parts[:1], own)  # says in words where there is no such column
    scales = ray.get(ray.remote(_scales).remote(table, columns))
    return tuple(replace(score, center=c, scale=s) for score, (c, s) in zip(scores, scales, strict=True))


def parse_quotas(option: str, texts: Sequence[str], size: int | None) -> dict[str, float]:
    """``SOURCE=NUMBER`` or ``SOURCE=FRACTION`` of the size, ``*`` for every other source: -> counts."""
    quotas: dict[str, float] = {}
    for text in texts:
        source, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not source or number < 0 or (number > 1 and number != int(number)):
            raise UserError(f"{option} {text}: give SOURCE=NUMBER, or SOURCE=FRACTION below 1, or *=... for the others")
        if 0 < number < 1:
            if size is None:
                raise UserError(f"{option} {text}: a fraction is one of --size, which is not given")
            number = float(np.ceil(number * size - 1e-9) if option == "--minimum" else np.floor(number * size + 1e-9))
        quotas[source] = number
    return quotas


def source_counts(table: GradientTable) -> dict[str, int]:
    """How many rows of a table each source has; one short column, a file at a time."""
    counts: dict[str, int] = {}
    for part in table.parts:
        for entry in store.read_columns([part], ["source"])["source"].value_counts().to_pylist():
            counts[entry["values"]] = counts.get(entry["values"], 0) + entry["counts"]
    return counts


def expand_quotas(quotas: dict[str, float], sources: Sequence[str], option: str) -> dict[str, float]:
    """Quotas with ``*`` written out; a source that the table does not have is refused."""
    if unknown := [source for source in quotas if source != OTHERS and source not in sources]:
        raise UserError(f"{option} names the source {unknown[0]!r}; the table has {', '.join(sorted(sources))}")
    others = dict.fromkeys(sources, quotas[OTHERS]) if OTHERS in quotas else {}
    return others | {source: count for source, count in quotas.items() if source != OTHERS}


def _table_or_ids(url: str, column: str) -> GradientTable | list[str]:
    if store.names_in(url) is not None:
        return open_table(url, column)
    if url.endswith(".parquet"):
        parts = store.parquet_parts(url)
        system, path = resolve(url)
        if column in pq.read_schema(path, filesystem=system).names:
            return open_table(url, column)
        return _ids_of(parts)
    text = store.read_text(url)
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
    return [str(one) for one in store.read_columns(parts, ["id"])["id"].to_pylist()]


def _owned_features(
    table: GradientTable, tables: Sequence[GradientTable], ids: Sequence[str]
) -> tuple[np.ndarray, tuple[list[str], int, int]]:
    """(O, D) features in the order of ids, and: the ids found in tables, how many were not found, O."""
    found = []
    for other in tables:
        rows = store.read_columns(other.parts, ["id", other.column])
        found.append(rows.rename_columns(["id", "features"]))
    known = [str(one) for rows in found for one in rows["id"].to_pylist()]
    missing = pa.array(sorted(set(ids) - set(known)), pa.string())
    for part in table.parts:
        rows = store.read_columns([part], ["id", table.column]).rename_columns(["id", "features"])
        found.append(rows.filter(pc.is_in(rows["id"], missing)))
    everything = pa.concat_tables(found, promote_options="permissive").sort_by("id")
    everything = everything.take(pa.array(np.unique(everything["id"].to_numpy(), return_index=True)[1]))
    unknown = len(set(ids) - set(everything["id"].to_pylist()))
    return store.vectors(everything["features"]), (known, unknown, len(everything))


def _scales(table: GradientTable, columns: Sequence[str]) -> list[tuple[float, float]]:
    rows = table.read_columns(table.parts, columns)
    return [robust_scale(numbers(rows, column)) for column in columns]
