"""A working set: items whose conditional covariance fits in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class WorkingSet:
    """Picks by incremental Cholesky columns inside a small block (Chen et al. 2018, arXiv 1709.05135).

    Made of the items' covariance given the picks made before, (p, p) float64, which is kept and not changed.
    """

    def __init__(self, rows: np.ndarray, covariance: np.ndarray) -> None:
        self.rows = rows  # (p,) int64: the items
        self.residuals = covariance.diagonal().clip(min=0.0)  # (p,) float64: given all picks; 0 for a pick
        self.picked: list[int] = []  # places in rows, in order
        self._covariance = covariance
        self._columns = np.empty((len(rows), len(rows)))  # (p, p): row k is the Cholesky column of the k-th pick

    @property
    def columns(self) -> np.ndarray:
        """(p, k) float64: the Cholesky columns of the k picks."""
        return self._columns[: len(self.picked)].T

    def pick(self, j: int) -> None:
        """Make item ``rows[j]`` a pick, and condition the others on it: O(p k)."""
        done = self._columns[: len(self.picked)]  # (k, p)
        column = self._covariance_with(j) - done[:, j] @ done  # (p,)
        column /= self.residuals[j] ** 0.5
        self.residuals -= column * column
        np.maximum(self.residuals, 0.0, out=self.residuals)
        self.residuals[j] = 0.0
        self._columns[len(self.picked)] = column
        self.picked.append(j)

    def _covariance_with(self, j: int) -> np.ndarray:
        """(p,) float64: given the picks made before."""
        return self._covariance[j]


class LazyWorkingSet(WorkingSet):
    """A working set that computes covariances as picks need them, those of a block of the best items together.

    ``covariances`` are those of all items with some, given the picks made before: (k,) places -> (p, k) float64.
    """

    def __init__(
        self, rows: np.ndarray, residuals: np.ndarray, covariances: Callable[[np.ndarray], np.ndarray], block: int = 128
    ) -> None:
        super().__init__(rows, np.broadcast_to(residuals, (len(rows), len(rows))))
        self._compute = covariances
        self._block = block
        self._slots = np.full(len(rows), -1, dtype=np.int64)  # (p,) where an item's covariances are
        self._computed: list[np.ndarray] = []  # (p,) each

    def _covariance_with(self, j: int) -> np.ndarray:
        if self._slots[j] < 0:
            missing = np.where(self._slots < 0, self.residuals, -1.0)
            missing[j] = np.inf
            places = np.argsort(-missing)[: min(self._block, np.count_nonzero(self._slots < 0))]
            self._slots[places] = np.arange(len(self._computed), len(self._computed) + len(places))
            self._computed.extend(np.ascontiguousarray(self._compute(places).T))
        return self._computed[self._slots[j]]
