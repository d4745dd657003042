"""The log-det curves that distances are made of: of tables and of reference points, computed on the cluster."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from raydpp.diversity.distance import greedy_curve, log_det_curve, reference_curves
from raydpp.dpp.kernels import Kernel
from raydpp.select.partition_merge import OVERSAMPLE, distributed_greedy
from raydpp.select.plan import ROWS_PER_PARTITION
from raydpp.select.request import Request
from raydpp.tables import GradientTable, partition_count, partition_files, vectors


def references(size: int, dimension: int, kernel: Kernel, seeds: list[int]) -> np.ndarray:
    """(seeds, m) log-det curves of the reference points, one task a seed."""
    import ray

    task = ray.remote(reference_curves)
    return np.concatenate(ray.get([task.remote(size, dimension, kernel, [one]) for one in seeds]))


def greedy_curves(table: GradientTable, size: int, kernel: Kernel) -> np.ndarray:
    """(1, m) log-det curve of the greedy subset."""
    groups = partition_files(table.parts, partition_count(table.rows, ROWS_PER_PARTITION))
    request = Request(kernel, table.column, size)
    picked = distributed_greedy(table, groups, request, OVERSAMPLE, f"measure: {table.name}")
    if picked.interrupted:
        raise KeyboardInterrupt  # part of a curve is not what was asked for
    return greedy_curve(picked.selection.log_gains, size, kernel)[None]


def uniform_curves(table: GradientTable, size: int, kernel: Kernel, draws: int, seed: int) -> np.ndarray:
    """(draws, m) log-det curves of uniform samples, one task a sample."""
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
