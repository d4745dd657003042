"""The Cholesky pool: stale bounds for all items, a pool of contenders brought up to date in matrix products."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.bounds import Bounded, Bounds, Exact, square_sums
from raydpp.dpp.oracles.factor import WIDTH, Factor, Panels
from raydpp.dpp.oracles.working_set import DenseFront, LazyFront

TILE = 4096
"""Rows conditioned together: their new columns stay in the processor's cache."""


class CholeskyPool(Bounded):
    """Lazy greedy over incremental Cholesky rows, for any kernel (Chen et al. 2018; Hemmi et al. 2022), in BLAS 3.

    A row of the Cholesky factor, v_i = L^-1 k(S, i), grows by whole panels of ``WIDTH`` picks, and only as far as it
    takes for the residual to fall below what the next picks are worth: items sleep at different depths. Those that
    stay above after all whole panels are the pool, which is conditioned on every front's picks. Fronts of the pool's
    best are solved again in float64 against the picks' own factor.

    Rows are stored as float32 and so their residuals, in which squares are summed in float64, are off by some 1e-7
    of the diagonal: they serve as bounds, raised by an error (see ``Bounds``). Picks and log gains come from fronts
    alone and are those of float64. When the largest residual falls to 50 times that error, where bounds would tell
    little apart, rows are computed anew and stored as float64 from then on, at twice the memory.

    Memory: 4 bytes for each row's entries so far (about 0.6 N M for sentence embeddings), 4 M^2 for the factor, and
    the pool.

    Args:
        rows: The (N, D) features.
        kernel: The kernel.
        size: M, the largest number of picks.
        storage: The type rows are stored as.
    """

    front_size = 256
    enough = 32
    lookahead = 128
    scout_size = 768

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int, storage: torch.dtype = torch.float32) -> None:
        self._rows = rows
        self._kernel = kernel
        self._factor = Factor(rows, kernel, size)
        self._bounds = Bounds(len(rows), kernel.variance, storage)
        self._store_as(storage)

    def _store_as(self, storage: torch.dtype) -> None:
        self._storage = storage
        self._panels = Panels(len(self._rows), storage, self._rows.device, WIDTH)
        self._depth = np.zeros(len(self._rows), dtype=np.int64)  # (N,) how many columns are stored: whole panels
        self._residuals = np.full(len(self._rows), self._kernel.variance)  # (N,) given as many picks as the depth
        self._pool: _Pool | None = None
        self._buffer = torch.empty(0, dtype=storage, device=self._rows.device)  # the pool's block, whatever its shape

    @property
    def storage(self) -> torch.dtype:
        """The type rows are stored as now."""
        return self._storage

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        """Bring the bounds of these items, (n,) int64, up to date (the pool), or below ``lowest``, (n,)."""
        self._break_up()
        edge = self._bounds.picks // WIDTH * WIDTH
        for start in range(0, edge, WIDTH):
            due = rows[self._depth[rows] == start]
            if len(due):
                self._deepen(due, start)
                high = self._bounds.upper_of(rows) >= lowest
                rows, lowest = rows[high], lowest[high]
        self._pool = self._new_pool(rows, edge)
        self._extend(self._pool)

    def _deepen(self, rows: np.ndarray, start: int) -> None:
        """Condition items, all of depth ``start``, on the next whole panel of picks."""
        stop = start + WIDTH
        factor = [
            (left, self._factor.block(start, stop, left, left + WIDTH, self._storage).T)
            for left in range(0, start, WIDTH)
        ]  # (WIDTH, WIDTH) each
        picked = self._factor.features[start:stop].to(self._storage)  # (WIDTH, D)
        for some in np.split(rows, range(TILE, len(rows), TILE)):
            index = torch.from_numpy(some).to(self._rows.device)  # (n,)
            new = self._kernel.cross(self._rows.take(index, self._storage), picked)  # (n, WIDTH)
            for left, block in factor:
                new.addmm_(self._panels.read(index, left), block, alpha=-1.0)
            solved = torch.empty_like(new)
            self._factor.solve(start, new, solved)
            self._store(some, index, start, solved)
        self._bounds.approximate(rows, self._residuals[rows], stop)

    def _store(self, rows: np.ndarray, index: Tensor, start: int, columns: Tensor) -> None:
        self._panels.write(index, start, columns)
        self._residuals[rows] -= square_sums(columns)
        self._depth[rows] = start + WIDTH

    def _new_pool(self, rows: np.ndarray, edge: int) -> _Pool:
        index = torch.from_numpy(rows).to(self._rows.device)
        features = self._rows.take(index, self._storage)
        width = edge + 2 * WIDTH
        if len(rows) * width > len(self._buffer):
            self._buffer = features.new_empty(len(rows) * width)
        block = self._buffer[: len(rows) * width].view(len(rows), width)
        for left in range(0, edge if len(rows) else 0, WIDTH):
            self._panels.read(index, left, out=block[:, left : left + WIDTH])
        return _Pool(index, rows, edge, features, block, self._residuals[rows])

    def scout(self, rows: np.ndarray) -> DenseFront | None:
        """The approximate residuals of these items, (n,) int64 and rising; None if they are not all in the pool."""
        pool = self._pool
        if pool is None or not len(pool.rows):
            return None
        place = np.searchsorted(pool.rows, rows).clip(max=len(pool.rows) - 1)  # (n,)
        if (pool.rows[place] != rows).any():
            return None
        index = torch.from_numpy(place).to(self._rows.device)
        features, block = pool.features[index], pool.block[:, : pool.seen].index_select(0, index)  # (n, D), (n, t)

        def covariances(some: np.ndarray) -> np.ndarray:
            index = torch.from_numpy(some).to(self._rows.device)
            return (
                self._kernel.cross(features, features[index])
                .addmm_(block, block[index].T, alpha=-1.0)
                .double()
                .numpy(force=True)
            )

        return LazyFront(rows, pool.residuals[place], covariances)

    def open(self, rows: np.ndarray) -> DenseFront:
        """A front of these items, (p,) int64, solved in float64."""
        front = self._factor.open(rows)
        if self._bounds.measure(rows, front.residuals) and self._storage == torch.float32:
            self._bounds.start_anew(torch.float64)
            self._store_as(torch.float64)
        return front

    def close(self, front: DenseFront) -> None:
        """Take the front's picks into account: in its own items, exactly, and in the pool."""
        self._factor.close(front)
        self._follow(len(front.picked))
        self._bounds.exact(front.rows, front.residuals, front.picked)

    def append(self, features: Tensor, known: Exact) -> None:
        """Take picks made elsewhere into account, (k, D) float64, and the exact residuals of some items after them."""
        self._factor.append(features)
        self._follow(len(features))
        if self._bounds.measure(*known.unpicked) and self._storage == torch.float32:
            self._bounds.start_anew(torch.float64)
            self._store_as(torch.float64)
        self._bounds.exact(known.rows, known.residuals, known.picked)

    def _follow(self, count: int) -> None:
        """Take the last ``count`` picks into account in the pool."""
        self._bounds.picks += count
        if self._pool is not None and self._bounds.picks > self._pool.block.shape[1]:
            self._break_up()
        if self._pool is not None:
            self._extend(self._pool)

    def _extend(self, pool: _Pool) -> None:
        """Condition the pool on the picks that it has not seen."""
        start, stop, block = pool.seen, self._bounds.picks, pool.block
        if start < stop and len(pool.rows):
            new = self._kernel.cross(pool.features, self._factor.features[start:].to(self._storage))  # (n, k)
            for left in range(0, start, WIDTH):
                right = min(left + WIDTH, start)
                factor = self._factor.block(start, stop, left, right, self._storage)  # (k, right - left)
                new.addmm_(block[:, left:right], factor.T, alpha=-1.0)
            self._factor.solve(start, new, block[:, start:stop])
            pool.residuals -= square_sums(block[:, start:stop])
        pool.seen = stop
        self._bounds.approximate(pool.rows, pool.residuals, stop)

    def _break_up(self) -> None:
        """Store the panels that the pool's rows have come to the end of; from now on there is no pool."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        for start in range(pool.edge, pool.seen - WIDTH + 1, WIDTH):
            self._store(pool.rows, pool.index, start, pool.block[:, start : start + WIDTH])


@dataclass(eq=False)
class _Pool:
    """Items conditioned on every pick.

    Attributes:
        index: (n,) int64 on the device, and ``rows`` on the host: the items.
        edge: How much of their rows of the factor is stored.
        features: (n, D).
        block: (n, edge and room for more): their rows of the factor side by side.
        residuals: (n,) float64: given the first ``seen`` picks.
    """

    index: Tensor
    rows: np.ndarray
    edge: int
    features: Tensor
    block: Tensor
    residuals: np.ndarray
    seen: int = field(init=False)

    def __post_init__(self) -> None:
        self.seen = self.edge
