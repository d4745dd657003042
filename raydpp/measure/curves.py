"""The log-det curves that distances are made of: of tables and of reference points, computed by tasks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch

from raydpp.cluster import Here
from raydpp.diversity.distance import greedy_curve, log_det_curve, projection_error, reference_curves
from raydpp.dpp.budget import Budget
from raydpp.dpp.features import unit_rows
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


Curves = tuple[np.ndarray, float | None]
"""(draws, m) log-det curves of subsets, and how far the first one's distance is off where features are projections."""


def greedy_curves(tasks: Here, table: GradientTable, size: int, kernel: Kernel) -> Curves:
    """Of the greedy subset."""
    request = Request(Budget(size), Objective(kernel), table.column)
    title = f"measure: {table.name}"
    picked = distributed_greedy(
        SelectionJob(table, partitioned(table, None, False, tasks), request, Owned.nothing(), title, tasks), OVERSAMPLE
    )
    if picked.interrupted:
        raise KeyboardInterrupt  # part of a curve is not what was asked for
    error = None
    if table.projected:
        error = tasks.get(tasks.submit(projection_error, vectors(picked.rows[table.column]), kernel))
    return greedy_curve(picked.selection.log_gains, size, kernel)[None], error


def uniform_curves(tasks: Here, table: GradientTable, size: int, kernel: Kernel, draws: int, seed: int) -> Curves:
    """Of uniform samples, one task a sample."""
    found = tasks.get([tasks.submit(_draw_curve, table, size, kernel, [seed, draw]) for draw in range(draws)])
    return np.stack([curve for curve, _ in found]), found[0][1]


def _draw_curve(table: GradientTable, size: int, kernel: Kernel, seed: list[int]) -> Curves:
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
