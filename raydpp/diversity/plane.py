"""Where examples lie beside each other, in two of their dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.decomposition import PCA

from raydpp.dpp.features import Features, UnitRows

_FITTED = 5_000  # rows that the components are fitted to
_BLOCK = 1024  # rows looked at together


@dataclass(frozen=True, eq=False)
class Plane:
    """Where n rows lie in the plane of their first two principal components.

    Attributes:
        points: (n, 2) float32.
        explained: The share of the rows' variance that lies in the plane, 0 to 1.
    """

    points: np.ndarray
    explained: float


def principal_plane(blocks: Sequence[Features]) -> Plane:
    """The first two principal components of rows in blocks of (b, D), together (n, D): of unit norm, or of int8.

    By a randomized singular value decomposition (Halko et al. 2011, arXiv 0909.4061) of at most 5,000 rows spread
    evenly over them. Memory: those rows and a block in float32. UserError where rows are not finite or of unit norm.
    """
    rows = [UnitRows(block) for block in blocks]
    every = max(1, -(-sum(map(len, rows)) // _FITTED))
    fitted = torch.cat([one.take(slice(0, None, every), torch.float32) for one in rows])  # (f, D)
    components = min(2, *fitted.shape)
    plane = PCA(components, svd_solver="randomized", iterated_power=2, random_state=0)
    with np.errstate(invalid="ignore"):  # equal rows have no variance to share
        plane.fit(fitted.numpy(force=True))
    points = np.zeros((sum(map(len, rows)), 2), np.float32)
    starts = ((one, slice(start, start + _BLOCK)) for one in rows for start in range(0, len(one), _BLOCK))
    placed = [plane.transform(one.take(some, torch.float32).numpy(force=True)) for one, some in starts]  # (b, 2) each
    points[:, :components] = np.concatenate(placed)
    return Plane(points, float(np.nan_to_num(plane.explained_variance_ratio_.sum())))
