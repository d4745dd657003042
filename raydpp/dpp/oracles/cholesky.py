"""The Cholesky oracle: stale bounds for all items, a pool of candidates brought up to date in matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.oracles.bounds import BoundedOracle, square_sums
from raydpp.dpp.oracles.factor import WIDTH, Factor, Panels
from raydpp.dpp.oracles.working_set import LazyWorkingSet

TILE = 4096
"""Rows conditioned together: their new columns stay in the processor's cache."""


class CholeskyOracle(BoundedOracle):
    """Lazy greedy over incremental Cholesky rows, for any kernel (Chen et al. 2018; Hemmi et al. 2022), in BLAS 3.

    A row of the Cholesky factor, v_i = L^-1 k(S, i), grows by whole panels of ``WIDTH`` picks, and only until the
    residual is below what the next picks score: items stay stale at different depths. Those that are above after all
    whole panels are the pool, whose rows grow with every working set's picks.

    Rows are stored as float32 and so their residuals, in which squares are summed in float64, are off by some 1e-7
    of the diagonal. After a restart they are stored as float64, at twice the memory. That is 4 bytes for each entry so
    far (about 0.6 N M for sentence embeddings), 4 M^2 for the factor, and the pool.
    """

    posterior_type = Factor
    working_set_size = 256
    min_candidates = 32
    _posterior: Factor

    def _clear(self) -> None:
        n = len(self._rows)
        self._panels = Panels(n, self.dtype, self._rows.device, WIDTH)
        self._depth = np.zeros(n, dtype=np.int64)  # (N,) how many columns are stored: whole panels
        self._residuals = np.full(n, self._kernel.variance)  # (N,) given as many picks as the depth
        self._pool: _Pool | None = None
        self._pool_rows = np.empty(0, dtype=np.int64)
        self._buffer = torch.empty(0, dtype=self.dtype, device=self._rows.device)  # the pool's block, of any shape

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        self._flush_pool()
        edge = self._bounds.picks // WIDTH * WIDTH
        for start in range(0, edge, WIDTH):
            due = rows[self._depth[rows] == start]
            if len(due):
                self._extend_to_panel(due, start)
                high = self._bounds.upper(rows) >= lowest
                rows, lowest = rows[high], lowest[high]
        self._pool, self._pool_rows = self._new_pool(rows, edge), rows
        self._extend(self._pool)

    def _extend_to_panel(self, rows: np.ndarray, start: int) -> None:
        """Condition items, all of depth ``start``, on the next whole panel of picks."""
        stop = start + WIDTH
        factor = [
            (left, self._posterior.block(start, stop, left, left + WIDTH, self.dtype).T)
            for left in range(0, start, WIDTH)
        ]  # (WIDTH, WIDTH) each
        picked = self._posterior.features[start:stop].to(self.dtype)  # (WIDTH, D)
        for some in np.split(rows, range(TILE, len(rows), TILE)):
            index = self._index(some)  # (n,)
            new = self._kernel.cross(self._rows.take(index, self.dtype), picked)  # (n, WIDTH)
            for left, block in factor:
                new.addmm_(self._panels.read(index, left), block, alpha=-1.0)
            solved = torch.empty_like(new)
            self._posterior.solve_block(start, new, solved)
            self._store(some, index, start, solved)
        self._bounds.set_approximate(rows, self._residuals[rows], stop)

    def _store(self, rows: np.ndarray, index: Tensor, start: int, columns: Tensor) -> None:
        self._panels.write(index, start, columns)
        self._residuals[rows] -= square_sums(columns)
        self._depth[rows] = start + WIDTH

    def _new_pool(self, rows: np.ndarray, edge: int) -> _Pool:
        index = self._index(rows)
        features = self._rows.take(index, self.dtype)
        width = edge + 2 * WIDTH
        if len(rows) * width > len(self._buffer):
            self._buffer = features.new_empty(len(rows) * width)
        block = self._buffer[: len(rows) * width].view(len(rows), width)
        for left in range(0, edge if len(rows) else 0, WIDTH):
            self._panels.read(index, left, out=block[:, left : left + WIDTH])
        return _Pool(index, rows, edge, features, block, self._residuals[rows], seen=edge)

    def _approximate(self, rows: np.ndarray, place: np.ndarray) -> LazyWorkingSet:
        pool, index = self._pool, self._index(place)
        assert pool is not None
        features, block = pool.features[index], pool.block[:, : pool.seen].index_select(0, index)  # (n, D), (n, t)

        def covariances(some: np.ndarray) -> np.ndarray:
            index = self._index(some)
            found = self._kernel.cross(features, features[index]).addmm_(block, block[index].T, alpha=-1.0)
            return found.double().numpy(force=True)

        return LazyWorkingSet(rows, pool.residuals[place], covariances)

    def _follow(self, appended: Tensor) -> None:
        self._bounds.picks += len(appended)
        if self._pool is not None and self._bounds.picks > self._pool.block.shape[1]:
            self._flush_pool()
        if self._pool is not None:
            self._extend(self._pool)

    def _extend(self, pool: _Pool) -> None:
        """Condition the pool on the picks that it has not seen."""
        start, stop, block = pool.seen, self._bounds.picks, pool.block
        if start < stop and len(pool.rows):
            new = self._kernel.cross(pool.features, self._posterior.features[start:].to(self.dtype))  # (n, k)
            for left in range(0, start, WIDTH):
                right = min(left + WIDTH, start)
                factor = self._posterior.block(start, stop, left, right, self.dtype)  # (k, right - left)
                new.addmm_(block[:, left:right], factor.T, alpha=-1.0)
            self._posterior.solve_block(start, new, block[:, start:stop])
            pool.residuals -= square_sums(block[:, start:stop])
        pool.seen = stop
        self._bounds.set_approximate(pool.rows, pool.residuals, stop)

    def _flush_pool(self) -> None:
        """Store the whole panels of the pool's rows; from now on there is no pool."""
        # Panels are stored whole and once: the columns of one just begun are computed again in the next pool.
        pool, self._pool = self._pool, None
        self._pool_rows = np.empty(0, dtype=np.int64)
        if pool is None:
            return
        for start in range(pool.edge, pool.seen - WIDTH + 1, WIDTH):
            self._store(pool.rows, pool.index, start, pool.block[:, start : start + WIDTH])


@dataclass(eq=False)
class _Pool:
    """Items conditioned on every pick."""

    index: Tensor  # (n,) int64 on the device
    rows: np.ndarray  # (n,) on the host
    edge: int  # how much of their rows of the factor is stored
    features: Tensor  # (n, D)
    block: Tensor  # (n, edge and room for more): their rows of the factor side by side
    residuals: np.ndarray  # (n,) float64: given the first ``seen`` picks
    seen: int
