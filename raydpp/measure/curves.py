"""The log-det curves that distances are made of: of tables and of reference points, computed by tasks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from raydpp.cluster import Here
from raydpp.diversity.distance import Subset, greedy_curve, log_det_curve, projection_error, reference_curves
from raydpp.dpp.budget import Budget
from raydpp.dpp.features import Items, unit_rows
from raydpp.dpp.greedy import greedy
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.dpp.scale import PAIRS_OF, median_gamma
from raydpp.select.inputs import Owned, SelectionJob, partitioned
from raydpp.select.partition_merge import OVERSAMPLE, distributed_greedy
from raydpp.select.request import Request
from raydpp.tables import GradientTable, concatenated, vectors


def common_gamma(tables: Sequence[GradientTable]) -> float:
    """``median_gamma`` of a sample of all of some tables."""
    each = -(-PAIRS_OF // len(tables))
    return median_gamma(torch.cat([unit_rows(table.sample(each)) for table in tables]))


def one_partition(table: GradientTable) -> bool:
    """Whether a table is small enough to be searched whole."""
    return len(partitioned(table, None, False, Here())) == 1


def references(tasks: Here, size: int, dimension: int, kernel: Kernel, seeds: list[int]) -> np.ndarray:
    """(seeds, m) log-det curves of the reference points, one task a seed."""
    curves = [tasks.submit(reference_curves, size, dimension, kernel, [seed]) for seed in seeds]
    return np.concatenate(tasks.get(curves))


@dataclass(frozen=True)
class Measured:
    """What is measured of tables."""

    subset: Subset
    size: int  # m
    kernel: Kernel
    draws: int  # of uniform samples
    seed: int  # of these
    pool: int | None = None  # how many examples, drawn at random, greedy picks from; None: all


@dataclass(frozen=True, eq=False)
class Curves:
    """The (draws, m) log-det curves of subsets of a table."""

    curves: np.ndarray
    error: float | None  # how far the first one's distance is off where features are projections
    sampling: float | None = None  # its standard deviation over other examples of the same kind, where it was asked for


def subset_curves(tasks: Here, table: GradientTable, how: Measured, sampling: bool = False) -> Curves:
    """Of the greedy subset, or of uniform ones, one task each."""
    if how.subset == "greedy":
        found = _greedy_curve(tasks, table, how)
        error = example_error(tasks, table, how.size, how.kernel, how.pool) if sampling else None
        return replace(found, sampling=error)
    drawn = [tasks.submit(_draw_curve, table, how.size, how.kernel, [how.seed, draw]) for draw in range(how.draws)]
    pairs = tasks.get(drawn)
    curves = np.stack([curve for curve, _ in pairs])  # (draws, m)
    return Curves(curves, pairs[0][1], _draw_error(curves, table.rows) if sampling else None)


def _draw_error(curves: np.ndarray, rows: int) -> float | None:
    """By how much a uniform draw's distance would vary if it came from more than N = ``rows``: (draws, m) curves.

    Draws of much of a table are alike since they overlap: their first p <= N / 2 rows tell the variance, which without
    replacement is less by the share 1 - p / N, and falls as 1 / m. None of one draw, or of one row.
    """
    size = curves.shape[1]
    if len(curves) < 2 or rows < 2:
        return None
    part = min(size, rows // 2)
    spread = curves[:, part - 1].std(ddof=1) / part
    return float(spread * math.sqrt(part / size / (1 - part / rows)))


def _greedy_curve(tasks: Here, table: GradientTable, how: Measured) -> Curves:
    request = Request(Budget(how.size), Objective(how.kernel), table.column)
    title, given = f"measure: {table.name}", Owned.nothing()
    if how.pool is not None and how.pool < table.rows:
        given = replace(given, excluded=tasks.get(tasks.submit(_beyond_pool, table, how.pool)))
    picked = distributed_greedy(
        SelectionJob(table, partitioned(table, None, False, tasks), request, given, title, tasks), OVERSAMPLE
    )
    if picked.interrupted:
        raise KeyboardInterrupt  # part of a curve is not what was asked for
    error = None
    if table.projected:
        error = tasks.get(tasks.submit(projection_error, vectors(picked.rows[table.column]), how.kernel))
    return Curves(greedy_curve(picked.selection.log_gains, how.size, how.kernel)[None], error)


def _beyond_pool(table: GradientTable, size: int) -> pa.Array:
    """The ids of a table that are not among so many drawn at random, the same ones whatever its files."""
    ids = table.read_columns(table.parts, ["id"])["id"].combine_chunks().sort()
    return ids.take(pa.array(np.random.default_rng(0).permutation(len(ids))[size:]))


RESAMPLES = 20
_ROWS, _PICKS = 2_000, 200  # of a part, at most
_FEWEST = 20  # picks, where so many are measured


def example_error(
    tasks: Here, table: GradientTable, size: int, kernel: Kernel, pool: int | None = None
) -> float | None:
    """By how much the distance of the greedy subset may be off as other examples might have come, in nats per example.

    The delete-d jackknife (Shao & Wu 1989, "A general theory for jackknife variance estimation"): the standard
    deviation of the distance over ``RESAMPLES`` parts of a sample of the table, without replacement since copies would
    be the least diverse of all, scaled to the whole. Parts are picked from in the table's proportion, at least
    ``_FEWEST``, which errs on the large side. None of fewer than eight examples. With a ``pool`` greedy picks from so
    many.
    """
    rows = min(pool or table.rows, table.rows)
    return tasks.get(tasks.submit(_jackknife, table, rows, size, kernel)) if rows >= 8 else None


def _jackknife(table: GradientTable, rows: int, size: int, kernel: Kernel) -> float:
    share = size / rows
    kept = max(2, min(rows // 2, math.ceil(_PICKS / share), _ROWS))  # rows of a part
    features = table.sample(2 * kept)  # (n, D)
    picks, random = max(round(share * kept), min(size, kept, _FEWEST)), np.random.default_rng(0)
    found = []
    for _ in range(RESAMPLES):
        some = np.sort(random.permutation(len(features))[:kept])
        if picks == kept:  # in whatever order
            curve = log_det_curve(features[some], kernel)
        else:
            chosen = greedy(Items(features[some]), Budget(picks), Objective(kernel))
            curve = greedy_curve(chosen.log_gains, picks, kernel)
        found.append(curve[-1] / picks)
    ratio = kept / (len(features) - kept) * len(features) / rows
    return float(np.std(found, ddof=1) * math.sqrt(ratio))


def _draw_curve(table: GradientTable, size: int, kernel: Kernel, seed: list[int]) -> tuple[np.ndarray, float | None]:
    """Of one uniform sample, (m,), read file by file; the error of the first."""
    order = np.random.default_rng(seed).permutation(table.rows)[:size]  # row numbers in the order of drawing
    taken: list[pa.Table] = []
    start = 0
    for part in table.parts:
        inside = np.sort(order[(order >= start) & (order < start + part.rows)]) - start
        if len(inside):
            taken.append(table.read([part]).take(pa.array(inside)))
        start += part.rows
    features = vectors(concatenated(taken)[table.column])  # (m, D), in row order
    error = projection_error(features, kernel) if table.projected and seed[1] == 0 else None
    return log_det_curve(features[np.argsort(np.argsort(order))], kernel), error
