"""measure: gradient tables -> log-det distances, curves and a report (Ray tasks)."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from raydpp import runs
from raydpp.cluster import tasks_for, unwrap_task_errors
from raydpp.diversity.fidelity import SAMPLE, fidelity
from raydpp.dpp.kernels import Kernel
from raydpp.errors import UserError, checked_seed
from raydpp.report.table import Table
from raydpp.storage import absolute
from raydpp.tables import GradientTable, by_source, open_table, same_fingerprint

if TYPE_CHECKING:
    from raydpp.diversity.distance import LogDetDistance

log = logging.getLogger(__name__)

_LARGEST_DEFAULT = 1_000


def measure(
    tables: list[str],
    out: str,
    *,
    size: int | None = None,
    subset: Literal["greedy", "uniform"] = "greedy",
    split_by_source: bool = False,
    kernel: Literal["rbf", "cosine"] = "rbf",
    gamma: float | Literal["auto"] = 1.0,
    ridge: float | None = None,
    draws: int = 5,
    reference_seeds: list[int] | None = None,
    seed: int = 0,
    drop_below: float | None = None,
    feature_column: str = "gradient",
    address: str | None = None,
) -> runs.RunResult:
    """Say how diverse datasets are: their log-det distance to as many points spread at random over the sphere.

    In nats per example; the smaller, the more diverse; comparable at the same size only, so all tables are measured at
    one size. OUT/distances.json holds the numbers and curves, OUT/report.html the table and the plot.

    Args:
        tables: Output folders of raydpp extract or select, or Parquet files with the columns id and --feature-column.
        out: Folder to write; it must be new, empty, or this same run's.
        size: m, how many examples of each table; default the smallest table's, at most 1000.
        subset: greedy, the m most diverse examples (how much room the data spans), or uniform, m drawn at random (how
            redundant a typical draw is).
        split_by_source: Whether to measure every source of the tables for itself.
        kernel: Similarity of two examples: rbf, exp(-gamma ||x - y||^2), or cosine, <x, y>.
        gamma: Inverse squared length scale of the rbf kernel; distances compare only at the same one. auto: 2 over the
            median squared distance of two examples of these tables, from a sample.
        ridge: Added to the kernel's diagonal; default 0 for rbf, 0.1 for cosine.
        draws: How many uniform subsets are averaged over; greedy has one.
        reference_seeds: Seeds of the reference point sets, one each; default 0 1 2 3 4.
        seed: Of the uniform subsets.
        drop_below: Leave log gains below this, in nats, out of both sums, as Wang et al. do at -7: copies then count
            as nothing, not as the numerical floor.
        feature_column: The column with the features, where a table was not written by raydpp.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
    """
    given = [*tables, out]
    tables, out = [absolute(url) for url in tables], absolute(out)
    config = {name: value for name, value in locals().items() if name != "given"}
    seeds = [0, 1, 2, 3, 4] if reference_seeds is None else list(reference_seeds)
    if subset not in ("greedy", "uniform"):
        raise UserError(f"--subset {subset}: use greedy or uniform")
    if subset == "uniform" and draws < 1:
        raise UserError(f"--draws {draws}: at least one is needed")
    if not seeds:
        raise UserError("--reference-seeds: at least one is needed")
    for name, numbers_given in (("--reference-seeds", seeds), ("--seed", [seed])):
        for one in numbers_given:
            checked_seed(name, one)
    opened = [open_table(url, feature_column) for url in tables]
    same_fingerprint(opened)
    similarity = Kernel(kernel, 1.0 if gamma == "auto" else gamma, ridge)
    run = runs.begin("measure", config, [table.identity for table in opened])
    if run.done:
        return run.done
    if split_by_source:
        opened = [source for table in opened for source in by_source(table)]
    opened = _distinct(opened)
    m = size or min(_LARGEST_DEFAULT, *(table.rows for table in opened))
    for table in opened:
        if not 1 <= m <= table.rows:
            raise UserError(f"--size {m}: {table.name} has {table.rows} examples; give at most that many")
    similarity.check_budget(m, opened[0].dimension)

    # torch takes seconds: mistakes, and what is done already, are found before it is loaded
    from raydpp.diversity.distance import distance_from_curves
    from raydpp.measure.curves import common_gamma, greedy_curves, one_partition, references, uniform_curves

    tasks = tasks_for("measure", address, given, all(map(one_partition, opened)))
    with unwrap_task_errors():
        if gamma == "auto" and kernel == "rbf":
            similarity = replace(similarity, gamma=tasks.get(tasks.submit(common_gamma, opened)))
        log.info("measure: %d tables at %d examples each, %s", len(opened), m, similarity)
        reference = references(tasks, m, opened[0].dimension, similarity, seeds)
        distances = {}
        for table in opened:
            _warn_of_noise(table)
            curves, error = (
                greedy_curves(tasks, table, m, similarity)
                if subset == "greedy"
                else uniform_curves(tasks, table, m, similarity, draws, seed)
            )
            distances[table.name] = distance_from_curves(
                curves, reference, subset=subset, kernel=similarity, error=error, drop_below=drop_below
            )
    results = [{"table": table.name, "rows": table.rows, **numbers(distances[table.name])} for table in opened]
    shown = distance_table(results, similarity)
    run.out.write_json("distances.json", [_with_curve(one, kernel, distances[one["table"]]) for one in results])
    run.out.write_text("report.html", report(shown, distances))
    least = min(distances, key=lambda name: distances[name].mean)
    summary = (
        f"measure: log-det distance at {m:,} examples ({subset}, {similarity}): "
        + (f"{distances[least].mean:.4f} nats per example" if len(opened) == 1 else f"most diverse {least}")
        + f" -> {run.out}"
    )
    counts = {"tables": len(opened), "size": m}
    used = similarity.gamma if kernel == "rbf" else None
    return run.finish(summary, counts=counts, gamma=used, results=results, tables=[shown.record])


def _warn_of_noise(table: GradientTable) -> None:
    found = fidelity(table.sample(SAMPLE)) if table.projected else None
    if found and found.poor:
        log.warning("measure: %s: %s", table.name, found.words(table.dimension))


def distance_table(results: Sequence[Mapping[str, Any]], kernel: Kernel) -> Table:
    """What measure found, most diverse first."""
    columns = {"table": "table", "examples": "rows", "m": "size", "distance": "mean", "std": "std"}
    if any(one["error"] is not None for one in results):
        columns["projection's error"] = "error"
    return Table(
        f"Log-det distance, nats per example (smaller is more diverse; {kernel})",
        list(columns),
        [[one[name] for name in columns.values()] for one in sorted(results, key=lambda one: one["mean"])],
    )


def report(shown: Table, distances: Mapping[str, LogDetDistance]) -> str:
    """report.html: the table, and the curves in the same order."""
    from raydpp.report.figures import curve_figure
    from raydpp.report.html import Section, render

    ranked = sorted(distances.items(), key=lambda one: one[1].mean)
    curves = {name: (found.sizes, found.means, np.hypot(found.stds, found.error or 0.0)) for name, found in ranked}
    section = Section(
        "Log-det distance",
        "Mean over the reference point sets; the band is their standard deviation and the projection's error together,"
        " which is how far the distance may be off as gradients were projected. 0 is as diverse as points spread at"
        " random over the sphere.",
        shown,
        [curve_figure(curves)],
    )
    return render("Diversity", f"{len(shown.rows)} tables, most diverse first.", [section])


def numbers(distance: LogDetDistance) -> dict[str, Any]:
    """A distance without its curve, for JSON."""
    names = ("size", "subset", "mean", "std", "error", "floored")
    return {name: getattr(distance, name) for name in names}


def _with_curve(result: Mapping[str, Any], kernel: str, distance: LogDetDistance) -> dict[str, Any]:
    curve = {"sizes": distance.sizes.tolist(), "means": distance.means.tolist(), "stds": distance.stds.tolist()}
    return {"table": result["table"], "rows": result["rows"], "kernel": kernel, **result, "curve": curve}


def _distinct(tables: list[GradientTable]) -> list[GradientTable]:
    """Tables of the same name get a number behind it."""
    seen: dict[str, int] = {}
    named = []
    for table in tables:
        seen[table.name] = seen.get(table.name, 0) + 1
        named.append(table if seen[table.name] == 1 else replace(table, name=f"{table.name} ({seen[table.name]})"))
    return named
