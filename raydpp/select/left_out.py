"""What a selection leaves out: OUT/redundancy, with the selected example nearest to each, and how much it explains."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.diversity.redundancy import COPY, redundancy
from raydpp.dpp.kernels import Kernel
from raydpp.progress import progress_bar
from raydpp.report.html import Pair, Section
from raydpp.report.table import Table
from raydpp.select.inputs import SelectionJob
from raydpp.select.request import Picked
from raydpp.storage import Folder
from raydpp.tables import GradientTable, Part, vectors, write_table

log = logging.getLogger(__name__)

REDUNDANCY = "redundancy"
LONGEST = 1_000
"""The most characters of a pair's texts."""

_CHEAP = 7e11  # operations; about a minute of one core
_SHOWN = 20  # pairs


@dataclass(frozen=True)
class LeftOut:
    """Of the examples that were neither picked, owned nor excluded."""

    rows: int
    half: int  # of how many the selection explains more than half of the variance
    most: int  # more than nine tenths
    copies: int  # of a pick
    pairs: tuple[dict[str, Any], ...]  # the most redundant ones but copies, each beside another pick, its nearest

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

    def section(self, texts: Mapping[str, str]) -> Section:
        """The pairs side by side, with those texts of examples, by id, that are known."""
        text = (
            f"{str(self).capitalize()}; {self.copies:,} are copies of selected ones.\n\n"
            "Below are the most redundant others, each beside the selected example that is nearest to it, one for each"
            " of these. Explained is the share of an example's variance that all selected ones hold together."
        )
        pairs = []
        for pair in self.pairs:
            heading = f"cosine {pair['cosine']:.3f}, explained {pair['explained']:.1%}"
            ids, sources = (pair["id"], pair["nearest"]), (pair["source"], pair["nearest_source"])
            left, near = (", ".join(filter(None, one)) for one in zip(ids, sources, strict=True))
            shown = (texts.get(ids[0], ""), texts.get(ids[1], ""))
            pairs.append(Pair(heading, (f"left out: {left}", f"selected: {near}"), shown))
        return Section("What is left out", text, *([None, (), pairs] if texts else [self.table]))


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
    pairs: dict[str, dict[str, Any]] = {}
    for pair in sorted((pair for one in found for pair in one.pairs), key=_most_explained):
        pairs.setdefault(pair["nearest"], pair)
    rows, half, most, copies = np.sum([(one.rows, one.half, one.most, one.copies) for one in found], axis=0).tolist()
    return LeftOut(rows, half, most, copies, tuple(pairs.values())[:_SHOWN])


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
        return LeftOut(0, 0, 0, 0, ())
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
    order = np.argsort(-found.explained, kind="stable")
    order = order[found.cosine[order] < COPY]
    first = np.unique(found.nearest[order], return_index=True)[1]  # the most redundant beside each pick
    pairs = written.append_column("nearest_source", sources).take(pa.array(order[np.sort(first)][:_SHOWN]))
    half, most = (int((found.explained > share).sum()) for share in (0.5, 0.9))
    return LeftOut(len(rows), half, most, int((found.cosine >= COPY).sum()), tuple(pairs.to_pylist()))


def _most_explained(pair: dict[str, Any]) -> tuple[float, str]:
    return -pair["explained"], pair["id"]
