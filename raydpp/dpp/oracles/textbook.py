"""The textbook oracle: every residual is brought up to date after every pick."""

from __future__ import annotations

import numpy as np

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel


class TextbookOracle:
    """Fast greedy MAP by incremental Cholesky rows (Chen et al. 2018, arXiv 1709.05135, section 3).

    Costs O(N (D + t)) at pick t, so O(N M (D + M)) in all, bound by memory bandwidth; state is (M + D, N)
    float64. A pick whose residual is at or below the kernel's floor adds no direction and changes nothing but
    its own residual. It is its own working set, of all items: residuals are exact and never stale.
    """

    min_candidates = 1
    speculation_size = 0
    error = 0.0

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int) -> None:
        n = len(rows)
        self._features = rows.take()  # (N, D)
        self._kernel = kernel
        self._columns = self._features.new_empty(size, n)  # (M, N), the first `_count` are in use
        self._count = 0
        self._residuals = self._features.new_full((n,), kernel.variance)  # (N,)
        self.working_set_size = self.lookahead = n
        self.rows = np.arange(n)
        self.stale = np.zeros(n, dtype=bool)

    @property
    def residuals(self) -> np.ndarray:
        return self._residuals.numpy(force=True)

    @property
    def bounds(self) -> np.ndarray:
        return self.residuals

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None: ...

    def approximate(self, rows: np.ndarray) -> None: ...

    def solve(self, rows: np.ndarray) -> TextbookOracle:
        return self

    def commit(self, working_set: TextbookOracle) -> None: ...

    def pick(self, j: int) -> None:
        pivot = float(self._residuals[j])
        if pivot > self._kernel.floor:
            done = self._columns[: self._count]  # (t, N)
            column = self._kernel.column(self._features, j)  # (N,)
            column -= done[:, j] @ done
            column /= pivot**0.5
            self._residuals.addcmul_(column, column, value=-1.0).clamp_(min=0.0)
            self._columns[self._count] = column
            self._count += 1
        self._residuals[j] = 0.0
