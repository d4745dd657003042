"""What a selection leaves out: OUT/redundancy, with the selected example nearest to each, and how much it explains."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.diversity.redundancy import redundancy
from raydpp.dpp.kernels import Kernel
from raydpp.progress import progress_bar
from raydpp.report.table import Table
from raydpp.select.inputs import SelectionJob
from raydpp.select.request import Picked
from raydpp.storage import Folder
from raydpp.tables import GradientTable, Part, vectors, write_table

log = logging.getLogger(__name__)

REDUNDANCY = "redundancy"
_CHEAP = 7e11  # operations; about a minute of one core
_SHOWN = 20  # pairs


@dataclass(frozen=True)
class LeftOut:
    """Of the examples that were neither picked, owned nor excluded."""

    rows: int
    half: int  # of how many the selection explains more than half of the variance
    most: int  # more than nine tenths
    pairs: tuple[dict[str, Any], ...]  # the most redundant ones beside their nearest pick

    def __str__(self) -> str:
        rows = max(1, self.rows)
        return (
            f"of {self.rows:,} left out, the selection explains {self.half / rows:.1%} by more than half, and"
            f" {self.most / rows:.1%} by more than nine tenths"
        )

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return {name: value for name, value in asdict(self).items() if name != "pairs"}

    @property
    def table(self) -> Table:
        """The pairs, for people."""
        headings = ["left out", "source", "nearest selected", "its source", "cosine", "explained"]
        keys = ["id", "source", "nearest", "nearest_source", "cosine", "explained"]
        return Table("The most redundant", headings, [[pair[key] for key in keys] for pair in self.pairs])


def is_cheap(job: SelectionJob, picks: int) -> bool:
    """Whether ``look_at_left_out`` takes about a minute at most."""
    return job.table.rows * picks * (job.table.dimension + picks) <= _CHEAP


def look_at_left_out(job: SelectionJob, picked: Picked, out: Folder) -> LeftOut:
    """Write OUT/redundancy, a file a partition: id, source, nearest (id), cosine and explained, in the order of ids."""
    tasks, table, kernel = job.tasks, job.table, job.request.objective.kernel
    columns = [name for name in ("id", "source") if name in picked.rows.column_names]
    named = tasks.put(picked.rows.select(columns))
    selected = tasks.put(vectors(picked.rows[table.column]))  # (m, D)
    skipped = tasks.put(pa.concat_arrays([pa.array(picked.rows["id"].to_pylist(), pa.string()), job.given.excluded]))
    running = [
        tasks.submit(_look, table, parts, f"{REDUNDANCY}/part-{k:05d}.parquet", out, kernel, selected, named, skipped)
        for k, parts in enumerate(job.partitions)
    ]
    found: list[LeftOut] = []
    with progress_bar(f"{job.title}: left out", len(running), "partitions") as bar:
        for one in tasks.as_completed(running):
            found.append(one)
            bar.update()
    pairs = sorted((pair for one in found for pair in one.pairs), key=_most_explained)[:_SHOWN]
    return LeftOut(sum(o.rows for o in found), sum(o.half for o in found), sum(o.most for o in found), tuple(pairs))


def _look(
    table: GradientTable,
    parts: Sequence[Part],
    name: str,
    out: Folder,
    kernel: Kernel,
    selected: np.ndarray,
    named: pa.Table,
    skipped: pa.Array,
) -> LeftOut:
    rows = table.read_columns(parts, [*named.column_names, table.column]).sort_by("id")
    rows = rows.filter(pc.invert(pc.is_in(rows["id"], skipped)))
    if not rows.num_rows:
        return LeftOut(0, 0, 0, ())
    found = redundancy(vectors(rows[table.column]), selected, kernel, rows["id"].to_pylist())
    beside = named.take(pa.array(found.nearest))
    nulls = pa.nulls(len(rows), pa.string())
    written = pa.table(
        {
            "id": rows["id"],
            "source": rows["source"] if "source" in rows.column_names else nulls,
            "nearest": beside["id"],
            "cosine": found.cosine,
            "explained": found.explained,
        }
    )
    write_table(out, name, written)
    sources = beside["source"] if "source" in beside.column_names else nulls
    pairs = written.append_column("nearest_source", sources).take(
        pa.array(np.lexsort((np.arange(len(rows)), -found.explained))[:_SHOWN])
    )
    half, most = (int((found.explained > share).sum()) for share in (0.5, 0.9))
    return LeftOut(len(rows), half, most, tuple(pairs.to_pylist()))


def _most_explained(pair: dict[str, Any]) -> tuple[float, str]:
    return -pair["explained"], pair["id"]
