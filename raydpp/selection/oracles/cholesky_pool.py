"""The Cholesky pool: stale bounds for all items, a pool of contenders brought up to date in matrix products."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles.bounds import Bounds, square_sums
from raydpp.selection.oracles.factor import WIDTH, Factor
from raydpp.selection.oracles.front import DenseFront
from raydpp.selection.oracles.panels import Panels

POOL = 500.0
"""The pool holds POOL N / t of the items at pick t, so that keeping it costs about POOL N multiplications a pick,
beside the N M / 2 or so of bringing items into it. Between 300 and 600 the time is the same to 10 %."""

_SHRINK = 2.0  # a pool larger than it should be by this factor is broken up


class CholeskyPool:
    """Lazy greedy over incremental Cholesky rows, for any kernel (Chen et al. 2018; Hemmi et al. 2022), in BLAS 3.

    A row of the Cholesky factor, v_i = L^-1 k(S, i), is brought up to date only when item i joins the pool, for all
    the picks it has missed at once: a product with the factor and a triangular solve for the whole pool. Fronts
    of the pool's best are solved again in float64 against the picks' own factor.

    Rows are stored as float32 and so their residuals, in which squares are summed in float64, are off by some 1e-7
    of the diagonal: they serve as bounds, raised by an error (see ``Bounds``). Picks and log gains come from fronts
    alone and are those of float64. When the largest residual falls to 50 times that error, where bounds would tell
    little apart, rows are computed anew and stored as float64 from then on, at twice the memory.

    Memory: 4 bytes for each row's entries so far (about 0.8 N M for sentence embeddings), 4 M^2 for the factor, some
    4 POOL N for the pool.

    Args:
        rows: The (N, D) features.
        kernel: The kernel.
        size: M, the largest number of picks.
        storage: The type rows are stored as.
    """

    front_size = 256
    enough = 32

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int, storage: torch.dtype = torch.float32) -> None:
        self._rows = rows
        self._kernel = kernel
        self._factor = Factor(rows, kernel, size)
        self._bounds = Bounds(len(rows), kernel.variance, storage)
        self._store_as(storage)

    def _store_as(self, storage: torch.dtype) -> None:
        self._storage = storage
        self._panels = Panels(len(self._rows), storage, self._rows.device, WIDTH)
        self._pool: _Pool | None = None
        self._buffer = torch.empty(0, dtype=storage, device=self._rows.device)  # the pool's block, whatever its shape

    @property
    def storage(self) -> torch.dtype:
        """The type rows are stored as now."""
        return self._storage

    @property
    def pool_size(self) -> int:
        """How many items the pool holds at this stage."""
        n = len(self._rows)
        return min(n, max(4 * self.front_size, int(POOL * n / (self._bounds.picks + 1))))

    @property
    def bounds(self) -> np.ndarray:
        """(N,) float64: an upper bound on the residual of each item; 0 for a pick."""
        return self._bounds.upper

    @property
    def stale(self) -> np.ndarray:
        """(N,) bool: whose bound does not yet take the last picks into account."""
        return self._bounds.stale

    def refresh(self, rows: np.ndarray) -> None:
        """Bring the bounds of these items, (n,) int64, up to date: they become the pool."""
        self._break_up()
        picks = self._bounds.picks
        rows = rows[np.argsort(self._bounds.seen[rows], kind="stable")]
        steps = self._bounds.seen[rows]  # (n,) rising
        pool = self._pool = self._new_pool(rows, steps)
        edges = np.flatnonzero(np.diff(steps, prepend=-1, append=-1)).tolist()
        groups = [(slice(a, b), int(steps[a])) for a, b in itertools.pairwise(edges)]  # that have seen the same picks
        first = groups[0][1]
        missed = self._factor.features[first:].to(self._storage)
        rest = {step: self._kernel.cross(pool.features[group], missed[step - first :]) for group, step in groups}
        for start in range(0, picks, WIDTH):
            stop, top = min(start + WIDTH, picks), max(first, start)
            factor = self._factor.block(top, picks, start, stop, self._storage)  # (t - top, stop - start)
            known = slice(int(np.searchsorted(steps, start, side="right")), None)  # have come to this panel
            if known.start < len(rows):
                pool.block[known, start:stop] = self._panels.read(pool.index[known], start, stop)
            for group, step in groups:
                block, missing = pool.block[group, start:stop], rest[step]
                if step > start:
                    done = min(stop, step) - start
                    missing.addmm_(block[:, :done], factor[step - top :, :done].T, alpha=-1.0)
                if step < stop:
                    left = max(step, start)
                    solved = block[:, left - start :]
                    self._factor.solve(left, missing[:, left - step : stop - step], solved)
                    missing[:, stop - step :].addmm_(solved, factor[stop - top :, left - start :].T, alpha=-1.0)
        for group, step in groups:
            if step < picks:
                before = self._bounds.residuals[rows[group]] if step else self._kernel.variance
                self._bounds.approximate(rows[group], before - square_sums(pool.block[group, step:picks]))

    def _new_pool(self, rows: np.ndarray, steps: np.ndarray) -> _Pool:
        columns = self._bounds.picks + WIDTH
        if len(rows) * columns > len(self._buffer):
            self._buffer = self._buffer.new_empty(len(rows) * columns)
        block = self._buffer[: len(rows) * columns].view(len(rows), columns)
        index = torch.from_numpy(rows).to(self._rows.device)
        return _Pool(index, rows, steps, self._rows.take(index, self._storage), block)

    def open(self, rows: np.ndarray) -> DenseFront:
        """A front of these items, (p,) int64, solved in float64."""
        front = self._factor.open(rows)
        if self._bounds.measure(rows, front.residuals) and self._storage == torch.float32:
            self._bounds.start_anew(torch.float64)
            self._store_as(torch.float64)
        return front

    def close(self, front: DenseFront) -> None:
        """Take the front's picks into account: in its own items, exactly, and in the pool."""
        solved = self._factor.close(front)  # (p, t)
        start = self._bounds.picks
        if (pool := self._pool) is not None and (
            len(pool.rows) > _SHRINK * self.pool_size or start + len(front.picked) > pool.block.shape[1]
        ):
            self._break_up()
        self._bounds.picks += len(front.picked)
        if self._pool is not None and front.picked:
            self._extend(self._pool, start)
        behind = np.flatnonzero(self._bounds.stale[front.rows])  # not in the pool
        if len(behind):
            place = torch.from_numpy(behind).to(self._rows.device)
            rows = torch.from_numpy(front.rows).to(self._rows.device)
            self._panels.write(rows[place], 0, solved[place].to(self._storage))
        self._bounds.exact(front.rows, front.residuals, front.picked)

    def _extend(self, pool: _Pool, start: int) -> None:
        """Bring the pool, in which all have seen the first ``start`` picks, up to date."""
        stop, block = self._bounds.picks, pool.block
        new = self._kernel.cross(pool.features, self._factor.features[start:].to(self._storage))  # (n, k)
        for left in range(0, start, WIDTH):
            right = min(left + WIDTH, start)
            factor = self._factor.block(start, stop, left, right, self._storage)  # (k, right - left)
            new.addmm_(block[:, left:right], factor.T, alpha=-1.0)
        self._factor.solve(start, new, block[:, start:stop])
        live = self._bounds.among(pool.rows, start)  # not the picks of earlier fronts
        rows = pool.rows[live]
        self._bounds.approximate(rows, self._bounds.residuals[rows] - square_sums(block[:, start:stop])[live])

    def _break_up(self) -> None:
        """Store what the pool's rows have gained since it was made; from now on there is no pool."""
        pool, self._pool = self._pool, None
        if pool is None:
            return
        picks = self._bounds.picks
        live = self._bounds.among(pool.rows, picks)  # not the picks
        steps = pool.steps[live]
        place = torch.from_numpy(live).to(self._rows.device)
        for start in range(int(steps.min(initial=picks)) // WIDTH * WIDTH, picks, WIDTH):
            stop = min(start + WIDTH, picks)
            short = place[: int(np.searchsorted(steps, stop))]  # what is stored of these ends before
            self._panels.write(pool.index[short], start, pool.block[short, start:stop])


@dataclass(frozen=True, eq=False)
class _Pool:
    """Items brought up to date together.

    Attributes:
        index: (n,) int64 on the device, and ``rows`` on the host: the items.
        steps: (n,) int64, rising: how much is stored of their rows of the factor.
        features: (n, D).
        block: (n, t and room for more): their rows of the factor side by side.
    """

    index: Tensor
    rows: np.ndarray
    steps: np.ndarray
    features: Tensor
    block: Tensor
