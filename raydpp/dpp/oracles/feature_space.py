"""The feature-space oracle: cosine + ridge, with a state that does not grow with the budget."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import MIN_RIDGE, Kernel
from raydpp.dpp.oracles.bounds import BoundedOracle
from raydpp.dpp.oracles.working_set import LazyWorkingSet, WorkingSet
from raydpp.errors import UserError

_COPIED = 0.15  # a pool of more than this part of the items is all of them: copies stay small
_BLOCK = 512  # picks made elsewhere that are appended together


class Posterior:
    """A = I + X_S^T X_S / ridge and its inverse (Rasmussen & Williams 2006, section 2.1), for the picks S.

    The covariance of items X given the picks is X A^-1 X^T + ridge I; ``covariance`` is A^-1, (D, D) float64. The state
    does not grow, whatever the size.
    """

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int = 0) -> None:
        self.rows = rows  # (N, D); more may come behind them
        self._ridge = float(kernel.ridge or 0.0)
        self._precision = torch.eye(rows.dimension, dtype=torch.float64, device=rows.device)  # A: (D, D)
        self.covariance = self._precision.clone()  # A^-1: (D, D)
        self._features = self._precision[:0]  # (p, D) of the last working set

    def solve(self, rows: np.ndarray) -> WorkingSet:
        self._features = self.rows.take(torch.from_numpy(rows).to(self.rows.device))  # (p, D)
        return WorkingSet(rows, self._given(self._features).numpy(force=True))

    def commit(self, working_set: WorkingSet) -> Tensor:
        """Take the picks of the last working set solved into account. See ``append``."""
        if not working_set.picked:
            return self._features[:0]
        features = self._features[torch.tensor(working_set.picked, device=self.rows.device)]  # (k, D)
        factor = torch.from_numpy(working_set.columns[working_set.picked]).to(features).tril_()  # (k, k)
        return self._condition(features, factor)

    def append(self, features: Tensor) -> Tensor:
        """Take picks into account that are none of the rows, (k, D) float64 of unit norm; returns a factor, (k, D).

        What they take off the covariance is the sum of its rows' outer products.
        """
        return torch.cat(
            [self._condition(some, torch.linalg.cholesky(self._given(some))) for some in features.split(_BLOCK)]
        )

    def refactor(self) -> Tensor:
        """Compute A^-1 from A, free of the rounding that updates add up; returns L^-1, (D, D), of A = L L^T."""
        factor = torch.linalg.cholesky(self._precision)
        self.covariance = torch.cholesky_inverse(factor)
        identity = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
        return torch.linalg.solve_triangular(factor, identity, upper=False)

    def _given(self, features: Tensor) -> Tensor:
        """The covariance of items given the picks: (p, D) -> (p, p)."""
        covariance = (features @ self.covariance) @ features.T
        covariance.diagonal().add_(self._ridge)
        return covariance

    def _condition(self, features: Tensor, factor: Tensor) -> Tensor:
        self._precision.addmm_(features.T, features, alpha=1.0 / self._ridge)
        drop = torch.linalg.solve_triangular(factor, features @ self.covariance, upper=False)  # (k, D)
        self.covariance.addmm_(drop.T, drop, alpha=-1.0)
        return drop


class FeatureSpaceOracle(BoundedOracle):
    """Residuals of cosine + ridge in D x D: the weight-space view (see ``Posterior``).

    Bringing an item up to date costs O(D) for each pick it missed, and at most O(D^2): what each of the last D picks
    takes off the covariance is kept. State is O(N + D^2), whatever the budget, and a copy of the pool's features where
    it is at most a seventh of the items.
    """

    posterior_type = Posterior
    working_set_size = 512
    min_candidates = 64
    _posterior: Posterior

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int, dtype: torch.dtype = torch.float32) -> None:
        self._ridge = float(kernel.ridge or 0.0)
        if kernel.name != "cosine" or self._ridge < MIN_RIDGE:
            raise UserError(
                f"the feature-space oracle needs kernel='cosine' with a ridge of at least {MIN_RIDGE:g}, not"
                f" {kernel.name!r} with {kernel.ridge:g}: use oracle='cholesky'"
            )
        super().__init__(rows, kernel, size, dtype)

    def _clear(self) -> None:
        self._pool_rows = np.empty(0, dtype=np.int64)
        self._pool_features = self._rows  # (n, D)
        self._drops: list[Tensor] = []  # (k, D) of each of the last working sets, of at most D picks together

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        if len(rows) > _COPIED * len(self._rows):
            rows = np.arange(len(self._rows))
            if len(self._pool_rows) == len(rows):
                return
        picks, seen = self._bounds.picks, self._bounds.seen
        behind = rows[seen[rows] < picks]  # (b,)
        oldest = picks - sum(len(drop) for drop in self._drops)
        if len(far := behind[seen[behind] < oldest]):  # behind by so much that the whole inverse costs no more
            inverse = self._posterior.refactor().to(self.dtype)  # (D, D)
            self._bounds.set_approximate(far, self._ridge + self._rows.square_sums(inverse.T, self._index(far)), picks)
        start = picks
        for at in range(len(self._drops) - 1, -1, -1):
            start -= len(self._drops[at])
            if len(some := behind[seen[behind] == start]):
                drops = torch.cat(self._drops[at:])  # (k, D)
                self._lower(some, self._rows.square_sums(drops.T, self._index(some)))
        self._pool_rows, self._pool_features = rows, self._rows  # the last copy makes room for the next
        if len(rows) < len(self._rows):
            self._pool_features = self._rows.part(self._index(rows))

    def _lower(self, rows: np.ndarray, drops: np.ndarray) -> None:
        """Take off the residuals of items, (n,), what all picks that they have not seen take off: (n,)."""
        self._bounds.set_approximate(rows, self._bounds.residuals[rows] - drops, self._bounds.picks)

    def _approximate(self, rows: np.ndarray, place: np.ndarray) -> LazyWorkingSet:
        features = self._rows.take(self._index(rows), self.dtype)  # (n, D)
        given = features @ self._posterior.covariance.to(self.dtype)  # (n, D)

        def covariances(some: np.ndarray) -> np.ndarray:
            return (given @ features[self._index(some)].T).double().numpy(force=True)

        return LazyWorkingSet(rows, self._bounds.residuals[rows], covariances)

    def _follow(self, appended: Tensor) -> None:
        for drop in appended.split(_BLOCK) if len(appended) else ():
            self._bounds.picks += len(drop)
            self._drops.append(drop.to(self.dtype))
            while sum(len(drop) for drop in self._drops) > self._rows.dimension:
                self._drops.pop(0)  # to refactor costs no more
            if len(self._pool_rows):
                self._lower(self._pool_rows, self._pool_features.square_sums(drop.to(self.dtype).T))
