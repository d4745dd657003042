"""The log-det curves that distances are made of: of tables and of reference points, computed by tasks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raydpp.cluster import Here
from raydpp.diversity.distance import greedy_curve, log_det_curve, reference_curves
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select.inputs import Owned, SelectionJob, partitioned
from raydpp.select.partition_merge import OVERSAMPLE, distributed_greedy
from raydpp.select.request import Request
from raydpp.tables import GradientTable, concatenated, vectors


def one_partition(table: GradientTable) -> bool:
    """Whether a table is small enough to be searched whole."""
    return len(partitioned(table, None, False, Here())) == 1


def references(tasks: Here, size: int, dimension: int, kernel: Kernel, seeds: list[int]) -> np.ndarray:
    """(seeds, m) log-det curves of the reference points, one task a seed."""
    curves = [tasks.submit(reference_curves, size, dimension, kernel, [seed]) for seed in seeds]
    return np.concatenate(tasks.get(curves))


def greedy_curves(tasks: Here, table: GradientTable, size: int, kernel: Kernel) -> np.ndarray:
    """(1, m) log-det curve of the greedy subset."""
    request = Request(Budget(size), Objective(kernel), table.column)
    title = f"measure: {table.name}"
    picked = distributed_greedy(
        SelectionJob(table, partitioned(table, None, False, tasks), request, Owned.nothing(), title, tasks), OVERSAMPLE
    )
    if picked.interrupted:
        raise KeyboardInterrupt  # part of a curve is not what was asked for
    return greedy_curve(picked.selection.log_gains, size, kernel)[None]


def uniform_curves(tasks: Here, table: GradientTable, size: int, kernel: Kernel, draws: int, seed: int) -> np.ndarray:
    """(draws, m) log-det curves of uniform samples, one task a sample."""
    return np.stack(tasks.get([tasks.submit(_draw_curve, table, size, kernel, [seed, draw]) for draw in range(draws)]))


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
    features = vectors(concatenated(taken)[table.column])  # (m, D), in row order
    return log_det_curve(features[np.argsort(np.argsort(order))], kernel)
