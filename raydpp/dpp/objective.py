"""What a search maximises: a submodular term, log det, and a modular one, quality and costs; and what ties in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from raydpp.dpp.kernels import Kernel
from raydpp.errors import UserError

if TYPE_CHECKING:
    from raydpp.dpp.features import Numbers

TIE_RELATIVE = 1e-9
"""Residuals that differ by less than this fraction of themselves tie: oracles that sum in another order agree
to better than 1e-10, and a preference of 1e-9 nats is worth nothing."""

TIE_ABSOLUTE = 1e-12
"""So do residuals that differ by less than this fraction of the kernel's diagonal: their rounding error is
absolute (they are what subtraction leaves of the diagonal), so small residuals carry a large relative one."""


@dataclass(frozen=True)
class Objective:
    """(1 - w) log det K_S + sum_{i in S} m_i (Chen et al. 2018, arXiv 1709.05135, section 5).

    The modular term m_i is what an item adds whatever was picked before: w times its quality, in nats, less its cost.

    Attributes:
        kernel: The similarity of two items, K.
        quality_weight: w in [0, 1]: 0 is diversity alone, 1 is quality alone.
        quality_unit: What a quality of 1 is worth beside log det, in nats. Residuals of another kernel differ by other
            amounts: with their spread (``scale.residual_spread``) a weight means the same by every kernel.
    """

    kernel: Kernel
    quality_weight: float = 0.0
    quality_unit: float = 1.0

    def __post_init__(self) -> None:
        if not 0.0 <= self.quality_weight <= 1.0:
            raise UserError(
                f"the quality weight is {self.quality_weight}: it must lie between 0 (diversity) and 1 (quality)"
            )

    def __str__(self) -> str:
        weight = self.quality_weight
        judged = f", quality weight {weight:g}, a score of 1 worth {self.quality_unit:g} nats" if weight else ""
        return f"{self.kernel}{judged}"

    @property
    def diversity(self) -> float:
        """1 - w."""
        return 1.0 - self.quality_weight

    def modular(self, rows: int, quality: Numbers | None, costs: np.ndarray | None = None) -> np.ndarray:
        """The modular term of N = ``rows`` items: (N,) quality, (N,) costs above 0 -> (N,) float64.

        Costs divide an item's residual, so that picks add most per cost. Quality that is missing or not finite is
        refused.
        """
        scores = check_scores(quality, self.quality_weight, rows)
        modular = np.zeros(rows) if scores is None else self.quality_weight * self.quality_unit * scores
        return modular if costs is None else modular - self.diversity * np.log(costs)

    def scores(self, residuals: np.ndarray, modular: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What each item adds to the objective, and how high rounding may lift that; both rise with residuals.

        (n,) residuals, or upper bounds on them, and modular terms -> (n,) scores, -inf for a residual at or below the
        floor, and (n,) tie bounds: item i ties with the best score b if ``tie_bound[i] >= b``.
        """
        clamped = np.maximum(residuals, self.kernel.floor)
        scores = np.log(clamped)
        # Tie within rounding: what a score may be off by, from the relative and the absolute error of its residual.
        slack = np.divide(TIE_ABSOLUTE * self.kernel.variance, clamped, out=clamped)
        np.maximum(slack, TIE_RELATIVE, out=slack)
        if self.quality_weight:
            scores *= self.diversity
            slack *= self.diversity
        scores += modular
        slack += 1e-15 * np.abs(scores)  # the rounding of the score itself
        scores[residuals <= self.kernel.floor] = -np.inf
        slack += scores
        return scores, slack

    def residuals(self, score: float, modular: np.ndarray) -> np.ndarray:
        """The residuals at which items have this score: (n,) modular terms -> (n,)."""
        return np.exp((score - modular) / self.diversity)


def check_scores(quality: Numbers | None, weight: float, rows: int) -> np.ndarray | None:
    """The quality scores as (N,) float64, or None if they do not count."""
    if quality is None:
        if weight > 0:
            raise UserError(f"a quality weight of {weight} needs quality scores: give one a row, or the weight 0")
        return None
    scores = np.array(quality.numpy(force=True) if hasattr(quality, "numpy") else quality, dtype=np.float64)
    if scores.shape != (rows,):
        raise UserError(f"quality has shape {scores.shape}: give one score for each of {rows} rows")
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores)).tolist()
        raise UserError(f"{len(bad)} quality scores are NaN or infinite (rows {bad[:5]}): give finite ones")
    return scores if weight > 0 else None


@dataclass(frozen=True)
class Score:
    """One column of a quality score."""

    column: str
    weight: float = 1.0  # its share of the score, relative to the other columns'; negative where less is better
    center: float = 0.0  # what is subtracted: the median of the column over the whole table
    scale: float = 1.0  # what it is divided by: its scaled median absolute deviation over the whole table
    bounded: bool = False  # cut off at 0 and 1, where center and scale are a low quantile and the way to a high one


QUANTILES = (0.01, 0.99)
"""Between these Wang et al. (2024, their code) scale a score to [0, 1]."""


def quantile_scale(values: np.ndarray) -> tuple[float, float]:
    """The low one of ``QUANTILES``, and the difference of both; 0 only if nearly all are the same."""
    low, high = np.quantile(values, QUANTILES) if values.size else (0.0, 0.0)
    return float(low), float(high - low)


def robust_scale(values: np.ndarray) -> tuple[float, float]:
    """The median and the median absolute deviation times 1.4826, the standard deviation of a normal distribution.

    A few outliers do not move them (Huber & Ronchetti 2009, chapter 5). Where more than half of the values are the
    same, the deviation is the standard deviation instead; 0 only if all are the same.
    """
    from scipy.stats import median_abs_deviation

    if values.size == 0 or np.ptp(values) == 0:
        return (float(values.flat[0]) if values.size else 0.0), 0.0
    deviation = float(median_abs_deviation(values, axis=None, scale="normal"))
    return float(np.median(values)), deviation or float(values.std())


def standardise(
    values: np.ndarray | Sequence[float], center: float | None = None, scale: float | None = None
) -> np.ndarray:
    """The robust z-scores of a quality column, such as the response length: (N,) finite numbers -> (N,) float64.

    Center and scale are those of ``robust_scale`` if None; give the corpus's for a part of it. A constant column (or a
    ``scale`` of 0) tells nothing apart and becomes zeros.
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
    parts = []
    for values, score in zip(columns, scores, strict=True):
        part = standardise(values, score.center, score.scale)
        parts.append(score.weight / total * (part.clip(0, 1) if score.bounded else part))
    return np.sum(parts, axis=0)
