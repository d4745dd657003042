"""OUT/map: where examples lie beside each other, with their texts, and the section of the report that shows it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.cluster import Here
from raydpp.diversity.plane import principal_plane
from raydpp.report.html import Section
from raydpp.report.map import LONGEST, map_figure
from raydpp.select.inputs import SelectionJob
from raydpp.select.outputs import read_texts
from raydpp.select.request import Picked
from raydpp.storage import Folder
from raydpp.tables import NO_SOURCE, GradientTable, concatenated, vectors, write_table

MOST = 20_000
"""The most points of a map."""

_MAP = "map/map.parquet"


def selection_map(job: SelectionJob, picked: Picked, corpus: Folder | None, out: Folder) -> Section:
    """A selection among what it was selected from: OUT/map and its section.

    Of more than ``MOST`` examples the picks, in their order as far as there is room, and a sample of the rest.
    """
    tasks, table = job.tasks, job.table
    picks = _features(picked.rows.slice(0, MOST), table.column)
    skipped = pa.concat_arrays([pa.array(picked.rows["id"].to_pylist(), pa.string()), job.given.excluded])
    rest = tasks.submit(draw, table, MOST - len(picks), tasks.put(skipped))
    points, explained = place(tasks, [tasks.put(picks), rest], [table])
    ranks = [*range(1, len(picks) + 1), *[None] * (len(points) - len(picks))]
    points = points.append_column("rank", pa.array(ranks, pa.int64()))
    texts = read_texts(tasks, corpus, points["id"].to_pylist(), LONGEST) if corpus else {}
    of = f"{len(points):,} of {table.rows:,}" if len(points) < table.rows else f"all {len(points):,}"
    lead = f"Each point is an example, {of}; picked ones are larger, and their colour is the pick number."
    return show(out, points, texts, explained, lead)


def draw(table: GradientTable, rows: int, skipped: pa.Array) -> pa.Table:
    """id, source and features of at most so many rows of a table: a sample from some of its files, without some ids."""
    held = _features(table.read(table.some_parts(2 * rows)), table.column)
    held = held.filter(pc.invert(pc.is_in(held["id"], skipped)))
    return held.take(pa.array(np.sort(np.random.default_rng(0).permutation(len(held))[:rows])))


def place(tasks: Here, drawn: Sequence[Any], tables: Sequence[GradientTable]) -> tuple[pa.Table, float]:
    """Rows, by references, with x and y in place of features; the share of the features' variance that these hold."""
    rows, entries = min(MOST, sum(table.rows for table in tables)), tables[0].dimension
    memory = rows * entries * (4 + 3 * tables[0].kind.value_type.bit_width // 8)
    found: tuple[pa.Table, float] = tasks.get(tasks.submit(_place, *drawn, memory=memory))
    return found


def _place(*drawn: pa.Table) -> tuple[pa.Table, float]:
    plane = principal_plane([vectors(rows["features"]) for rows in drawn if len(rows)])
    rows = concatenated([rows.drop_columns("features") for rows in drawn])
    x, y = plane.points.T
    return rows.append_column("x", pa.array(x)).append_column("y", pa.array(y)), plane.explained


def show(
    out: Folder, points: pa.Table, texts: Mapping[str, str], explained: float, lead: str, kind: str = "source"
) -> Section:
    """Write OUT/map, with the id of an example whose text is not known in its place; the section of the report.

    ``points`` have id, x, y, the column ``kind`` that tells them apart, and may have ``rank``.
    """
    ids = points["id"].to_pylist()
    points = points.append_column("text", pa.array([texts.get(one, one) for one in ids]))
    if kind not in points.column_names:
        points = points.append_column(kind, pa.repeat(NO_SOURCE, len(points)))
    ranks = points["rank"].to_pylist() if "rank" in points.column_names else None
    order = [name for name in ("id", "x", "y", "table", "source", "rank", "text") if name in points.column_names]
    write_table(out, _MAP, points.select(order))
    x, y, names, shown = (points[name] for name in ("x", "y", kind, "text"))
    figure = map_figure(x.to_numpy(), y.to_numpy(), names.to_pylist(), shown.to_pylist(), ranks, kind=kind)
    text = (
        f"{lead} Places are the first two principal components of the features, which hold {explained:.1%} of their"
        " variance: what is far apart here differs, what is close may differ in other directions.\n\nHover over a point"
        f" to read how it begins, click to keep it below. Click a {kind} in the legend to show it alone, and again for"
        f" all. Scroll to zoom, drag to move, double-click to reset. {_MAP} has the points, for embedding-atlas too."
    )
    return Section("Map", text, figures=[figure])


def _features(rows: pa.Table, column: str) -> pa.Table:
    """id, features, and source where there is one."""
    kept = {name: rows[name] for name in ("id", "source") if name in rows.column_names}
    return pa.table({**kept, "features": rows[column]})
