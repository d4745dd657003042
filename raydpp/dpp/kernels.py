"""Similarity kernels between unit-norm feature rows; their numbers have the type and the device of the features."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from raydpp.dpp import KernelName
from raydpp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

EQUAL_ROWS = 1e-13
"""Rows whose inner product is this close to 1 are the same row: well above the rounding of an inner product of unit
rows (some 1e-15), well below what float32 storage can tell apart. So copies have similarity exactly 1 in any batch."""

MIN_RIDGE = 1e-4
"""Below this ridge of a cosine kernel, D x D matrices are too ill-conditioned to agree with N x N ones to rounding."""

RESIDUAL_FLOOR = 1e-10
"""Conditional variances at or below this fraction of the kernel's diagonal count as zero. A residual is the diagonal
less a sum of squares, with a rounding error of some 1e-14 of the diagonal (1,500 picks of sentence embeddings): at the
floor it still has three digits. Copies of a row land at 1e-15, a row and its own rounding to float16 at 1e-7."""


@dataclass(frozen=True)
class Kernel:
    """A similarity kernel; 1 + ridge on its diagonal (Wang et al. 2024, arXiv 2402.02318, use ``rbf``).

    Attributes:
        name: ``rbf``, exp(-gamma ||x - y||^2), or ``cosine``, <x, y>.
        gamma: The inverse squared length scale of ``rbf``; > 0. Not for ``cosine``.
        ridge: Added where an item meets itself, never between two items, even equal ones; >= 0.
            None becomes 0 for ``rbf`` and 0.1 for ``cosine``, whose rank is at most D without it.
    """

    name: KernelName = "rbf"
    gamma: float = 1.0
    ridge: float | None = None

    def __post_init__(self) -> None:
        if self.name not in get_args(KernelName):
            raise UserError(f"there is no kernel {self.name!r}: use 'rbf' or 'cosine'")
        if not (math.isfinite(self.gamma) and self.gamma > 0):
            raise UserError(f"gamma is {self.gamma}: it must be a number above 0")
        if self.ridge is None:
            object.__setattr__(self, "ridge", 0.1 if self.name == "cosine" else 0.0)
        elif not (math.isfinite(self.ridge) and self.ridge >= 0):
            raise UserError(f"the ridge is {self.ridge}: it must be a number that is 0 or more")

    def __str__(self) -> str:
        return f"{self.name} kernel, " + (f"gamma {self.gamma:g}" if self.name == "rbf" else f"ridge {self.ridge:g}")

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

    def slope(self, cosines: Tensor) -> Tensor:
        """By how much similarities change with cosines, of any shape."""
        if self.name == "cosine":
            return cosines.new_ones(cosines.shape)
        return 2.0 * self.gamma * (2.0 * self.gamma * (cosines - 1.0)).exp()

    def check_budget(self, size: int, dimension: int) -> None:
        """Refuse more picks than the kernel's rank, where every determinant is 0: D for ``cosine`` without ridge."""
        if self.name == "cosine" and not self.ridge and size > dimension:
            raise UserError(
                f"a cosine kernel without ridge over {dimension} dimensions has rank at most {dimension}, "
                f"but {size} items are asked for: set a ridge (0.1, say) or lower the size"
            )
