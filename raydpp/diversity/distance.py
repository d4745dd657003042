"""Log-det distance of a dataset from a maximally diverse one (Wang et al. 2024, arXiv 2402.02318).

``LDD_m = (log det K_R - log det K_S) / m``: S is m rows of the dataset, R is m points uniform on the unit sphere of the
same dimension. Nats per example; 0 is as diverse as the reference, larger is less diverse. The factorisation that gives
log det at size m gives it at every smaller size too, so the whole curve over m comes with it.

A singular set has log det -inf, and so an infinite distance. Here each row that its predecessors determine (a copy)
counts as the numerical floor instead (``RESIDUAL_FLOOR``, about -23 nats): distances stay finite, so that tables can be
compared, averaged and written as strict JSON, and two sets with different numbers of copies still differ.
``LogDetDistance.floored`` counts such rows: where it is not 0 the true distance is infinite.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from scipy.stats import norm

from raydpp.diversity.fidelity import cosines_of_halves
from raydpp.dpp import KernelName
from raydpp.dpp.budget import Budget, count_of
from raydpp.dpp.features import Features, Ids, Items, UnitRows, unit_rows
from raydpp.dpp.greedy import greedy
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import log_det_error, pivot_residuals
from raydpp.dpp.objective import Objective
from raydpp.errors import UserError, checked_seed

Subset = Literal["greedy", "uniform"]


@dataclass(frozen=True, eq=False)
class LogDetDistance:
    """A log-det distance and its curve, in nats per example.

    Attributes:
        mean: The distance at the full size m, a mean over all pairs of a draw and a reference.
        std: Its (population) standard deviation over the same pairs.
        sizes: (m,) int64: 1 to m.
        means: (m,) the distance of the first 1, 2, ... m rows; the last is ``mean``.
        stds: (m,) the standard deviation of each.
        size: m.
        subset: How the rows were taken from the dataset.
        error: How far it may be off as the features are projections (``projection_error``); None where they are none.
        sampling: By how much it would vary with other examples of the same kind, one standard deviation; None: unknown.
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
    error: float | None = None
    sampling: float | None = None

    @property
    def uncertainty(self) -> float:
        """How far it may be off, one standard deviation: by the projection, and by which examples it is of."""
        return math.hypot(self.error or 0.0, self.sampling or 0.0)

    def probability_below(self, other: LogDetDistance) -> float:
        """That this dataset is the more diverse one, were both errors normal; 0.5 where nothing is known of either."""
        off = math.hypot(self.uncertainty, other.uncertainty)
        return float(norm.cdf((other.mean - self.mean) / off)) if off else 0.5


def log_det_curve(features_in_order: Features, kernel: Kernel, device: torch.device | str | None = None) -> np.ndarray:
    """log det of the kernel matrix of the first 1, 2, ... m rows of unit norm, in nats: (m, D) -> (m,) float64.

    Always finite: a row that those before it determine counts as ``kernel.floor``.
    """
    gains = pivot_residuals(unit_rows(features_in_order, device=device), kernel)  # (m,)
    return np.cumsum(gains.log().cpu().numpy())


def reference_curves(
    size: int, dimension: int, kernel: Kernel, seeds: Sequence[int], device: torch.device | str | None = None
) -> np.ndarray:
    """``log_det_curve`` of m points drawn uniformly from the unit sphere, once for each seed: (seeds, m).

    The first points of a larger reference are those of a smaller one, so one curve serves every size up to m. They are
    drawn on the CPU, and so are the same on every device.
    """
    if len(seeds) == 0:
        raise UserError("a log-det distance needs a reference: give at least one reference seed")
    kernel.check_budget(size, dimension)
    curves = []
    for seed in seeds:
        points = np.random.default_rng(checked_seed("the reference seed", seed)).standard_normal((size, dimension))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        curves.append(log_det_curve(points, kernel, device))
    return np.stack(curves)


def greedy_curve(log_gains: np.ndarray, size: int, kernel: Kernel) -> np.ndarray:
    """The log-det curve of a greedy selection: (t,) log gains, t <= size -> (size,).

    A selection that stopped early did so as every further row is at or below the floor: these count as the floor.
    """
    missing = np.full(size - len(log_gains), math.log(kernel.floor))
    return np.cumsum(np.concatenate([log_gains, missing]))


