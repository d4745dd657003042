"""The objective of a greedy search, and what counts as a tie in it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raydpp.selection.kernels import Kernel

TIE_RELATIVE = 1e-9
"""Residuals that differ by less than this fraction of themselves tie: oracles that sum in another order agree
to better than 1e-10, and a preference of 1e-9 nats is worth nothing."""

TIE_ABSOLUTE = 1e-12
"""So do residuals that differ by less than this fraction of the kernel's diagonal: their rounding error is
absolute (they are what subtraction leaves of the diagonal), so small residuals carry a large relative one."""


def worth(
    rows: int, weight: float, scores: np.ndarray | None, costs: np.ndarray | None, cost_power: float
) -> np.ndarray:
    """What each item is worth whatever was picked before, (N,) float64: quality, less what it costs.

    Args:
        rows: N.
        weight: w in [0, 1].
        scores: (N,) quality; None where it does not count.
        costs: (N,) above 0; None where they do not count.
        cost_power: a: residuals are divided by cost^a.
    """
    found = np.zeros(rows) if scores is None else weight * scores
    return found if costs is None else found - (1.0 - weight) * cost_power * np.log(costs)


@dataclass(frozen=True, eq=False)
class Objective:
    """(1 - w) log det K_S + sum_{i in S} o_i (Chen et al. 2018, arXiv 1709.05135, section 5), and what ties.

    Attributes:
        kernel: Its diagonal and floor give residuals their scale.
        diversity: 1 - w in (0, 1].
        offsets: (N,) float64: o_i, what an item is worth whatever was picked before: w times its quality, and
            less for what it costs. None for 0.
    """

    kernel: Kernel
    diversity: float = 1.0
    offsets: np.ndarray | None = None

    def scores(self, residuals: np.ndarray, rows: np.ndarray | slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
        """The gain in the objective of each item, and how high rounding may have it reach. Both rise with residuals.

        Args:
            residuals: (n,) float64: conditional variances, or upper bounds on them.
            rows: (n,) which items these are.

        Returns:
            scores: (n,); -inf where the residual is at or below the floor.
            reach: (n,); item i ties with the best score b if ``reach[i] >= b``.
        """
        clamped = np.maximum(residuals, self.kernel.floor)
        scores = np.log(clamped)
        slack = np.divide(TIE_ABSOLUTE * self.kernel.variance, clamped, out=clamped)
        np.maximum(slack, TIE_RELATIVE, out=slack)
        if self.diversity != 1.0:
            scores *= self.diversity
            slack *= self.diversity
        if self.offsets is not None:
            scores += self.offsets[rows]
        slack += 1e-15 * np.abs(scores)  # the rounding of the score itself
        scores[residuals <= self.kernel.floor] = -np.inf
        slack += scores
        return scores, slack

    def residuals(self, score: float, rows: np.ndarray) -> np.ndarray:
        """The residuals at which items have this score: (n,) items -> (n,) float64."""
        worth = score if self.offsets is None else score - self.offsets[rows]
        return np.broadcast_to(np.exp(worth / self.diversity), rows.shape)
