"""Similarity kernels between unit-norm feature rows, and the check that rows are unit-norm.

Two kernels: ``rbf``, ``exp(-gamma ||x - y||^2)``, and ``cosine``, ``<x, y>``; both may add a ridge where an
item meets itself. Everything is float64 on the device that the features live on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydpp.errors import UserError

KernelName = Literal["rbf", "cosine"]
Features = np.ndarray | Tensor
Ids = Sequence[str] | Sequence[int] | np.ndarray

NORM_TOLERANCE = 2e-3
"""How far from 1 a stored norm may be: rounding to float16 moves each entry, so the norm too, by at most
2^-11 = 5e-4."""

EQUAL_ROWS = 1e-13
"""Rows whose inner product is this close to 1 are the same row: well above the rounding of an inner product
of unit rows (some 1e-15), well below what float32 storage can tell apart. So copies have similarity exactly
1, whatever the batch."""

RESIDUAL_FLOOR = 1e-10
"""Conditional variances at or below this fraction of the kernel's diagonal count as zero. A residual is the
diagonal less a sum of squares, with a rounding error of some 1e-14 of the diagonal (1,500 picks of sentence
embeddings): at the floor it still has three digits. Copies of a row land at 1e-15, a row and its own rounding
to float16 at 1e-7."""


@dataclass(frozen=True)
class Kernel:
    """A similarity kernel; 1 + ridge on its diagonal (Wang et al. 2024, arXiv 2402.02318, use ``rbf``).

    Attributes:
        name: ``rbf``, exp(-gamma ||x - y||^2), or ``cosine``, <x, y>.
        gamma: The inverse squared length scale of ``rbf``; > 0. ``cosine`` takes no notice of it.
        ridge: Added where an item meets itself, never between two items, even equal ones; >= 0.
            None becomes 0 for ``rbf`` and 0.1 for ``cosine``, whose rank is at most D without it.

    Raises:
        UserError: An unknown name, or gamma or ridge out of range.
    """

    name: KernelName = "rbf"
    gamma: float = 1.0
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.name not in ("rbf", "cosine"):
            raise UserError(f"there is no kernel {self.name!r}: use 'rbf' or 'cosine'")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError(f"gamma is {self.gamma}: it must be a number above 0")
        if self.ridge is None:
            object.__setattr__(self, "ridge", 0.1 if self.name == "cosine" else 0.0)
        elif not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise UserError(f"the ridge is {self.ridge}: it must be a number that is 0 or more")

    @property
    def variance(self) -> float:
        """k(x, x) of an item with itself: 1 + ridge, exactly."""
        return 1.0 + (self.ridge or 0.0)

    @property
    def floor(self) -> float:
        """The conditional variance at or below which an item counts as a copy (see ``RESIDUAL_FLOOR``)."""
        return RESIDUAL_FLOOR * self.variance

    def cross(self, a: Tensor, b: Tensor) -> Tensor:
        """Similarities between different items, so without a ridge: (n, D), (m, D) -> (n, m)."""
        similarity = a @ b.T
        similarity.masked_fill_(similarity > 1.0 - EQUAL_ROWS, 1.0)
        if self.name == "rbf":  # ||x - y||^2 = 2 - 2 <x, y> for unit rows
            similarity.sub_(1.0).mul_(2.0 * self.gamma).exp_()
        return similarity

    def matrix(self, features: Tensor) -> Tensor:
        """The kernel matrix of a set of items: (N, D) -> (N, N)."""
        matrix = self.cross(features, features)
        matrix.fill_diagonal_(self.variance)
        return matrix

    def column(self, features: Tensor, j: int) -> Tensor:
        """Column j of ``matrix(features)``: (N, D) -> (N,)."""
        column = self.cross(features, features[j : j + 1])[:, 0]
        column[j] = self.variance
        return column

    def diagonal(self, n: int, device: torch.device | str | None = None) -> Tensor:
        """The diagonal of the kernel matrix of n items: (n,)."""
        return torch.full((n,), self.variance, dtype=torch.float64, device=device)

    def max_rank(self, dimension: int) -> int | None:
        """The largest rank over D-dimensional rows: D for ``cosine`` without ridge, None for no limit."""
        return dimension if self.name == "cosine" and not self.ridge else None

    def check_budget(self, size: int, dimension: int) -> None:
        """Refuse a number of picks beyond the kernel's rank, where every determinant is 0.

        Raises:
            UserError: ``cosine`` without ridge and more than D picks.
        """
        rank = self.max_rank(dimension)
        if rank is not None and size > rank:
            raise UserError(
                f"a cosine kernel without ridge over {dimension} dimensions has rank at most {rank}, "
                f"but {size} items are asked for: set a ridge (0.1, say) or lower the size"
            )


def unit_rows(features: Features, ids: Ids | None = None, device: torch.device | str | None = None) -> Tensor:
    """Check that rows have unit norm up to their storage's rounding, and normalise them again in float64.

    Args:
        features: (N, D), of float16, float32 or float64. It is left as it is.
        ids: N names for messages; the row index if None.
        device: Where the result lives; by default the CPU, or where a tensor already is.

    Returns:
        (N, D) float64 with norms 1.

    Raises:
        UserError: Not a table of numbers, no rows, or rows that are not finite, all zeros, or off norm 1 by
            more than ``NORM_TOLERANCE``; the message names the first few.
    """
    if isinstance(features, Tensor):
        rows = features.detach().to(device=device, dtype=torch.float64, copy=True)
    else:
        try:
            rows = torch.from_numpy(np.array(features, dtype=np.float64)).to(device)
        except (TypeError, ValueError) as error:
            raise UserError(f"the features are not an (N, D) array of numbers: {error}") from error
    if rows.ndim != 2 or 0 in rows.shape:
        raise UserError(f"the features have shape {tuple(rows.shape)}: they must be N rows of D numbers")
    if ids is not None and len(ids) != len(rows):
        raise UserError(f"there are {len(ids)} ids for {len(rows)} rows: give one id for each row")

    norms = torch.linalg.vector_norm(rows, dim=1)  # (N,)
    finite = norms.isfinite()
    faults = {
        "with NaN or infinite entries": ~finite,
        "of zeros": norms == 0,
        "without unit norm": finite & (norms != 0) & ((norms - 1.0).abs() > NORM_TOLERANCE),
    }
    found = []
    for fault, mask in faults.items():
        bad = mask.nonzero()[:, 0].tolist()
        if bad:
            named = ", ".join(str(i if ids is None else ids[i]) for i in bad[:5])
            found.append(f"{len(bad)} of {len(rows)} rows {fault} (ids {named}{', ...' if len(bad) > 5 else ''})")
    if found:
        raise UserError(f"features cannot be used: {'; '.join(found)}. Drop these rows or divide by their norms")
    return rows.div_(norms[:, None])
