"""The feature-space oracle: cosine + ridge, with a state that does not grow with the budget."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raydpp.errors import UserError
from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles.bounds import Bounds
from raydpp.selection.oracles.front import DenseFront

MIN_RIDGE = 1e-4
"""Below this ridge the D x D matrices are too ill-conditioned to agree with the other oracles to rounding."""

POOL = 5.0
"""The pool holds POOL D N / t of the items at pick t: all of them for the first POOL D picks, while every pick still
takes a little off every residual."""

_SHRINK = 2.0  # a pool larger than it should be by this factor is broken up


class FeatureSpace:
    """Residuals of cosine + ridge in D x D: the weight-space view (Rasmussen & Williams 2006, section 2.1).

    With A = I + X_S^T X_S / ridge, the covariance of items given the picks S is X A^-1 X^T + ridge I. Bringing n
    items up to date costs O(n D^2) however many picks they missed; keeping a pool so costs O(n D) a pick. State
    is O(N + D^2), whatever the budget, and the features of a pool of at most half of the items.

    The pool's residuals are computed in float32 and serve as bounds (see ``Bounds``); picks and log gains come from
    fronts, in float64.

    Args:
        rows: The (N, D) features.
        kernel: ``cosine`` with a ridge of at least ``MIN_RIDGE``.

    Raises:
        UserError: Another kernel, or too small a ridge.
    """

    front_size = 512
    enough = 64

    def __init__(self, rows: UnitRows, kernel: Kernel) -> None:
        if kernel.name != "cosine" or (kernel.ridge or 0.0) < MIN_RIDGE:
            raise UserError(
                f"the feature-space oracle needs kernel='cosine' with a ridge of at least {MIN_RIDGE:g}, not"
                f" {kernel.name!r} with {kernel.ridge:g}: use oracle='cholesky'"
            )
        self._rows = rows
        self._kernel = kernel
        self._ridge = float(kernel.ridge or 0.0)
        self._precision = torch.eye(rows.dimension, dtype=torch.float64, device=rows.device)  # A: (D, D)
        self._covariance = self._precision.clone()  # A^-1: (D, D)
        self._bounds = Bounds(len(rows), kernel.variance, torch.float32)
        self._dtype = torch.float32
        self._pool: np.ndarray | None = None  # (n,)
        self._pool_rows = rows  # (n, D)
        self._front_features = self._precision[:0]  # (p, D)

    @property
    def pool_size(self) -> int:
        """How many items the pool holds at this stage."""
        n = len(self._rows)
        return min(n, max(4 * self.front_size, int(POOL * self._rows.dimension * n / (self._bounds.picks + 1))))

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
        factor = torch.linalg.cholesky(self._precision)  # (D, D)
        self._covariance = torch.cholesky_inverse(factor)
        if len(rows) > len(self._rows) // 2:
            self._pool, self._pool_rows = np.arange(len(self._rows)), self._rows
        else:
            self._pool, self._pool_rows = rows, self._rows.part(torch.from_numpy(rows).to(self._rows.device))
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        inverse = torch.linalg.solve_triangular(factor, identity, upper=False).to(self._dtype)  # (D, D)
        residuals = self._ridge + self._pool_rows.square_sums(inverse.T)
        live = np.flatnonzero(self._bounds.seen[self._pool] <= self._bounds.picks)  # not picks
        self._bounds.approximate(self._pool[live], residuals[live])

    def open(self, rows: np.ndarray) -> DenseFront:
        """A front of these items, (p,) int64."""
        features = self._front_features = self._rows.take(torch.from_numpy(rows).to(self._rows.device))  # (p, D)
        covariance = (features @ self._covariance) @ features.T  # (p, p)
        covariance.diagonal().add_(self._ridge)
        front = DenseFront(rows, covariance.numpy(force=True))
        if self._bounds.measure(rows, front.residuals) and self._dtype == torch.float32:
            self._bounds.start_anew(torch.float64)
            self._dtype, self._pool = torch.float64, None
        return front

    def close(self, front: DenseFront) -> None:
        """Take the front's picks into account: in its own items and in the pool."""
        if front.picked:
            picked = torch.tensor(front.picked, device=self._rows.device)
            features = self._front_features[picked]  # (k, D)
            factor = torch.from_numpy(front.columns[front.picked]).to(features).tril_()  # (k, k)
            self._precision.addmm_(features.T, features, alpha=1.0 / self._ridge)
            drop = torch.linalg.solve_triangular(factor, features @ self._covariance, upper=False)  # (k, D)
            self._covariance.addmm_(drop.T, drop, alpha=-1.0)
            start = self._bounds.picks
            self._bounds.picks += len(front.picked)
            if self._pool is not None and len(self._pool) > _SHRINK * self.pool_size:
                self._pool = None
            if self._pool is not None:
                self._extend(self._pool, drop, start)
        self._bounds.exact(front.rows, front.residuals, front.picked)

    def _extend(self, pool: np.ndarray, drop: Tensor, start: int) -> None:
        """Condition the pool on picks that take ``drop``^T ``drop``, (k, D), off the covariance."""
        drops = self._pool_rows.square_sums(drop.to(self._dtype).T)  # (n,)
        live = self._bounds.among(pool, start)  # not the picks of earlier fronts
        self._bounds.approximate(pool[live], self._bounds.residuals[pool[live]] - drops[live])