def distance_from_curves(
    set_curves: np.ndarray,
    reference_curves: np.ndarray,
    *,
    subset: Subset,
    kernel: Kernel,
    error: float | None = None,
    drop_below: float | None = None,
    sampling: float | None = None,
) -> LogDetDistance:
    """The distance at every size over all pairs of a draw, (draws, m), and a reference, (seeds, m or more).

    The kernel that gave the curves tells by its floor which rows counted as it. Log gains below ``drop_below``, in
    nats, count as 0 in both (Wang et al. 2024, their code: -7).
    """
    size = set_curves.shape[1]
    sizes = np.arange(1, size + 1)
    of_set, of_reference = (_without_small_gains(c, drop_below) for c in (set_curves, reference_curves[:, :size]))
    pairs = (of_reference[None] - of_set[:, None]) / sizes  # (draws, seeds, m)
    means, stds = pairs.mean(axis=(0, 1)), pairs.std(axis=(0, 1))  # (m,)
    floored = np.diff(set_curves, axis=1, prepend=0.0) <= math.log(kernel.floor) + 1e-6  # (draws, m)
    return LogDetDistance(
        mean=float(means[-1]),
        std=float(stds[-1]),
        sizes=sizes.astype(np.int64),
        means=means,
        stds=stds,
        size=size,
        subset=subset,
        floored=int(floored.sum(axis=1).max()),
        error=error,
        sampling=sampling,
    )


def _without_small_gains(curves: np.ndarray, least: float | None) -> np.ndarray:
    """Log-det curves, (n, m), in which steps below some nats are 0."""
    gains = np.diff(curves, axis=1, prepend=0.0)
    return curves if least is None else np.where(gains < least, 0.0, gains).cumsum(axis=1)


MOST_WITH_ERROR = 4_000
"""The most rows of which ``projection_error`` is computed: it inverts their kernel matrix."""


def projection_error(features: np.ndarray, kernel: Kernel) -> float | None:
    """How far the distance of a set is off as its features are projections, root mean square, in nats per example.

    (m, D) features that ``gradients.projection`` made, of which the halves tell the error of every cosine (see
    ``fidelity``); ``log_det_error`` what that makes of log det. That the set was chosen by these cosines, and so in
    part for their errors, is not in it. None of more than ``MOST_WITH_ERROR`` rows, and of a singular kernel matrix.
    """
    if not 1 < len(features) <= MOST_WITH_ERROR:
        return None
    first, second = (torch.from_numpy(cosines).double() for cosines in cosines_of_halves(features))  # (m, m) each
    rows = unit_rows(features)  # (m, D)
    errors = kernel.slope(rows @ rows.T).mul_(first - second).div_(2).fill_diagonal_(0)
    total = log_det_error(kernel.matrix(rows), errors)
    return None if total is None else total / len(features)


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
    drop_below: float | None = None,
    device: torch.device | str | None = None,
) -> LogDetDistance:
    """How far a dataset is from m points uniform on the sphere (Wang et al. 2024, arXiv 2402.02318).

    Distances are comparable between datasets at the same size, dimension and kernel only.

    Args:
        features: (N, D) rows of unit norm, of float16, float32 or float64; or of int8 and any norm.
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
        drop_below: Log gains below this, in nats, count as 0, of the dataset and of the reference; None: none does.
        device: Where to compute; needs float64.

    Raises:
        UserError: A size out of range or above the kernel's rank, rows that are not finite and of unit norm,
            no draw, no reference, or an unknown subset.
    """
    if subset not in get_args(Subset):
        raise UserError(f"there is no subset {subset!r}: use 'greedy' or 'uniform'")
    if draws < 1:
        raise UserError(f"there are {draws} draws: a uniform subset needs at least 1")
    checked_seed("the seed", seed)
    similarity = Kernel(kernel, gamma, ridge)
    rows = UnitRows(features, ids, device)  # (N, D)
    size = count_of(size, len(rows))
    references = reference_curves(size, rows.dimension, similarity, reference_seeds, rows.device)
    if subset == "greedy":
        chosen = greedy(Items(features, ids), Budget(size), Objective(similarity), device=device)
        curves = greedy_curve(chosen.log_gains, size, similarity)[None]
    else:
        picks = [np.random.default_rng([seed, draw]).permutation(len(rows))[:size] for draw in range(draws)]
        curves = np.stack(
            [log_det_curve(rows.take(torch.from_numpy(pick).to(rows.device)), similarity) for pick in picks]
        )
    return distance_from_curves(curves, references, subset=subset, kernel=similarity, drop_below=drop_below)
