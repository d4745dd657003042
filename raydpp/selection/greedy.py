"""Greedy MAP search: how the largest gain is found, apart from how gains are computed (the oracle)."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydpp.errors import UserError
from raydpp.selection.kernels import Features, Ids, Kernel, KernelName, unit_rows
from raydpp.selection.oracles import Oracle, Textbook

TIE_RELATIVE = 1e-9
"""Residuals that differ by less than this fraction of themselves tie: oracles that sum in another order agree
to better than 1e-10, and a preference of 1e-9 nats is worth nothing."""

TIE_ABSOLUTE = 1e-12
"""So do residuals that differ by less than this fraction of the kernel's diagonal: their rounding error is
absolute (they are what subtraction leaves of the diagonal), so small residuals carry a large relative one."""

Progress = Callable[[int, float], None]


@dataclass(frozen=True, eq=False)
class Selection:
    """What greedy MAP picked.

    Attributes:
        indices: (m,) int64 row indices in the order of picking. Every prefix is the selection for that
            smaller budget.
        log_gains: (m,) float64: the log of each pick's conditional variance given the earlier picks, in nats;
            diversity only, whatever the quality weight. With a quality weight of 1 a copy can be picked: it
            counts as the floor.
        log_det: The sum of ``log_gains``: log det of the kernel matrix of the picks.
        stopped: Why there are fewer picks than asked for, in words; None if there are not.
    """

    indices: np.ndarray
    log_gains: np.ndarray
    log_det: float
    stopped: str | None = None


@dataclass(frozen=True)
class Objective:
    """(1 - w) log det K_S + w sum_{i in S} s_i, and what ties (Chen et al. 2018, section 5).

    Attributes:
        kernel: Its diagonal and floor give residuals their scale.
        weight: w in [0, 1]; 0 is diversity alone, 1 is the best scores alone.
    """

    kernel: Kernel
    weight: float = 0.0

    def scores(self, residuals: Tensor, quality: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gain in the objective of each candidate, and how far rounding may have moved it.

        Args:
            residuals: (n,) conditional variances.
            quality: (n,) scores s; only None if w is 0.

        Returns:
            scores: (n,); -inf where the residual is at or below the floor, unless w is 1.
            slack: (n,); candidate i ties with the best score b if ``scores[i] + slack[i] >= b``.
        """
        diversity = 1.0 - self.weight
        clamped = residuals.clamp(min=self.kernel.floor)
        scores = diversity * clamped.log()
        if quality is not None:
            scores += self.weight * quality
        slack = (self.kernel.variance / clamped).mul_(TIE_ABSOLUTE).clamp_(min=TIE_RELATIVE).mul_(diversity)
        slack += 1e-15 * scores.abs()  # the rounding of the score itself
        if self.weight < 1.0:
            scores.masked_fill_(residuals <= self.kernel.floor, -torch.inf)
        return scores, slack


