"""Upper bounds on residuals in float32, working sets in float64: what the lazy oracles have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.working_set import LazyWorkingSet, WorkingSet

_NOISE = {torch.float32: 1e-6, torch.float64: 1e-13}  # the least error, as a fraction of the kernel's diagonal
_CAUTION = 4.0  # the error is this many times the largest difference measured
_RESOLUTION = 50.0  # bounds tell little apart where no residual is above this many errors
_PICKED = np.iinfo(np.int64).max  # what a pick has seen: it is never stale


class BoundedOracle(ABC):
    """Keeps ``Bounds`` for all items, and exact covariances given the picks (the posterior) for working sets.

    The items that the next picks may come from are the pool: their bounds are kept up to date after every working set.
    Other items stay stale until they are refined. Bounds are computed in ``dtype``; picks and log gains come from
    working sets alone, and are those of float64.
    """

    posterior_type: Any  # what solves working sets: made of rows, a kernel and the largest number of picks
    working_set_size: int
    min_candidates: int
    lookahead = 128
    speculation_size = 768
    _pool_rows: np.ndarray  # (n,) int64, rising

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int, dtype: torch.dtype = torch.float32) -> None:
        self._rows = rows
        self._kernel = kernel
        self._posterior = self.posterior_type(rows, kernel, size)
        self._bounds = Bounds(len(rows), kernel.variance, dtype)
        self.dtype = dtype
        self._clear()

    @property
    def bounds(self) -> np.ndarray:
        return self._bounds.upper()

    @property
    def stale(self) -> np.ndarray:
        return self._bounds.stale

    @property
    def error(self) -> float:
        return self._bounds.error

    @abstractmethod
    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        """Bring the bounds of these items, (n,) int64, up to date (the new pool), or below ``lowest``, (n,)."""

    def approximate(self, rows: np.ndarray) -> WorkingSet | None:
        pool = self._pool_rows
        if not len(pool):
            return None
        place = np.searchsorted(pool, rows).clip(max=len(pool) - 1)  # (n,)
        return self._approximate(rows, place) if (pool[place] == rows).all() else None

    def solve(self, rows: np.ndarray) -> WorkingSet:
        working_set: WorkingSet = self._posterior.solve(rows)
        self._measure(rows, working_set.residuals)
        return working_set

    def commit(self, working_set: WorkingSet) -> None:
        self._follow(self._posterior.commit(working_set))
        self._bounds.set_exact(working_set.rows, working_set.residuals, working_set.picked)

    def append(self, features: Tensor, known: Exact) -> None:
        """Take picks made elsewhere into account, (k, D) float64, and the exact residuals of some items after them."""
        self._follow(self._posterior.append(features))
        self._measure(*known.unpicked)
        self._bounds.set_exact(known.rows, known.residuals, known.picked)

    def _measure(self, rows: np.ndarray, residuals: np.ndarray) -> None:
        # Restart in float64: every residual left is so small that the error of float32 bounds hides their order.
        if self._bounds.measure(rows, residuals) and self.dtype == torch.float32:
            self.dtype = torch.float64
            self._bounds.restart(self.dtype)
            self._clear()

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self._rows.device)

    @abstractmethod
    def _clear(self) -> None:
        """Start without a pool and without anything computed for bounds."""

    @abstractmethod
    def _follow(self, appended: Tensor) -> None:
        """Take picks into account in the pool: what the posterior returned for them, (k, D)."""

    @abstractmethod
    def _approximate(self, rows: np.ndarray, place: np.ndarray) -> LazyWorkingSet:
        """A working set of items at these places in the pool."""


@dataclass(frozen=True, eq=False)
class Exact:
    """Residuals that are exact, given all picks."""

    rows: np.ndarray  # (n,) int64: the items
    residuals: np.ndarray  # (n,) float64; 0 for a pick
    picked: list[int]  # places in ``rows`` of the picks

    @classmethod
    def empty(cls) -> Exact:
        return cls(np.empty(0, dtype=np.int64), np.empty(0), [])

    @property
    def unpicked(self) -> tuple[np.ndarray, np.ndarray]:
        """The items that are no picks, and their residuals."""
        kept = np.delete(np.arange(len(self.rows)), self.picked)
        return self.rows[kept], self.residuals[kept]


class Bounds:
    """What is known of N residuals after some picks, computed in ``dtype`` or exactly.

    A residual computed in ``dtype`` counts as off by up to ``error``: at least 1e-6 of the kernel's diagonal in float32
    (1e-13 in float64) and four times the largest difference ever measured where one was computed exactly.
    """

    def __init__(self, rows: int, variance: float, dtype: torch.dtype) -> None:
        self.residuals = np.full(rows, variance)  # (N,) float64, as of ``seen``, exact or up to the error; 0 for a pick
        self.seen = np.zeros(rows, dtype=np.int64)  # (N,) how many picks each takes into account
        self.picks = 0  # how many there are
        self.error = _NOISE[dtype] * variance
        self._inexact = np.zeros(rows, dtype=bool)  # (N,)
        self._exact = self.residuals.copy()  # (N,) the last exact residual: none is above
        self._variance = variance

    @property
    def stale(self) -> np.ndarray:
        return self.seen < self.picks

    def upper(self, rows: np.ndarray | slice = slice(None)) -> np.ndarray:
        """No residual of these items is above: (n,) -> (n,) float64."""
        return np.minimum(self.residuals[rows] + self.error * self._inexact[rows], self._exact[rows])

    def set_approximate(self, rows: np.ndarray, residuals: np.ndarray, seen: int) -> None:
        """These residuals, right up to the error, take the first ``seen`` picks into account; picks stay picks."""
        live = self.seen[rows] <= seen
        rows = rows[live]
        self.residuals[rows] = np.maximum(residuals[live], 0.0)
        self._inexact[rows] = True
        self.seen[rows] = seen

    def set_exact(self, rows: np.ndarray, residuals: np.ndarray, picked: list[int]) -> None:
        """These residuals are exact and take all picks into account; ``picked`` are the places of picks in ``rows``."""
        self.residuals[rows] = self._exact[rows] = residuals
        self._inexact[rows] = False
        self.seen[rows] = self.picks
        self.seen[rows[picked]] = _PICKED

    def measure(self, rows: np.ndarray, residuals: np.ndarray) -> bool:
        """Raise the error to fit exact residuals; whether even the largest of these is too near the error."""
        compared = self._inexact[rows] & (self.seen[rows] == self.picks)
        if not compared.any():
            return False
        off = float(np.abs(residuals - self.residuals[rows])[compared].max())
        self.error = max(self.error, _CAUTION * off)
        return bool(residuals.max() < _RESOLUTION * self.error)

    def restart(self, dtype: torch.dtype) -> None:
        """Keep what is known as bounds, of no picks at all, and go on in another type."""
        self.residuals = self.upper()
        self._exact = self.residuals.copy()
        self.seen[self.seen != _PICKED] = 0
        self._inexact[:] = False
        self.error = _NOISE[dtype] * self._variance


def square_sums(block: Tensor) -> np.ndarray:
    """The sum of each row's squares, summed in float64, as float64: (n, k) -> (n,)."""
    return torch.linalg.vector_norm(block, dim=1, dtype=torch.float64).square_().numpy(force=True)
