"""Upper bounds on residuals, each as of some pick, exact or up to an error that is measured as the search goes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_NOISE = {torch.float32: 1e-6, torch.float64: 1e-13}
_CAUTION = 4.0
_RESOLUTION = 50.0
_GONE = np.iinfo(np.int64).max  # what a pick has seen: it is never out of date


@dataclass(frozen=True, eq=False)
class Exact:
    """Residuals that are exact, given all picks.

    Attributes:
        rows: (n,) int64: the items.
        residuals: (n,) float64; 0 for a pick.
        picked: Places in ``rows`` of the picks.
    """

    rows: np.ndarray
    residuals: np.ndarray
    picked: list[int]

    @classmethod
    def nothing(cls) -> Exact:
        """Of no items."""
        return cls(np.empty(0, dtype=np.int64), np.empty(0), [])

    @property
    def unpicked(self) -> tuple[np.ndarray, np.ndarray]:
        """The items that are no picks, and their residuals."""
        kept = np.delete(np.arange(len(self.rows)), self.picked)
        return self.rows[kept], self.residuals[kept]


class Bounds:
    """What is known of N residuals after some picks.

    A residual computed in ``dtype`` counts as off by up to ``error``: at least 1e-6 of the kernel's diagonal in float32
    (1e-13 in float64) and four times the largest difference ever met where one was computed exactly.

    Attributes:
        residuals: (N,) float64, each as of ``seen``, exact or up to the error; 0 for a pick.
        seen: (N,) int64: how many picks each takes into account.
        picks: How many picks there are.
        error: How far off a residual that is not exact may be.

    Args:
        rows: N.
        variance: The kernel's diagonal.
        dtype: What residuals that are not exact are computed in.
    """

    def __init__(self, rows: int, variance: float, dtype: torch.dtype) -> None:
        self.residuals = np.full(rows, variance)
        self.seen = np.zeros(rows, dtype=np.int64)
        self.picks = 0
        self._loose = np.zeros(rows, dtype=bool)  # (N,) whose residual is not exact
        self._exact = self.residuals.copy()  # (N,) the last exact residual: none is above
        self._variance = variance
        self.error = _NOISE[dtype] * variance

    @property
    def upper(self) -> np.ndarray:
        """(N,) float64: no residual is above."""
        return self.upper_of(slice(None))

    @property
    def stale(self) -> np.ndarray:
        """(N,) bool: whose bound does not yet take the last picks into account."""
        return self.seen < self.picks

    def upper_of(self, rows: np.ndarray | slice) -> np.ndarray:
        """``upper`` of some items: (n,) -> (n,)."""
        return np.minimum(self.residuals[rows] + self.error * self._loose[rows], self._exact[rows])

    def approximate(self, rows: np.ndarray, residuals: np.ndarray, seen: int) -> None:
        """These residuals, right up to the error, take the first ``seen`` picks into account; picks stay picks."""
        live = self.seen[rows] <= seen
        rows = rows[live]
        self.residuals[rows] = np.maximum(residuals[live], 0.0)
        self._loose[rows] = True
        self.seen[rows] = seen

    def exact(self, rows: np.ndarray, residuals: np.ndarray, picked: list[int]) -> None:
        """These residuals are exact and take all picks into account; ``picked`` are the places of picks in ``rows``."""
        self.residuals[rows] = self._exact[rows] = residuals
        self._loose[rows] = False
        self.seen[rows] = self.picks
        self.seen[rows[picked]] = _GONE

    def measure(self, rows: np.ndarray, residuals: np.ndarray) -> bool:
        """Compare with exact residuals, and raise the error to fit.

        Returns:
            Whether the largest of these residuals is so near the error that bounds tell little apart.
        """
        compared = self._loose[rows] & (self.seen[rows] == self.picks)
        if not compared.any():
            return False
        off = float(np.abs(residuals - self.residuals[rows])[compared].max())
        self.error = max(self.error, _CAUTION * off)
        return bool(residuals.max() < _RESOLUTION * self.error)

    def start_anew(self, dtype: torch.dtype) -> None:
        """Keep what is known as bounds, of no picks at all, and go on in another type."""
        self.residuals = self.upper
        self._exact = self.residuals.copy()
        self.seen[self.seen != _GONE] = 0
        self._loose[:] = False
        self.error = _NOISE[dtype] * self._variance


class Bounded:
    """What an oracle that keeps ``Bounds`` tells a search of them."""

    _bounds: Bounds

    @property
    def bounds(self) -> np.ndarray:
        """(N,) float64: an upper bound on the residual of each item; 0 for a pick."""
        return self._bounds.upper

    @property
    def stale(self) -> np.ndarray:
        """(N,) bool: whose bound does not yet take the last picks into account."""
        return self._bounds.stale

    @property
    def error(self) -> float:
        """How far off the residuals of the pool may be."""
        return self._bounds.error


def square_sums(block: Tensor) -> np.ndarray:
    """The sum of each row's squares, summed in float64, as float64: (n, k) -> (n,)."""
    return torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square_().numpy(force=True)