def search(
    oracle: Oracle,
    size: int,
    objective: Objective,
    order: Tensor,
    quality: Tensor | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Pick the best candidate ``size`` times; nothing in a pick depends on how many are still to come.

    Args:
        oracle: Where the residuals come from; no pick has been made yet.
        size: The number of picks, at most N.
        objective: The trade-off between diversity and quality.
        order: (N,) int64, distinct: among tied candidates the one with the smallest is picked.
        quality: (N,) float64 scores; only None if the objective's weight is 0.
        progress: Called after each pick with the number of picks and the pick's log gain.
    """
    taken = torch.zeros_like(order, dtype=torch.bool)  # (N,)
    indices: list[int] = []
    log_gains: list[float] = []
    stopped = None
    floor = objective.kernel.floor
    while len(indices) < size:
        residuals = oracle.residuals  # (N,)
        scores, slack = objective.scores(residuals, quality)
        scores.masked_fill_(taken, -torch.inf)
        best = scores.max()
        if best == -torch.inf:
            stopped = (
                f"stopped at pick {len(indices) + 1} of {size}: nothing that is left adds to the picks "
                f"(largest conditional variance {float(residuals.max()):.1e}, floor {floor:.1e}); "
                "the rest are copies of picks, or the rank is used up"
            )
            break
        tied = scores + slack >= best
        index = int(torch.where(tied, order, len(order)).argmin())
        log_gains.append(float(residuals[index].clamp(min=floor).log()))
        indices.append(index)
        taken[index] = True
        oracle.add(index)
        if progress is not None:
            progress(len(indices), log_gains[-1])
    gains = np.array(log_gains, dtype=np.float64)
    return Selection(np.array(indices, dtype=np.int64), gains, float(gains.sum()), stopped)


def check_size(size: int, pool: int) -> int:
    """A budget as an int, refused unless it is a count from 1 to the size of the pool."""
    try:
        count = operator.index(size)
    except TypeError:
        raise UserError(f"a budget is a whole number of items, not {size!r}") from None
    if count < 1:
        raise UserError(f"a budget of {count} picks nothing: it must be at least 1")
    if count > pool:
        raise UserError(f"a budget of {count} is larger than the pool of {pool}: lower it or add rows")
    return count


def id_order(ids: Ids | None, rows: int, device: torch.device | str | None = None) -> Tensor:
    """The rank of each row's id among all ids: (N,) int64. Strings sort by code point; None: row index."""
    order = torch.arange(rows, device=device)
    if ids is None:
        return order
    names: list[Any] = ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
    try:
        ranked = sorted(range(rows), key=lambda row: names[row])
    except TypeError as error:
        raise UserError(f"ids must be all strings or all integers: {error}") from error
    for one, other in itertools.pairwise(ranked):
        if names[one] == names[other]:
            raise UserError(f"rows {one} and {other} have the same id {names[one]}: ids must be distinct")
    result = torch.empty_like(order)
    result[torch.tensor(ranked, device=device)] = order
    return result


def check_quality(quality: Sequence[float] | np.ndarray | Tensor | None, weight: float, rows: Tensor) -> Tensor | None:
    """The quality scores as (N,) float64 beside ``rows``, or None if they do not count."""
    if not 0.0 <= weight <= 1.0:
        raise UserError(f"the quality weight is {weight}: it must lie between 0 (diversity) and 1 (quality)")
    if quality is None:
        if weight > 0:
            raise UserError(
                f"a quality weight of {weight} needs quality scores: give one a row, or set the weight to 0"
            )
        return None
    values = quality.cpu() if isinstance(quality, Tensor) else quality
    scores = torch.from_numpy(np.array(values, dtype=np.float64)).to(rows.device)
    if scores.shape != (len(rows),):
        raise UserError(f"quality has shape {tuple(scores.shape)}: give one score for each of {len(rows)} rows")
    if not scores.isfinite().all():
        bad = (~scores.isfinite()).nonzero()[:, 0].tolist()
        raise UserError(f"{len(bad)} quality scores are NaN or infinite (rows {bad[:5]}): give finite ones")
    return scores if weight > 0 else None


def greedy_map(
    features: Features,
    size: int,
    *,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    quality: Sequence[float] | np.ndarray | Tensor | None = None,
    quality_weight: float = 0.0,
    ids: Ids | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select a diverse (and good) subset: greedy MAP inference of a determinantal point process.

    Each pick is the item that adds most to ``(1 - w) log det K_S + w sum_{i in S} s_i`` (Chen et al. 2018,
    arXiv 1709.05135, sections 3 and 5; for instruction data Wang et al. 2024, arXiv 2402.02318). Every prefix
    of a selection is the selection for a smaller budget. Ties, that is differences below rounding
    (``TIE_RELATIVE``, ``TIE_ABSOLUTE``), fall to the smallest id, so the picks do not depend on row order.

    The run ends early, and says so in ``stopped``, when all that is left is at or below the numerical floor
    (``RESIDUAL_FLOOR``): exact copies of picks, or a kernel whose rank is used up. With w = 1 diversity does
    not count and the run goes on: it is the top ``size`` by quality.

    Args:
        features: (N, D) rows of unit norm; float16, float32 or float64.
        size: M, the number of items to pick, from 1 to N.
        kernel: ``rbf`` or ``cosine``.
        gamma: The rbf's inverse squared length scale, > 0.
        ridge: Added to the kernel's diagonal; None is 0 for ``rbf``, 0.1 for ``cosine``.
        quality: (N,) finite scores s, larger is better, best on the scale of ``quality.standardise``.
        quality_weight: w in [0, 1]; needs ``quality`` unless it is 0.
        ids: N distinct strings or integers, for ties and messages; the row index if None.
        device: Where to compute; needs float64.
        progress: Called after each pick with the number of picks and the pick's log gain.

    Raises:
        UserError: A budget out of range or above the kernel's rank, rows that are not finite and of unit
            norm, quality that is missing or not finite, a weight outside [0, 1], or ids that repeat.
    """
    similarity = Kernel(kernel, gamma, ridge)
    rows = unit_rows(features, ids, device)  # (N, D)
    size = check_size(size, len(rows))
    scores = check_quality(quality, quality_weight, rows)
    if quality_weight < 1.0:
        similarity.check_budget(size, rows.shape[1])
    return search(
        Textbook(rows, similarity, size),
        size,
        Objective(similarity, quality_weight),
        id_order(ids, len(rows), rows.device),
        scores,
        progress,
    )
