"""measure: gradient tables -> log-det distances, curves and a report (Ray tasks)."""

from __future__ import annotations

import itertools
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
from raydpp.storage import Folder, absolute
from raydpp.tables import GradientTable, by_source, open_table, same_fingerprint

if TYPE_CHECKING:
    from raydpp.diversity.distance import LogDetDistance, Subset
    from raydpp.report.html import Section

log = logging.getLogger(__name__)

_LARGEST_DEFAULT = 1_000
_LENGTH = "response_tokens"
SUBSETS: tuple[Subset, ...] = ("greedy", "uniform")


def measure(
    tables: list[str],
    out: str,
    *,
    size: int | None = None,
    subset: Literal["both", "greedy", "uniform"] = "both",
    pool: int | None = None,
    reference: str | None = None,
    split_by_source: bool = False,
    kernel: Literal["rbf", "cosine"] = "rbf",
    gamma: float | Literal["auto"] = 1.0,
    ridge: float | None = None,
    draws: int = 5,
    reference_seeds: list[int] | None = None,
    seed: int = 0,
    drop_below: float | None = None,
    measures: bool = True,
    corpus: str | None = None,
    feature_column: str = "gradient",
    address: str | None = None,
) -> runs.RunResult:
    """Say how diverse datasets are: their log-det distance to as many points spread at random over the sphere.

    In nats per example; the smaller, the more diverse; comparable at the same size only, so all tables are measured at
    one size. One is called more diverse than another with the probability that it is: distances are off by which
    examples came, and as gradients are projected. Beside it stand the Vendi score and other measures.
    OUT/distances.json holds the numbers and curves, OUT/metrics.json and OUT/metrics.csv the numbers alone,
    OUT/report.html the tables and the plots, OUT/plots the plots as PNG, OUT/map/map.parquet where examples lie in a
    plane, with their texts, for embedding-atlas.

    Args:
        tables: Output folders of raydpp extract or select, or Parquet files with the columns id and --feature-column.
        out: Folder to write; it must be new, empty, or this same run's.
        size: m, how many examples of each table; default the smallest table's, at most 1000.
        subset: greedy, the m most diverse examples (how much room the data spans; of a larger table there are more to
            pick from), uniform, m drawn at random (how redundant a typical draw is), or both.
        pool: Greedy picks from so many examples of each table, drawn at random, so that tables of different sizes
            compare; default from all of each.
        reference: Measure the distance to this table instead, in the same forms; below 0 is more diverse than it.
            NovelSum takes its densities from it.
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
        measures: Whether to compute, from all examples, the Vendi score (G-Vendi, of gradients) and the mean cosine
            distance; from a sample, redundancy among nearest neighbours, NovelSum and the entropy of clusters. On 2
            cores they take half a minute for a million examples of 512 dimensions, 3 minutes for 100,000 of 8,192.
        corpus: Output folder of raydpp ingest that the map takes texts from; default the one each table was made of.
        feature_column: The column with the features, where a table was not written by raydpp.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
    """
    given = [*tables, out, *(url for url in (reference, corpus) if url)]
    tables, out = [absolute(url) for url in tables], absolute(out)
    reference, corpus = (absolute(url) if url else None for url in (reference, corpus))
    config = {name: value for name, value in locals().items() if name != "given"}
    seeds = [0, 1, 2, 3, 4] if reference_seeds is None else list(reference_seeds)
    if subset not in ("both", "greedy", "uniform"):
        raise UserError(f"--subset {subset}: use both, greedy or uniform")
    if subset != "greedy" and draws < 1:
        raise UserError(f"--draws {draws}: at least one is needed")
    if not seeds:
        raise UserError("--reference-seeds: at least one is needed")
    for name, numbers_given in (("--reference-seeds", seeds), ("--seed", [seed])):
        for one in numbers_given:
            checked_seed(name, one)
    opened = [open_table(url, feature_column) for url in tables]
    beside = open_table(reference, feature_column) if reference else None
    everything = [*opened, *([beside] if beside else [])]
    same_fingerprint(everything)
    if corpus:
        runs.load_finished(["ingest"], Folder.at(corpus))
    similarity = Kernel(kernel, 1.0 if gamma == "auto" else gamma, ridge)
    run = runs.begin("measure", config, [table.identity for table in everything])
    if run.done:
        return run.done
    if split_by_source:
        opened = [source for table in opened for source in by_source(table)]
    opened = _distinct(opened)
    everything = [*opened, *([beside] if beside else [])]
    m = size or min(_LARGEST_DEFAULT, *(table.rows for table in everything))
    for table in everything:
        if not 1 <= m <= table.rows:
            raise UserError(f"--size {m}: {table.name} has {table.rows} examples; give at most that many")
        if pool is not None and not m <= pool <= table.rows:
            raise UserError(
                f"--pool {pool}: give a number from --size {m} to the {table.rows} examples of {table.name}"
            )
    similarity.check_budget(m, opened[0].dimension)

    # torch takes seconds: mistakes, and what is done already, are found before it is loaded
    from raydpp.diversity.distance import distance_from_curves
    from raydpp.measure.curves import Measured, common_gamma, one_partition, references, subset_curves
    from raydpp.measure.map import tables_map
    from raydpp.measure.metrics import measures_section, submit_measures, write_metrics
    from raydpp.report.html import Section
    from raydpp.select.lengths import lengths_section, table_lengths

    tasks = tasks_for("measure", address, given, all(map(one_partition, everything)))
    with unwrap_task_errors():
        if gamma == "auto" and kernel == "rbf":
            similarity = replace(similarity, gamma=tasks.get(tasks.submit(common_gamma, opened)))
        log.info("measure: %d tables at %d examples each, %s", len(opened), m, similarity)
        submitted = submit_measures(tasks, opened, beside) if measures else []
        for table in opened:
            _warn_of_noise(table)
        found: dict[Subset, dict[str, LogDetDistance]] = {}
        for form in SUBSETS if subset == "both" else (subset,):
            how = Measured(form, m, similarity, draws, seed, pool)
            if beside:
                to = subset_curves(tasks, beside, how).curves  # (1 or draws, m)
            else:
                to = references(tasks, m, opened[0].dimension, similarity, seeds)  # (seeds, m)
            found[form] = {}
            for table in opened:
                own = subset_curves(tasks, table, how, sampling=True)
                found[form][table.name] = distance_from_curves(
                    own.curves,
                    to,
                    subset=form,
                    kernel=similarity,
                    error=own.error,
                    drop_below=drop_below,
                    sampling=own.sampling,
                )
        others = dict(zip((table.name for table in opened), tasks.get(submitted), strict=False))
        plane = tables_map(tasks, opened, corpus, run.out)
    rows = {table.name: table.rows for table in opened}
    results = [
        {"table": name, "rows": rows[name], **numbers(distance)}
        for distances in found.values()
        for name, distance in distances.items()
    ]
    origin = f"from {beside.name}" if beside else "from points spread at random"
    shown = {
        form: distance_table(distances, rows, f"{form}, {similarity}", origin) for form, distances in found.items()
    }
    curves = [distance for distances in found.values() for distance in distances.values()]
    run.out.write_json(
        "distances.json", [_with_curve(one, kernel, curve) for one, curve in zip(results, curves, strict=True)]
    )
    write_metrics(run.out, results, others, similarity)
    order = [name for name, _ in ranked(next(iter(found.values())))]
    more = [measures_section(others, order)] if others else []
    if counted := {table.name: table_lengths(table, _LENGTH) for table in opened if table.has(_LENGTH)}:
        more.append(lengths_section(counted, _LENGTH))
    more.append(plane)
    more.append(Section("How to repeat it", command=f"raydpp measure --config {run.out}/run.json --out NEW"))
    report(run.out, shown, found, origin, _said_of_pools(pool, rows), more)
    form, distances = next(iter(found.items()))
    what = f"log-det distance {origin} at {m:,} examples ({form}, {similarity})"
    summary = f"measure: {what}: {verdict(distances)} -> {run.out}"
    counts = {"tables": len(opened), "size": m}
    used = similarity.gamma if kernel == "rbf" else None
    tables_shown = [table.record for table in (*shown.values(), *(section.table for section in more)) if table]
    return run.finish(summary, counts=counts, gamma=used, results=results, measures=others, tables=tables_shown)


