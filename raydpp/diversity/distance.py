"""Log-det distance of a dataset from a maximally diverse one (Wang et al. 2024, arXiv 2402.02318).

``LDD_m = (log det K_R - log det K_S) / m``: S is m rows of the dataset, R is m points uniform on the unit
sphere of the same dimension. Nats per example; 0 is as diverse as the reference, larger is less diverse. The
factorisation that gives log det at size m gives it at every smaller size too, so the whole curve over m comes
with it.

A singular set has log det -inf, and so an infinite distance. Here each row that its predecessors determine (a
copy) counts as the numerical floor instead (``RESIDUAL_FLOOR``, about -23 nats): distances stay finite, so
that tables can be compared, averaged and written as strict JSON, and two sets with different numbers of
copies still differ. ``LogDetDistance.floored`` counts such rows: where it is not 0 the true distance is
infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from raydpp.errors import UserError
from raydpp.selection.greedy import Objective, check_size, id_order, search
from raydpp.selection.kernels import Features, Ids, Kernel, KernelName, unit_rows
from raydpp.selection.oracles import Textbook

Subset = Literal["greedy", "uniform"]


@dataclass(frozen=True, eq=False)
class LogDetDistance:
    """A log-det distance and its curve, in nats per example.

    Attributes:
        mean: The distance at the full size m, a mean over all pairs of a draw and a reference.
        std: Its (population) standard deviation over the same pairs.
        sizes: (m,) int64: 1 to m.
        means: (m,) the distance of the first 1, 2, ... m rows; the last is ``mean``.
        stds: (m,) likewise.
        size: m.
        subset: How the rows were taken from the dataset.
        floored: The number of the m rows that counted as the numerical floor (the most over the draws).
    """

    mean: float
    std: float
    sizes: np.ndarray
    means: np.ndarray
    stds: np.ndarray
    size: int
    subset: Subset
    floored: int = 0


def factor_gains(features: Tensor, kernel: Kernel, block: int = 128) -> Tensor:
    """The residual of each row given the rows before it: the squared diagonal of the Cholesky factor.

    A blocked Cholesky factorisation without pivoting that, unlike the library's, goes on past a singular
    minor: a row at or below the kernel's floor adds no direction, its residual counts as the floor, and it is
    left out of the factor.

    Args:
        features: (m, D) float64 with unit rows, in the order of conditioning.
        kernel: The kernel.
        block: b, the rows factored together before the rest is brought up to date in one matrix product.

    Returns:
        (m,) float64, each at least ``kernel.floor``. Costs O(m^2 (D + m)) in matrix products; memory (m, m).
    """
    schur = kernel.matrix(features)  # (m, m): rows and columns from `stop` on are given the rows before
    gains = torch.full_like(schur[0], kernel.floor)  # (m,)
    for start in range(0, len(features), block):
        stop = start + block
        corner = schur[start:stop, start:stop]  # (b, b)
        factor = torch.zeros_like(corner)  # (b, k): a column for each row kept
        keep: list[int] = []
        for j in range(len(corner)):
            pivot = float(corner[j, j])
            if pivot > kernel.floor:
                gains[start + j] = pivot
                column = corner[j:, j] / pivot**0.5
                corner[j:, j:].addr_(column, column, alpha=-1.0)
                factor[j:, len(keep)] = column
                keep.append(j)
        panel = torch.linalg.solve_triangular(
            factor[keep, : len(keep)], schur[start:stop, stop:][keep], upper=False
        )  # (k, m - stop)
        schur[stop:, stop:].addmm_(panel.T, panel, alpha=-1.0)
    return gains


def log_det_curve(features_in_order: Features, kernel: Kernel, device: torch.device | str | None = None) -> np.ndarray:
    """log det of the kernel matrix of the first 1, 2, ... m rows, from one Cholesky factorisation in float64.

    Args:
        features_in_order: (m, D) rows of unit norm; float16, float32 or float64.
        kernel: The kernel.
        device: Where to compute.

    Returns:
        (m,) float64 in nats, always finite: a row that those before it determine counts as ``kernel.floor``.

    Raises:
        UserError: Rows that are not finite and of unit norm.
    """
    gains = factor_gains(unit_rows(features_in_order, device=device), kernel)  # (m,)
    return np.cumsum(gains.log().cpu().numpy())


def reference_curves(
    size: int, dimension: int, kernel: Kernel, seeds: Sequence[int], device: torch.device | str | None = None
) -> np.ndarray:
    """``log_det_curve`` of points drawn uniformly from the unit sphere, once for each seed.

    The first points of a larger reference are those of a smaller one, so one curve serves every size up to
    ``size``.

    Args:
        size: m, the number of points.
        dimension: D.
        kernel: The kernel.
        seeds: One or more integers >= 0.
        device: Where to compute; the points are drawn on the CPU and so are the same everywhere.

    Returns:
        (seeds, m) float64 in nats.
    """
    if len(seeds) == 0:
        raise UserError("a log-det distance needs a reference: give at least one reference seed")
    kernel.check_budget(size, dimension)
    curves = []
    for seed in seeds:
        points = np.random.default_rng(seed).standard_normal((size, dimension))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        curves.append(log_det_curve(points, kernel, device))
    return np.stack(curves)


def greedy_curve(log_gains: np.ndarray, size: int, kernel: Kernel) -> np.ndarray:
    """The log-det curve of a greedy selection: (t,) log gains, t <= size -> (size,).

    A selection that stopped early did so because every further row is at or below the floor: these count as
    the floor.
    """
    missing = np.full(size - len(log_gains), math.log(kernel.floor))
    return np.cumsum(np.concatenate([log_gains, missing]))


def distance_from_curves(
    set_curves: np.ndarray, reference_curves: np.ndarray, *, subset: Subset, kernel: Kernel
) -> LogDetDistance:
    """The distance at every size from log-det curves, over all pairs of a draw and a reference.

    Args:
        set_curves: (draws, m) from ``log_det_curve`` or ``greedy_curve``.
        reference_curves: (seeds, m or more) from ``reference_curves``.
        subset: How the rows were drawn, for the record.
        kernel: The kernel that gave the curves; its floor tells which rows counted as it.
    """
    size = set_curves.shape[1]
    sizes = np.arange(1, size + 1)
    pairs = (reference_curves[None, :, :size] - set_curves[:, None, :]) / sizes  # (draws, seeds, m)
    means, stds = pairs.mean(axis=(0, 1)), pairs.std(axis=(0, 1))  # (m,)
    at_floor = np.diff(set_curves, axis=1, prepend=0.0) <= math.log(kernel.floor) + 1e-6  # (draws, m)
    return LogDetDistance(
        mean=float(means[-1]),
        std=float(stds[-1]),
        sizes=sizes.astype(np.int64),
        means=means,
        stds=stds,
        size=size,
        subset=subset,
        floored=int(at_floor.sum(axis=1).max()),
    )


def log_det_distance(
    features: Features,
    size: int,
    *,
    subset: Subset = "greedy",
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    draws: int = 1,
    reference_seeds: Sequence[int] = (0, 1, 2, 3, 4),
    seed: int = 0,
    ids: Ids | None = None,
    device: torch.device | str | None = None,
) -> LogDetDistance:
    """How far a dataset is from m points uniform on the sphere (Wang et al. 2024, arXiv 2402.02318).

    Distances are comparable between datasets at the same size, dimension and kernel only.

    Args:
        features: (N, D) rows of unit norm; float16, float32 or float64.
        size: m, the number of rows to take from the dataset, from 1 to N.
        subset: ``greedy``, the most diverse rows (how much room the dataset spans; below 0 is possible, as
            rows chosen well from many beat as many random points), or ``uniform``, a sample without
            replacement (how redundant a typical draw is).
        kernel: ``rbf`` or ``cosine``.
        gamma: The rbf's inverse squared length scale, > 0.
        ridge: Added to the kernel's diagonal; None is 0 for ``rbf``, 0.1 for ``cosine``.
        draws: The number of uniform samples; ``greedy`` has one subset, whatever this is.
        reference_seeds: One reference set for each.
        seed: Of the uniform samples; sample i depends on (seed, i) alone.
        ids: N distinct strings or integers, for ties and messages; the row index if None.
        device: Where to compute; needs float64.

    Raises:
        UserError: A size out of range or above the kernel's rank, rows that are not finite and of unit norm,
            no draw, no reference, or an unknown subset.
    """
    if subset not in get_args(Subset):
        raise UserError(f"there is no subset {subset!r}: use 'greedy' or 'uniform'")
    if draws < 1:
        raise UserError(f"there are {draws} draws: a uniform subset needs at least 1")
    similarity = Kernel(kernel, gamma, ridge)
    rows = unit_rows(features, ids, device)  # (N, D)
    size = check_size(size, len(rows))
    references = reference_curves(size, rows.shape[1], similarity, reference_seeds, rows.device)
    if subset == "greedy":
        order = id_order(ids, len(rows), rows.device)
        chosen = search(Textbook(rows, similarity, size), size, Objective(similarity), order)
        curves = greedy_curve(chosen.log_gains, size, similarity)[None]
    else:
        picks = [np.random.default_rng([seed, draw]).permutation(len(rows))[:size] for draw in range(draws)]
        curves = np.stack([log_det_curve(rows[torch.from_numpy(pick)], similarity) for pick in picks])
    return distance_from_curves(curves, references, subset=subset, kernel=similarity)
