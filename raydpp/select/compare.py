"""Compare a selection with baselines of the same budget: one table of log det, distance, quality and source mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table as TerminalTable

from raydpp import storage
from raydpp.diversity.distance import distance_from_curves, greedy_curve, log_det_curve, reference_curves
from raydpp.dpp import BaselineName
from raydpp.dpp.baselines import pick
from raydpp.errors import UserError
from raydpp.progress import Counter, progress_bar, reporter, watch
from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Section, Table, render
from raydpp.report.style import Plot
from raydpp.select.inputs import Owned
from raydpp.select.request import Picked, Request, numbers
from raydpp.tables import GradientTable, vectors

BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
MOST = 20_000
"""The most examples to compare sets of: log det of a set in a given order holds m x m numbers (3 GB)."""

_SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Choice:
    """What a baseline needs beside the request.

    Attributes:
        method: Which one.
        seed: Of what is random in it.
        threshold: The cosine similarity from which dedup calls two examples the same.
    """

    method: BaselineName
    seed: int = 0
    threshold: float = 0.95


def pick_baselines(
    table: GradientTable, choices: Sequence[Choice], request: Request, exclude: pa.Array, title: str
) -> dict[str, Picked]:
    """Run baselines over a table, one task each; each reads the whole table."""
    import ray

    counter = ray.remote(num_cpus=0)(Counter).remote()
    task = ray.remote(_baseline)
    with progress_bar(title, None, "picks") as bar:
        running = [task.remote(table, choice, request, exclude, counter) for choice in choices]
        watch(running, counter, bar)
        return {choice.method: Picked(*ray.get(one)) for choice, one in zip(choices, running, strict=True)}


def with_baselines(
    table: GradientTable, request: Request, picked: Picked, have: Owned, method: str, seed: int, threshold: float
) -> list[dict[str, Any]]:
    """The picks of a method beside those of the baselines that the request and the table allow. See ``comparison``."""
    check_size(len(picked.rows))
    names = [name for name in BASELINES if name != method and possible(name, request, table)]
    choices = [Choice(name, seed, threshold) for name in names]
    found = {method: picked, **pick_baselines(table, choices, request, have.excluded, "compare")}
    return comparison(found, request, table.dimension, have.count > 0)


def comparison(
    found: Mapping[str, Picked], request: Request, dimension: int, given_owned: bool
) -> list[dict[str, Any]]:
    """One record a method: examples, log det and distance of the set by itself, mean quality, tokens, source mix.

    Args:
        found: By method; ``greedy`` is ours.
        request: Its quality columns need not count in the selection.
        dimension: D.
        given_owned: Whether gains are given what is owned, so that log det has to be computed anew.
    """
    import ray

    kernel, sizes = request.objective.kernel, [len(picked.rows) for picked in found.values()]
    task = ray.remote(reference_curves)
    references = np.concatenate(
        ray.get([task.remote(max(sizes), dimension, kernel, [seed]) for seed in _SEEDS])
    )  # (seeds, m)
    records = []
    for method, picked in found.items():
        size = len(picked.rows)
        if given_owned:
            curve = log_det_curve(vectors(picked.rows[request.column]), kernel)
        else:
            curve = greedy_curve(picked.selection.log_gains, size, kernel)
        distance = distance_from_curves(curve[None], references[:, :size], subset="greedy", kernel=kernel)
        scores = request.scores(picked.rows)
        records.append(
            {
                "method": method,
                "examples": size,
                "log_det": float(curve[-1]),
                "distance": distance.mean,
                "quality": None if scores is None else float(scores.mean()),
                "tokens": _tokens(picked.rows, request.cost),
                "sources": source_mix(picked.rows),
                "stopped": picked.selection.stopped,
                "curve": distance.means.tolist(),
            }
        )
    return records


def comparison_table(records: Sequence[Mapping[str, Any]]) -> TerminalTable:
    """The comparison for the terminal, largest log det first."""
    table = TerminalTable(title="the same budget by other methods (log det: larger is more diverse; distance: smaller)")
    for heading in ("method", "examples", "log det", "distance", "quality", "tokens", "source mix"):
        table.add_column(heading, justify="left" if heading in ("method", "source mix") else "right")
    for row in sorted(records, key=lambda row: -row["log_det"]):
        table.add_row(*_cells(row))
    return table


def write_report(
    url: str, picked: Picked, whole_mix: Mapping[str, float], records: Sequence[Mapping[str, Any]], lead: str
) -> None:
    """report.html of a selection: what each pick adds, where the picks come from, the comparison if there is one."""
    sections = [
        Section(
            "What each pick adds",
            "The marginal log-gain of every pick: where it flattens, more examples add little.",
            figures=[gains_figure(picked.selection.log_gains)],
        ),
        Section(
            "Where the examples come from",
            "The share of each source.",
            figures=[mix_figure({"the whole": dict(whole_mix), "selection": source_mix(picked.rows)})],
        ),
    ]
    if records:
        curves = {
            r["method"]: (np.arange(1, r["examples"] + 1), np.array(r["curve"]), np.zeros(r["examples"]))
            for r in records
        }
        figures: Sequence[Plot] = [curve_figure(curves, title="Log-det distance of the first m picks")]
        headings = ("method", "examples", "log det", "distance", "quality", "tokens", "source mix")
        rows = [_cells(row) for row in sorted(records, key=lambda row: -row["log_det"])]
        sections.insert(
            0,
            Section(
                "The same budget by other methods",
                "Log det of the kernel matrix of the set (larger is more diverse), its log-det distance in nats per"
                " example (smaller is more diverse), the mean of the standardised quality.",
                Table(headings, rows),
                figures,
            ),
        )
    storage.write_text(url, render("Selection", lead, sections))


def source_mix(rows: pa.Table) -> dict[str, float]:
    """The share of each source, largest first."""
    if "source" not in rows.column_names or not rows.num_rows:
        return {}
    counts = {str(one["values"]): one["counts"] / len(rows) for one in rows["source"].value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda one: -one[1]))


def check_size(size: int) -> None:
    """Refuse a comparison that would not fit in memory."""
    if size > MOST:
        raise UserError(f"--compare holds m x m numbers, too many for m = {size}: compare at --size {MOST} or less")


def possible(method: BaselineName, request: Request, table: GradientTable) -> bool:
    """Whether a baseline can answer this request over this table."""
    if method == "quality":
        return bool(request.quality)
    if method == "length":
        return table.has(request.cost)
    if method == "k-means":
        budget = request.budget
        return budget.size is not None and budget.tokens is None and not (budget.minimum or budget.maximum)
    return True


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    mix = ", ".join(f"{source} {share:.0%}" for source, share in list(row["sources"].items())[:4])
    return (
        row["method"],
        f"{row['examples']:,}",
        f"{row['log_det']:,.2f}",
        f"{row['distance']:.4f}",
        "-" if row["quality"] is None else f"{row['quality']:.2f}",
        "-" if row["tokens"] is None else f"{row['tokens']:,.0f}",
        mix + (", ..." if len(row["sources"]) > 4 else ""),
    )


def _tokens(rows: pa.Table, column: str) -> float | None:
    return float(numbers(rows, column).sum()) if column in rows.column_names else None


def _baseline(table: GradientTable, choice: Choice, request: Request, exclude: pa.Array, counter: Any) -> Any:
    rows = table.read(table.parts, (*request.columns, *([request.cost] if choice.method == "length" else [])))
    rows = rows.filter(pc.invert(pc.is_in(rows["id"], exclude)))
    items = request.items(rows)
    selection = pick(
        choice.method,
        items,
        request.budget.within(items),
        request.objective.kernel,
        quality=request.scores(rows),
        lengths=numbers(rows, request.cost) if choice.method == "length" else None,
        threshold=choice.threshold,
        seed=choice.seed,
        progress=reporter(counter),
    )
    return rows.take(pa.array(selection.indices)), selection
