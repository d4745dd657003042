"""The feature-space oracle: cosine + ridge, with a state that does not grow with the budget."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.bounds import Bounded, Bounds, Exact
from raydpp.dpp.oracles.working_set import DenseFront, LazyFront
from raydpp.errors import UserError

MIN_RIDGE = 1e-4
"""Below this ridge the D x D matrices are too ill-conditioned to agree with the other oracles to rounding."""

_COPIED = 0.15  # a pool of more than this part of the items is all of them: copies stay small


class FeatureSpace(Bounded):
    """Residuals of cosine + ridge in D x D: the weight-space view (Rasmussen & Williams 2006, section 2.1).

    With A = I + X_S^T X_S / ridge, the covariance of items given the picks S is X A^-1 X^T + ridge I. Bringing an
    item up to date costs O(D) for each pick it missed, and at most O(D^2): what each of the last D picks takes off the
    covariance is kept. So is what the next picks may come from, the pool. State is O(N + D^2), whatever the budget,
    and a copy of the pool's features where it is at most a seventh of the items.

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
    lookahead = 128
    scout_size = 768

    def __init__(self, rows: UnitRows, kernel: Kernel) -> None:
        if kernel.name != "cosine" or (kernel.ridge or 0.0) < MIN_RIDGE:
            raise UserError(
                f"the feature-space oracle needs kernel='cosine' with a ridge of at least {MIN_RIDGE:g}, not"
                f" {kernel.name!r} with {kernel.ridge:g}: use oracle='cholesky'"
            )
        self._rows = rows
        self._kernel = kernel
        self._ridge = float(kernel.ridge or 0.0)
        self._posterior = Posterior(rows, kernel)
        self._bounds = Bounds(len(rows), kernel.variance, torch.float32)
        self._dtype = torch.float32
        self._pool: np.ndarray | None = None  # (n,)
        self._pool_rows = rows  # (n, D)
        self._drops: list[Tensor] = []  # (k, D) of each of the last fronts, of at most D picks together

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        """Bring the bounds of these items, (n,) int64, up to date: they become the pool."""
        if len(rows) > _COPIED * len(self._rows):
            rows = np.arange(len(self._rows))
            if self._pool is not None and len(self._pool) == len(rows):
                return
        picks, seen = self._bounds.picks, self._bounds.seen
        behind = rows[seen[rows] < picks]  # (b,)
        oldest = picks - sum(len(drop) for drop in self._drops)
        if len(anew := behind[seen[behind] < oldest]):
            inverse = self._posterior.factor_anew().to(self._dtype)  # (D, D)
            self._bounds.approximate(anew, self._ridge + self._rows.square_sums(inverse.T, self._index(anew)), picks)
        start = picks
        for at in range(len(self._drops) - 1, -1, -1):
            start -= len(self._drops[at])
            if len(some := behind[seen[behind] == start]):
                drops = torch.cat(self._drops[at:])  # (k, D)
                self._lower(some, self._rows.square_sums(drops.T, self._index(some)))
        self._pool, self._pool_rows = rows, self._rows  # the last copy makes room for the next
        if len(rows) < len(self._rows):
            self._pool_rows = self._rows.part(self._index(rows))

    def _lower(self, rows: np.ndarray, drops: np.ndarray) -> None:
        """Take off the residuals of items, (n,), what all picks that they have not seen take off: (n,)."""
        self._bounds.approximate(rows, self._bounds.residuals[rows] - drops, self._bounds.picks)

    def _index(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(rows).to(self._rows.device)

    def scout(self, rows: np.ndarray) -> DenseFront | None:
        """The approximate residuals of these items, (n,) int64 and rising; None if they are not all in the pool."""
        if self._pool is None or not len(self._pool):
            return None
        place = np.searchsorted(self._pool, rows).clip(max=len(self._pool) - 1)  # (n,)
        if (self._pool[place] != rows).any():
            return None
        features = self._rows.take(self._index(rows), self._dtype)  # (n, D)
        given = features @ self._posterior.covariance.to(self._dtype)  # (n, D)

        def covariances(some: np.ndarray) -> np.ndarray:
            return (given @ features[torch.from_numpy(some).to(given.device)].T).double().numpy(force=True)

        return LazyFront(rows, self._bounds.residuals[rows], covariances)

    def open(self, rows: np.ndarray) -> DenseFront:
        """A front of these items, (p,) int64."""
        front = self._posterior.open(rows)
        self._measure(rows, front.residuals)
        return front

    def close(self, front: DenseFront) -> None:
        """Take the front's picks into account: in its own items and in the pool."""
        self._follow(self._posterior.close(front))
        self._bounds.exact(front.rows, front.residuals, front.picked)

    def append(self, features: Tensor, known: Exact) -> None:
        """Take picks made elsewhere into account, (k, D) float64, and the exact residuals of some items after them."""
        for some in features.split(self.front_size):
            self._follow(self._posterior.append(some))
        self._measure(*known.unpicked)
        self._bounds.exact(known.rows, known.residuals, known.picked)

    def _measure(self, rows: np.ndarray, residuals: np.ndarray) -> None:
        if self._bounds.measure(rows, residuals) and self._dtype == torch.float32:
            self._bounds.start_anew(torch.float64)
            self._dtype, self._pool, self._drops = torch.float64, None, []

    def _follow(self, drop: Tensor) -> None:
        """Take picks into account by what they take off the covariance, (k, D), in the pool; others will catch up."""
        if not len(drop):
            return
        self._bounds.picks += len(drop)
        self._drops.append(drop.to(self._dtype))
        while sum(len(drop) for drop in self._drops) > self._rows.dimension:
            self._drops.pop(0)  # to start anew costs no more
        if self._pool is not None:
            self._lower(self._pool, self._pool_rows.square_sums(drop.to(self._dtype).T))


class Posterior:
    """A = I + X_S^T X_S / ridge and its inverse (Rasmussen & Williams 2006, section 2.1), for the picks S.

    The covariance of items X given the picks is X A^-1 X^T + ridge I.

    Attributes:
        covariance: A^-1, (D, D) float64.
        rows: The features; more may come behind them.

    Args:
        rows: The (N, D) features.
        kernel: ``cosine`` with a ridge above 0.
    """

    def __init__(self, rows: UnitRows, kernel: Kernel) -> None:
        self.rows = rows
        self._ridge = float(kernel.ridge or 0.0)
        self._precision = torch.eye(rows.dimension, dtype=torch.float64, device=rows.device)  # A: (D, D)
        self.covariance = self._precision.clone()  # A^-1: (D, D)
        self._features = self._precision[:0]  # (p, D) of the last front

    def open(self, rows: np.ndarray) -> DenseFront:
        """A front of these items, (p,) int64: their exact covariance given the picks."""
        self._features = self.rows.take(torch.from_numpy(rows).to(self.rows.device))  # (p, D)
        return DenseFront(rows, self._given(self._features).numpy(force=True))

    def close(self, front: DenseFront) -> Tensor:
        """Take the picks of the last front opened into account. See ``append``."""
        if not front.picked:
            return self._features[:0]
        features = self._features[torch.tensor(front.picked, device=self.rows.device)]  # (k, D)
        factor = torch.from_numpy(front.columns[front.picked]).to(features).tril_()  # (k, k)
        return self._condition(features, factor)

    def append(self, features: Tensor) -> Tensor:
        """Take picks into account that are none of the rows, (k, D) float64 of unit norm.

        Returns:
            (k, D): what they take off the covariance is the sum of this one's rows' outer products.
        """
        return self._condition(features, torch.linalg.cholesky(self._given(features)))

    def factor_anew(self) -> Tensor:
        """Compute A^-1 from A, free of what updates have gathered of rounding; returns L^-1, (D, D), of A = L L^T."""
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
