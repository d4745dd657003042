"""Which items a front is opened for: those that may be the next picks."""

from __future__ import annotations

import numpy as np


def best_rows(
    contenders: np.ndarray, scores: np.ndarray, reach: np.ndarray, stale: np.ndarray, order: np.ndarray, size: int
) -> np.ndarray:
    """The best contender and what ties with it; of more than fit, those that come first; then the next best.

    Args:
        contenders: (n,) items whose bounds are up to date.
        scores, reach: (N,) of every item, see ``Objective.scores``.
        stale: (N,) bool: whose bound is out of date.
        order: (N,) distinct: those with the smallest come first.
        size: How many to return at the most.
    """
    tied = np.flatnonzero(~stale & (reach >= scores[contenders].max()))
    if len(tied) > size:
        first = tied[np.argsort(order[tied])[: size - 1]]
        return np.unique(np.append(first, contenders[scores[contenders].argmax()]))
    rest = np.setdiff1d(contenders, tied, assume_unique=True)
    return np.concatenate([tied, rest[largest(scores[rest], size - len(tied))]])


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest ``count`` values are, in no order."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    return np.argpartition(values, len(values) - count)[len(values) - count :]
