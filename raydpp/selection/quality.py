"""Quality scores on a common scale, whatever their columns measure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import median_abs_deviation

from raydpp.errors import UserError


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


def parse_score(text: str) -> Score:
    """``COLUMN`` or ``COLUMN=WEIGHT``, such as ``loss=-0.5``."""
    column, found, weight = text.partition("=")
    try:
        value = float(weight) if found else 1.0
    except ValueError:
        value = np.nan
    if not column or not np.isfinite(value) or value == 0.0:
        raise UserError(f"--quality {text}: give COLUMN or COLUMN=WEIGHT, with a weight other than 0")
    return Score(column, value)


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
