"""Compare a selection with baselines of the same budget: one table of log det, distance, quality and source mix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.diversity.distance import (
    distance_from_curves,
    greedy_curve,
    log_det_curve,
    projection_error,
    reference_curves,
)
from raydpp.dpp import BaselineName
from raydpp.dpp.baselines import MOST_COVERED, pick
from raydpp.dpp.budget import Budget
from raydpp.errors import UserError
from raydpp.progress import progress_bar, reporter
from raydpp.report import html
from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Section
from raydpp.report.table import Table, shorten
from raydpp.select.inputs import SelectionJob
from raydpp.select.request import Picked, Request, numbers
from raydpp.select.target import target_tasks
from raydpp.storage import Folder
from raydpp.tables import GradientTable, vectors

BASELINES: tuple[BaselineName, ...] = get_args(BaselineName)
MOST = 20_000
"""The most examples to compare sets of: log det of a set in a given order holds m x m numbers (3 GB)."""

_SEEDS = (0, 1, 2)
_LONGEST_NAME = 20  # characters of a source
_BESIDE_RANDOM = 2_000  # picks up to which a selection is always compared with random ones: seconds


@dataclass(frozen=True)
class Choice:
    """A baseline, and what it needs beside the request."""

    method: BaselineName
    seed: int = 0  # of what is random in it
    threshold: float = 0.95  # the cosine similarity from which dedup calls two examples the same


def pick_baselines(job: SelectionJob, choices: Sequence[Choice]) -> dict[str, Picked]:
    """Run baselines over a job's table, one task each; each reads the whole table."""
    with progress_bar(job.title, None, "picks") as bar:
        counter = job.tasks.counter(bar)
        running = [
            job.tasks.submit(_baseline, job.table, choice, job.request, job.given.excluded, job.targets, counter)
            for choice in choices
        ]
        job.tasks.wait(running, counter, bar)
    found = job.tasks.get(running)
    return {choice.method: Picked(*one) for choice, one in zip(choices, found, strict=True)}


def with_baselines(job: SelectionJob, picked: Picked, method: str, seed: int, threshold: float) -> list[dict[str, Any]]:
    """The picks of a method beside those of the baselines that the request and the table allow. See ``comparison``."""
    check_size(len(picked.rows))
    names = [name for name in BASELINES if name != method and possible(name, job.request, job.table, job.targets)]
    choices = [Choice(name, seed, threshold) for name in names]
    return comparison(job, {method: picked, **pick_baselines(replace(job, title="compare"), choices)})


def beside_random(job: SelectionJob, picked: Picked, method: str, seed: int) -> list[dict[str, Any]]:
    """The picks beside random ones, as ``comparison`` has them; nothing where that would take long."""
    if len(picked.rows) > _BESIDE_RANDOM or len(job.partitions) > 1:
        return []
    as_many = replace(job.request, budget=Budget(len(picked.rows)))
    chance = pick_baselines(replace(job, request=as_many, title="compare"), [Choice("random", seed)])
    return comparison(job, {**chance, method: picked})


def comparison(job: SelectionJob, found: Mapping[str, Picked]) -> list[dict[str, Any]]:
    """One record a method: examples, log det and distance of the set by itself, mean quality, tokens, source mix."""
    request, tasks, kernel = job.request, job.tasks, job.request.objective.kernel
    sizes = [len(picked.rows) for picked in found.values()]
    curves = [tasks.submit(reference_curves, max(sizes), job.table.dimension, kernel, [seed]) for seed in _SEEDS]
    references = np.concatenate(tasks.get(curves))  # (seeds, m)
    records = []
    for method, picked in found.items():
        size, features = len(picked.rows), vectors(picked.rows[request.column])  # (m, D)
        if job.given.count:  # gains are given what is owned: log det is computed again
            curve = log_det_curve(features, kernel)
        else:
            curve = greedy_curve(picked.selection.log_gains, size, kernel)
        error = tasks.get(tasks.submit(projection_error, features, kernel)) if job.table.projected else None
        distance = distance_from_curves(curve[None], references[:, :size], subset="greedy", kernel=kernel, error=error)
        scores = request.scores(picked.rows)
        costs = numbers(picked.rows, request.cost) if request.cost in picked.rows.column_names else None
        records.append(
            {
                "method": method,
                "examples": size,
                "log_det": float(curve[-1]),
                "distance": distance.mean,
                "error": error,
                "quality": None if scores is None else float(scores.mean()),
                "tokens": None if costs is None else float(costs.sum()),
                "median_tokens": None if costs is None else float(np.median(costs)),
                "sources": source_mix(picked.rows),
                "stopped": picked.selection.stopped,
                "curve": distance.means.tolist(),
            }
        )
    return records