def _warn_of_noise(table: GradientTable) -> None:
    found = fidelity(table.sample(SAMPLE)) if table.projected else None
    if found and found.poor:
        log.warning("measure: %s: %s", table.name, found.words(table.dimension))


def ranked(distances: Mapping[str, LogDetDistance]) -> list[tuple[str, LogDetDistance]]:
    """By name, the most diverse first."""
    return sorted(distances.items(), key=lambda one: one[1].mean)


CERTAIN = 0.95
"""The probability from which one table is called more diverse than another."""


def comparison(one: LogDetDistance, other: LogDetDistance) -> str:
    """Whether one is more diverse than the other, in a word."""
    probability = one.probability_below(other)
    return f"{probability:.1%}" if probability >= CERTAIN else "no difference seen"


def verdict(distances: Mapping[str, LogDetDistance]) -> str:
    """What was found, in a sentence."""
    (name, best), *others = ranked(distances)
    if not others:
        return f"{best.mean:.4f} +- {best.uncertainty:.4f} nats per example"
    second, next_best = others[0]
    if (probability := best.probability_below(next_best)) >= CERTAIN:
        return f"most diverse {name}, with a probability of {probability:.1%} before {second}"
    return f"no difference seen between {name} and {second}, the most diverse two"


def distance_table(distances: Mapping[str, LogDetDistance], rows: Mapping[str, int], how: str, origin: str) -> Table:
    """What measure found, most diverse first."""
    order = ranked(distances)
    columns: dict[str, list[Any]] = {
        "table": [name for name, _ in order],
        "examples": [rows[name] for name, _ in order],
        "m": [one.size for _, one in order],
        "distance": [one.mean for _, one in order],
        "over references": [one.std for _, one in order],
        "over examples": [one.sampling for _, one in order],
        "projection's error": [one.error for _, one in order],
        "more diverse than the next": [*(comparison(a, b) for (_, a), (_, b) in itertools.pairwise(order)), None],
    }
    shown = {heading: cells for heading, cells in columns.items() if any(cell is not None for cell in cells)}
    title = f"Log-det distance {origin}, nats per example (smaller is more diverse; {how})"
    return Table(title, list(shown), [list(row) for row in zip(*shown.values(), strict=True)])


