"""The objective of a greedy search, and what counts as a tie in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import median_abs_deviation

from raydpp.dpp.kernels import Kernel
from raydpp.errors import UserError

TIE_RELATIVE = 1e-9
"""Residuals that differ by less than this fraction of themselves tie: oracles that sum in another order agree
to better than 1e-10, and a preference of 1e-9 nats is worth nothing."""

TIE_ABSOLUTE = 1e-12
"""So do residuals that differ by less than this fraction of the kernel's diagonal: their rounding error is
absolute (they are what subtraction leaves of the diagonal), so small residuals carry a large relative one."""


def modular_term(rows: int, weight: float, scores: np.ndarray | None, costs: np.ndarray | None) -> np.ndarray:
    """What each item is worth whatever was picked before, (N,) float64: quality, less what it costs.

    Args:
        rows: N.
        weight: w in [0, 1].
        scores: (N,) quality; None where it does not count.
        costs: (N,) above 0, by which residuals are divided; None where they do not count.
    """
    found = np.zeros(rows) if scores is None else weight * scores
    return found if costs is None else found - (1.0 - weight) * np.log(costs)


@dataclass(frozen=True, eq=False)
class Objective:
    """(1 - w) log det K_S + sum_{i in S} o_i (Chen et al. 2018, arXiv 1709.05135, section 5), and what ties.

    Attributes:
        kernel: Its diagonal and floor give residuals their scale.
        diversity: 1 - w in (0, 1].
        modular: (N,) float64: o_i, what an item is worth whatever was picked before: w times its quality, and
            less for what it costs. None for 0.
    """

    kernel: Kernel
    diversity: float = 1.0
    modular: np.ndarray | None = None

    def scores(self, residuals: np.ndarray, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The gain in the objective of each item, and how high rounding may have it reach. Both rise with residuals.

        Args:
            residuals: (n,) float64: conditional variances, or upper bounds on them.
            rows: (n,) which items these are.

        Returns:
            scores: (n,); -inf where the residual is at or below the floor.
            tie_bound: (n,); item i ties with the best score b if ``tie_bound[i] >= b``.
        """
        clamped = np.maximum(residuals, self.kernel.floor)
        scores = np.log(clamped)
        slack = np.divide(TIE_ABSOLUTE * self.kernel.variance, clamped, out=clamped)
        np.maximum(slack, TIE_RELATIVE, out=slack)
        if self.diversity != 1.0:
            scores *= self.diversity
            slack *= self.diversity
        if self.modular is not None:
            scores += self.modular[rows]
        slack += 1e-15 * np.abs(scores)  # the rounding of the score itself
        scores[residuals <= self.kernel.floor] = -np.inf
        slack += scores
        return scores, slack

    def residuals(self, score: float, rows: np.ndarray) -> np.ndarray:
        """The residuals at which items have this score: (n,) items -> (n,) float64."""
        level = score if self.modular is None else score - self.modular[rows]
        return np.broadcast_to(np.exp(level / self.diversity), rows.shape)


@dataclass(frozen=True)
class Score:
    """One column of a quality score.

    Attributes:
        column: Its name.
        weight: Its share of the score, relative to the other columns'; negative where less is better.
        center: What is subtracted: the median of the column over the whole table.
        scale: What it is divided by: its scaled median absolute deviation over the whole table.
    """

    column: str
    weight: float = 1.0
    center: float = 0.0
    scale: float = 1.0


def robust_scale(values: np.ndarray) -> tuple[float, float]:
    """The median and the median absolute deviation times 1.4826, the standard deviation of a normal distribution.

    A few outliers do not move them (Huber & Ronchetti 2009, chapter 5). Where more than half of the values are the
    same, the deviation is the standard deviation instead; 0 only if all are the same.
    """
    if values.size == 0 or np.ptp(values) == 0:
        return (float(values.flat[0]) if values.size else 0.0), 0.0
    deviation = float(median_abs_deviation(values, axis=None, scale="normal"))
    return float(np.median(values)), deviation or float(values.std())


def standardise(
    values: np.ndarray | Sequence[float], center: float | None = None, scale: float | None = None
) -> np.ndarray:
    """The robust z-scores of a quality column, such as the response length.

    Args:
        values: (N,) finite numbers.
        center: What to subtract; the median of ``values`` if None. Give the corpus's for a part of it.
        scale: What to divide by; that of ``robust_scale`` if None.

    Returns:
        (N,) float64. A constant column (or a ``scale`` of 0) tells nothing apart and becomes zeros.

    Raises:
        UserError: A value, the center or the scale is not finite, or the latter is negative.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise UserError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} quality values are NaN or infinite: "
            "give each row a finite number, or drop it"
        )
    own_center, own_scale = robust_scale(scores)
    center = own_center if center is None else center
    scale = own_scale if scale is None else scale
    if not (np.isfinite(center) and np.isfinite(scale) and scale >= 0):
        raise UserError(f"cannot standardise with center {center} and scale {scale}: give finite ones, scale >= 0")
    return np.zeros_like(scores) if scale == 0 else (scores - center) / scale


def combine(columns: Sequence[np.ndarray], scores: Sequence[Score]) -> np.ndarray:
    """The weighted mean of standardised columns: (N,) each -> (N,); weights count by their absolute values."""
    total = sum(abs(score.weight) for score in scores)
    parts = [
        score.weight / total * standardise(values, score.center, score.scale)
        for values, score in zip(columns, scores, strict=True)
    ]
    return np.sum(parts, axis=0)
