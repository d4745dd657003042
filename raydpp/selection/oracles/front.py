"""A front whose conditional covariance fits in the processor's cache."""

from __future__ import annotations

import numpy as np


class DenseFront:
    """Picks by incremental Cholesky columns inside a small block (Chen et al. 2018, arXiv 1709.05135).

    Attributes:
        rows: (p,) int64: the items.
        residuals: (p,) float64: their conditional variances given all picks; 0 for a pick.
        picked: Places in ``rows`` of the picks, in order.

    Args:
        rows: (p,) int64.
        covariance: (p, p) float64: the items' covariance given the picks made before; kept, not changed.
    """

    def __init__(self, rows: np.ndarray, covariance: np.ndarray) -> None:
        self.rows = rows
        self.residuals = covariance.diagonal().clip(min=0.0)
        self.picked: list[int] = []
        self._covariance = covariance
        self._columns = np.empty_like(covariance)  # (p, p): column k is that of the k-th pick

    @property
    def columns(self) -> np.ndarray:
        """(p, k) float64: the Cholesky columns of the k picks."""
        return self._columns[:, : len(self.picked)]

    def pick(self, j: int) -> None:
        """Make item ``rows[j]`` a pick, and condition the others on it: O(p k)."""
        done = self.columns  # (p, k)
        column = self._covariance[:, j] - done @ done[j]
        column /= self.residuals[j] ** 0.5
        self.residuals -= column * column
        np.maximum(self.residuals, 0.0, out=self.residuals)
        self.residuals[j] = 0.0
        self._columns[:, len(self.picked)] = column
        self.picked.append(j)