def report(
    out: Folder,
    shown: Mapping[Subset, Table],
    found: Mapping[Subset, Mapping[str, LogDetDistance]],
    origin: str,
    pools: str,
    more: Sequence[Section],
) -> None:
    """report.html: for each form of subset the table and the curves; then more sections."""
    from raydpp.report.figures import curve_figure
    from raydpp.report.html import Section, write_report

    titles = {"greedy": "The most diverse examples", "uniform": "Examples drawn at random"}
    sections = []
    for form, distances in found.items():
        curves = {name: (one.sizes, one.means, np.hypot(one.stds, one.uncertainty)) for name, one in distances.items()}
        text = (
            f"Log-det distance {origin}, of as many examples of each table. The band is what it may be off by, one"
            " standard deviation: over references, over the examples that came, and as gradients were projected."
            f"{pools if form == 'greedy' else ''}"
        )
        sections.append(Section(titles[form], text, shown[form], [curve_figure(curves, f"curves-{form}")]))
    names = next(iter(found.values()))
    write_report(out, "Diversity", f"{len(names)} tables, most diverse first.", [*sections, *more])


def _said_of_pools(pool: int | None, rows: Mapping[str, int]) -> str:
    """What of greedy subsets of tables with so many examples is to be said, if anything."""
    if pool is not None:
        return f" They were picked from {pool:,} of each table, drawn at random."
    least = min(rows.values())
    more = max(rows.values()) > least
    return f" Of larger tables there were more to pick from: --pool {least} takes as many of each." if more else ""


def numbers(distance: LogDetDistance) -> dict[str, Any]:
    """A distance without its curve, for JSON."""
    names = ("size", "subset", "mean", "std", "sampling", "error", "floored")
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
