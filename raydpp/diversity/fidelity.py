"""How far cosines of projected gradients are from those of the gradients, by the two halves of the coordinates.

The halves are independent projections, each of which estimates the same cosine: half of what they differ by is, in
expectation of its square, the error of both together, whatever it comes of (the map of the inputs, the spreading over
D coordinates, the rounding to whole numbers). No gradient is computed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

SAMPLE = 512
"""Rows that tell: 130,816 pairs."""


@dataclass(frozen=True)
class Fidelity:
    """Of the cosines of n examples.

    Attributes:
        error: The root mean square error of a cosine of two different examples.
        spread: The standard deviation of the exact cosines over all pairs: that of those found less the error's share.
    """

    error: float
    spread: float

    @property
    def poor(self) -> bool:
        """Whether the error is above half of the spread: what a selection then tells apart is mostly noise."""
        return self.error > self.spread / 2

    def dimension_for(self, dimension: int, share: float = 0.25) -> int:
        """The power of two of coordinates with which the error would be this share of the spread or less.

        As far as it comes of their number, ``dimension``: an error of too few rows stays.
        """
        return 2 ** math.ceil(math.log2(dimension * (self.error / (share * max(self.spread, self.error / 16))) ** 2))

    def words(self, dimension: int) -> str:
        """The numbers, and where the error is too large what helps: for people."""
        said = f"a cosine of two examples is off by {self.error:.3f}; exact ones differ by {self.spread:.3f} (std)"
        if not self.poor:
            return said
        return (
            f"{said}: distances and selections are mostly noise. Extract with --dimension"
            f" {self.dimension_for(dimension)}, or more --lora-rank where that does not help"
        )


def fidelity(features: np.ndarray) -> Fidelity | None:
    """Of (n, D) projected gradients, of which the first ``SAMPLE`` rows count; None of fewer than three."""
    if len(features) < 3:
        return None
    first, second = (cosines[np.triu_indices(len(cosines), 1)] for cosines in cosines_of_halves(features[:SAMPLE]))
    error = float(np.sqrt(np.mean(np.square(first - second)))) / 2
    found = float((first / 2 + second / 2).var())
    return Fidelity(error, math.sqrt(max(0.0, found - error**2)))


def cosines_of_halves(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The cosines of the rows' first halves, and of their second ones: (n, D) -> (n, n), (n, n)."""
    halves = (half.astype(np.float32) for half in np.split(features, 2, axis=1))  # (n, D / 2) each
    first, second = (half / np.maximum(np.linalg.norm(half, axis=1, keepdims=True), 1e-30) for half in halves)
    return first @ first.T, second @ second.T
