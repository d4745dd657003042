"""Cosine + ridge given the picks, in D x D and in float64: the weight-space view."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles.front import DenseFront


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
