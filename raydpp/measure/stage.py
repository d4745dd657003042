"""measure: gradient tables -> log-det distances, curves and a report (Ray tasks)."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from rich.table import Table as TerminalTable

from raydpp import runs, storage
from raydpp.cluster import connect, explain
from raydpp.diversity.distance import (
    LogDetDistance,
    Subset,
    distance_from_curves,
    greedy_curve,
    log_det_curve,
    reference_curves,
)
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel, KernelName
from raydpp.dpp.objective import Objective
from raydpp.errors import UserError
from raydpp.report.figures import curve_figure
from raydpp.report.html import Section, Table, render
from raydpp.select.partition_merge import OVERSAMPLE, distributed_greedy
from raydpp.select.plan import ROWS_PER_PARTITION
from raydpp.select.request import Request
from raydpp.tables import (
    GradientTable,
    by_source,
    open_table,
    partition_count,
    partition_files,
    same_fingerprint,
    vectors,
)

log = logging.getLogger(__name__)

_LARGEST_DEFAULT = 1_000


def measure(
    tables: list[str],
    out: str,
    *,
    size: int | None = None,
    subset: Subset = "greedy",
    split_by_source: bool = False,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    draws: int = 5,
    reference_seeds: list[int] | None = None,
    seed: int = 0,
    feature_column: str = "gradient",
    address: str | None = None,
) -> runs.Outcome:
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
        gamma: Inverse squared length scale of the rbf kernel.
        ridge: Added to the kernel's diagonal; default 0 for rbf, 0.1 for cosine.
        draws: How many uniform subsets are averaged over; greedy has one.
        reference_seeds: Seeds of the reference point sets, one each; default 0 1 2 3 4.
        seed: Of the uniform subsets.
        feature_column: The column with the features, where a table was not written by raydpp.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
    """
    config = dict(locals())
    seeds = [0, 1, 2, 3, 4] if reference_seeds is None else list(reference_seeds)
    if subset not in ("greedy", "uniform"):
        raise UserError(f"--subset {subset}: use greedy or uniform")
    if subset == "uniform" and draws < 1:
        raise UserError(f"--draws {draws}: at least one is needed")
    if not seeds:
        raise UserError("--reference-seeds: at least one is needed")
    similarity = Kernel(kernel, gamma, ridge)
    opened = [open_table(url, feature_column) for url in tables]
    same_fingerprint(opened)
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

    connect(address)
    with explain():
        log.info("measure: %d tables at %d examples each", len(opened), m)
        references = _references(m, opened[0].dimension, similarity, seeds)
        distances = {}
        for table in opened:
            curves = (
                _greedy_curves(table, m, similarity)
                if subset == "greedy"
                else _uniform_curves(table, m, similarity, draws, seed)
            )
            distances[table.name] = distance_from_curves(curves, references, subset=subset, kernel=similarity)
    write_report(run, opened, distances)
    least = min(distances, key=lambda name: distances[name].mean)
    summary = (
        f"measure: log-det distance at {m:,} examples ({subset}, {kernel}): "
        + (f"{distances[least].mean:.4f} nats per example" if len(opened) == 1 else f"most diverse {least}")
        + f" -> {run.out}"
    )
    results = [
        {"table": name, "rows": table.rows, **numbers(distances[name])}
        for name, table in ((table.name, table) for table in opened)
    ]
    return run.finish(summary, counts={"tables": len(opened), "size": m}, results=results)


def numbers(distance: LogDetDistance) -> dict[str, Any]:
    """A distance without its curve, for JSON."""
    return {
        "size": distance.size,
        "subset": distance.subset,
        "mean": distance.mean,
        "std": distance.std,
        "floored": distance.floored,
    }


def terminal_table(results: list[dict[str, Any]]) -> TerminalTable:
    """What measure found, most diverse first, for the terminal."""
    table = TerminalTable(title="log-det distance, nats per example (smaller is more diverse)")
    for heading in ("table", "examples", "m", "distance", "std"):
        table.add_column(heading, justify="left" if heading == "table" else "right")
    for row in sorted(results, key=lambda row: row["mean"]):
        table.add_row(row["table"], f"{row['rows']:,}", f"{row['size']:,}", f"{row['mean']:.4f}", f"{row['std']:.4f}")
    return table


