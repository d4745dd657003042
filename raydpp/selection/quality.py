"""Quality scores on a common scale."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raydpp.errors import UserError


def standardise(
    values: np.ndarray | Sequence[float], mean: float | None = None, std: float | None = None
) -> np.ndarray:
    """The z-scores of a quality column, such as the response length.

    Args:
        values: (N,) finite numbers.
        mean: The mean to subtract; that of ``values`` if None. Give the corpus's for a part of it.
        std: The (population) standard deviation to divide by; that of ``values`` if None.

    Returns:
        (N,) float64. A constant column (or a ``std`` of 0) tells nothing apart and becomes zeros.

    Raises:
        UserError: A value, the mean or the standard deviation is not finite, or the latter is negative.
    """
    scores = np.asarray(values, dtype=np.float64)
    if not np.isfinite(scores).all():
        raise UserError(
            f"{np.count_nonzero(~np.isfinite(scores))} of {scores.size} quality values are NaN or infinite: "
            "give each row a finite number, or drop it"
        )
    if scores.size == 0 or std == 0 or (std is None and np.ptp(scores) == 0):
        return np.zeros_like(scores)
    mean = float(scores.mean()) if mean is None else mean
    std = float(scores.std()) if std is None else std
    if not (np.isfinite(mean) and np.isfinite(std) and std > 0):
        raise UserError(f"cannot standardise with mean {mean} and standard deviation {std}: give finite ones, std >= 0")
    return (scores - mean) / std