_COLUMNS = {
    "method": "method",
    "examples": "examples",
    "log_det": "log det",
    "distance": "distance",
    "error": "projection's error",
    "quality": "quality",
    "tokens": "tokens",
    "median_tokens": "median tokens",
}


def comparison_table(records: Sequence[Mapping[str, Any]]) -> Table:
    """What ``comparison`` found, largest log det first; without the columns that no method has a number for."""
    names = [name for name in _COLUMNS if any(one[name] is not None for one in records)]
    rows = []
    for one in sorted(records, key=lambda one: -one["log_det"]):
        rows.append([*(one[name] for name in names), mix_in_words(one["sources"])])
    return Table(
        "The same budget by other methods (log det: larger is more diverse; distance: smaller)",
        [*(_COLUMNS[name] for name in names), "source mix"],
        rows,
    )


def write_report(
    out: Folder,
    picked: Picked,
    whole_mix: Mapping[str, float],
    records: Sequence[Mapping[str, Any]],
    lead: str,
    pruned: int | None = None,
    more: Sequence[Section] = (),
) -> None:
    """report.html of a selection: the comparison, what each pick adds, where the picks come from, more sections."""
    adds = "The marginal log-gain of every pick: where it flattens, more examples add little."
    if pruned:
        adds += f" From pick {pruned:,} on (the line) each adds little: what comes after can be pruned."
    sections = [
        Section(
            "What each pick adds", adds, figures=[gains_figure({"selection": picked.selection.log_gains}, mark=pruned)]
        ),
        Section(
            "Where the examples come from",
            "The share of each source.",
            figures=[mix_figure({"the whole": dict(whole_mix), "selection": source_mix(picked.rows)})],
        ),
    ]
    if records:
        curves = {
            one["method"]: (
                np.arange(1, one["examples"] + 1),
                one["curve"],
                np.full(one["examples"], one["error"] or 0.0),
            )
            for one in records
        }
        compared = Section(
            "Beside other methods",
            "Log det of the kernel matrix of the set, its log-det distance in nats per example, the mean of the"
            " standardised quality. The figure shows the distance of the first m picks of each method, and how far it"
            " may be off as gradients were projected.",
            comparison_table(records),
            [curve_figure(curves)],
        )
        sections.insert(0, compared)
    html.write_report(out, "Selection", lead, [*sections, *more])


def source_mix(rows: pa.Table) -> dict[str, float]:
    """The share of each source, largest first."""
    if "source" not in rows.column_names or not rows.num_rows:
        return {}
    counts = {str(one["values"]): one["counts"] / len(rows) for one in rows["source"].value_counts().to_pylist()}
    return dict(sorted(counts.items(), key=lambda one: -one[1]))


def mix_in_words(shares: Mapping[str, float]) -> str:
    """The three largest shares, for a cell of a table."""
    mix = [f"{share:.0%} {shorten(source, _LONGEST_NAME)}" for source, share in shares.items()]
    return ", ".join(mix[:3] + ["..."] * (len(mix) > 3))


def check_size(size: int) -> None:
    """Refuse a comparison that would not fit in memory."""
    if size > MOST:
        raise UserError(f"--compare holds m x m numbers, too many for m = {size}: compare at --size {MOST} or less")


def possible(
    method: BaselineName, request: Request, table: GradientTable, targets: Sequence[GradientTable] = ()
) -> bool:
    """Whether a baseline can answer this request over this table, with these targets."""
    if method == "quality":
        return bool(request.quality)
    if method == "length":
        return table.has(request.cost)
    if method == "facility-location":
        return table.rows <= MOST_COVERED
    if method == "round-robin":
        return bool(targets) and sum(one.rows for one in targets) * table.rows <= MOST_COVERED**2
    if method == "k-means":
        budget = request.budget
        return budget.size is not None and budget.tokens is None and not (budget.minimum or budget.maximum)
    return True


def _baseline(
    table: GradientTable,
    choice: Choice,
    request: Request,
    exclude: pa.Array,
    targets: Sequence[GradientTable],
    counter: Any,
) -> Any:
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
        targets=target_tasks(targets) if choice.method == "round-robin" and targets else None,
        seed=choice.seed,
        progress=reporter(counter),
    )
    return rows.take(pa.array(selection.indices)), selection