def write_report(run: runs.Run, tables: list[GradientTable], distances: dict[str, LogDetDistance]) -> None:
    """distances.json with all curves, and report.html."""
    storage.write_json(
        run.path("distances.json"),
        [
            {"table": table.name, "rows": table.rows, "kernel": run.record["config"]["kernel"]}
            | numbers(distances[table.name])
            | {
                "curve": {
                    "sizes": distances[table.name].sizes.tolist(),
                    "means": distances[table.name].means.tolist(),
                    "stds": distances[table.name].stds.tolist(),
                }
            }
            for table in tables
        ],
    )
    ranked = sorted(tables, key=lambda table: distances[table.name].mean)
    rows = [
        [
            table.name,
            table.rows,
            distances[table.name].size,
            distances[table.name].mean,
            distances[table.name].std,
        ]
        for table in ranked
    ]
    curves = {t.name: (distances[t.name].sizes, distances[t.name].means, distances[t.name].stds) for t in ranked}
    section = Section(
        "Log-det distance",
        "Mean over the reference point sets, and standard deviation. Smaller is more diverse; 0 is as diverse as points"
        " spread at random over the sphere.",
        Table(("table", "examples", "m", "distance, nats per example", "std"), rows),
        [curve_figure(curves, title="Log-det distance against the number of examples")],
    )
    storage.write_text(
        run.path("report.html"), render("Diversity", f"{len(tables)} tables, most diverse first.", [section])
    )


def _distinct(tables: list[GradientTable]) -> list[GradientTable]:
    """Tables of the same name get a number behind it."""
    seen: dict[str, int] = {}
    named = []
    for table in tables:
        seen[table.name] = seen.get(table.name, 0) + 1
        named.append(table if seen[table.name] == 1 else replace(table, name=f"{table.name} ({seen[table.name]})"))
    return named


def _references(size: int, dimension: int, kernel: Kernel, seeds: list[int]) -> np.ndarray:
    """(seeds, m) log-det curves of the reference points, one task a seed."""
    import ray

    task = ray.remote(reference_curves)
    return np.concatenate(ray.get([task.remote(size, dimension, kernel, [one]) for one in seeds]))


def _greedy_curves(table: GradientTable, size: int, kernel: Kernel) -> np.ndarray:
    groups = partition_files(table.parts, partition_count(table.rows, ROWS_PER_PARTITION))
    request = Request(Budget(size), Objective(kernel), table.column)
    picked = distributed_greedy(table, groups, request, OVERSAMPLE, f"measure: {table.name}")
    if picked.interrupted:
        raise KeyboardInterrupt  # part of a curve is not what was asked for
    return greedy_curve(picked.selection.log_gains, size, kernel)[None]  # (1, m)


def _uniform_curves(table: GradientTable, size: int, kernel: Kernel, draws: int, seed: int) -> np.ndarray:
    import ray

    task = ray.remote(_draw_curve)
    return np.stack(ray.get([task.remote(table, size, kernel, [seed, draw]) for draw in range(draws)]))


def _draw_curve(table: GradientTable, size: int, kernel: Kernel, seed: list[int]) -> np.ndarray:
    """(m,) log-det curve of one uniform sample, read file by file."""
    order = np.random.default_rng(seed).permutation(table.rows)[:size]  # row numbers in the order of drawing
    taken: list[pa.Table] = []
    start = 0
    for part in table.parts:
        inside = np.sort(order[(order >= start) & (order < start + part.rows)]) - start
        if len(inside):
            taken.append(table.read([part]).take(pa.array(inside)))
        start += part.rows
    features = vectors(pa.concat_tables(taken)[table.column])  # (m, D), in row order
    return log_det_curve(features[np.argsort(np.argsort(order))], kernel)
