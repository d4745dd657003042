"""What a selection already holds of an example that it leaves out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from raydpp.dpp.features import Features, Ids, UnitRows, unit_rows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import pivot_residuals

_BLOCK = 1024  # rows looked at together

COPY = 1 - 1e-6
"""The cosine from which on a row is a copy of another, up to rounding in float32."""


@dataclass(frozen=True, eq=False)
class Redundancy:
    """Of n examples beside m selected ones.

    Attributes:
        nearest: (n,) int64, the place of the selected example with the largest cosine, the first of equal ones.
        cosine: (n,) float64, that cosine.
        explained: (n,) float64, 0 to 1: the share of the example's variance, k(x, x), that all selected ones explain
            together: 1 - k(x, x | selected) / k(x, x). 1 for a copy (by a kernel without a ridge).
    """

    nearest: np.ndarray
    cosine: np.ndarray
    explained: np.ndarray


def redundancy(features: Features, selected: Features, kernel: Kernel, ids: Ids | None = None) -> Redundancy:
    """How redundant each of (n, D) rows is beside (m, D) selected ones, all of unit norm or of int8.

    The conditional variance is the one that greedy MAP would see next (Chen et al. 2018, arXiv 1709.05135, section 3).
    Costs n m (D + m) operations, and m^2 numbers of memory. ``ids`` name rows that cannot be used.
    """
    rows, picks = UnitRows(features, ids), unit_rows(selected)  # (n, D), (m, D)
    kept = pivot_residuals(picks, kernel) > kernel.floor * (1 + 1e-6)  # without copies, which have no inverse
    factor = torch.linalg.cholesky(kernel.matrix(picks[kept]))  # (k, k)
    nearest, cosine, explained = [], [], []
    for start in range(0, len(rows), _BLOCK):
        some = rows.take(slice(start, start + _BLOCK))  # (b, D)
        best = (some @ picks.T).max(dim=1)
        known = torch.linalg.solve_triangular(factor, kernel.cross(picks[kept], some), upper=False)  # (k, b)
        nearest.append(best.indices)
        cosine.append(best.values)
        explained.append((known.square().sum(0) / kernel.variance).clamp(0.0, 1.0))
    return Redundancy(*(torch.cat(parts).numpy(force=True) for parts in (nearest, cosine, explained)))


def prune_rank(log_gains: np.ndarray, kernel: Kernel, share: float) -> int | None:
    """The first pick, from 1, from which on each adds less than a share of an example's variance; None where none is.

    (m,) log gains in nats: those from there on are below ``log(share k(x, x))``, also where quality, or a baseline,
    picks in another order than that of gains.
    """
    above = np.flatnonzero(np.asarray(log_gains) >= np.log(share * kernel.variance))
    rank = int(above[-1]) + 2 if len(above) else 1
    return rank if rank <= len(log_gains) else None
