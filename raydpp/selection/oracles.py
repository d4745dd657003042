"""Oracles: how the gain of each candidate is computed, apart from how the largest is found.

The gain in log det of adding item i to the picks S is log k(i, i | S), the log of the conditional variance of
i given S (the Schur complement). An oracle keeps these residuals up to date; every oracle must give the same
ones.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from raydpp.selection.kernels import Kernel


class Oracle(Protocol):
    """What a search asks of an oracle."""

    @property
    def residuals(self) -> Tensor:
        """(N,) float64: the conditional variance k(i, i | S) of each item given the picks; 0 for a pick."""

    def add(self, index: int) -> None:
        """Make item ``index`` a pick, and condition the residuals on it."""


class Textbook:
    """Fast greedy MAP by incremental Cholesky rows (Chen et al. 2018, arXiv 1709.05135, section 3).

    Costs O(N (D + t)) at pick t, so O(N M (D + M)) in all, bound by memory bandwidth; state is (M, N)
    float64. A pick whose residual is at or below the kernel's floor adds no direction and changes nothing but
    its own residual. Rows stored as float32 would halve the memory and leave errors of some 1e-6 in the
    residuals (1,500 picks of sentence embeddings; 1e-14 in float64), far above the floor and above what ties:
    the picks would depend on the order of rows, so float64 is what there is.

    Args:
        features: (N, D) float64 with unit rows (see ``unit_rows``).
        kernel: The kernel.
        size: M, the largest number of picks.
    """

    def __init__(self, features: Tensor, kernel: Kernel, size: int) -> None:
        self._features = features
        self._kernel = kernel
        self._rows = features.new_empty(size, len(features))  # (M, N), the first `_count` are in use
        self._count = 0
        self._residuals = kernel.diagonal(len(features), features.device)  # (N,)

    @property
    def residuals(self) -> Tensor:
        """(N,) float64: the conditional variance of each item given the picks."""
        return self._residuals

    def add(self, index: int) -> None:
        """Make item ``index`` a pick, and condition the residuals on it."""
        pivot = float(self._residuals[index])
        if pivot > self._kernel.floor:
            done = self._rows[: self._count]  # (t, N)
            row = self._kernel.column(self._features, index)  # (N,)
            row -= done[:, index] @ done
            row /= pivot**0.5
            self._residuals.addcmul_(row, row, value=-1.0).clamp_(min=0.0)
            self._rows[self._count] = row
            self._count += 1
        self._residuals[index] = 0.0
