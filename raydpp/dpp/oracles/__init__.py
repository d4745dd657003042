"""Oracles: how the gain of each candidate is computed, apart from how the largest is found.

The gain in log det of adding item i to the picks S is log k(i, i | S), the log of the conditional variance of
i given S (the Schur complement), its residual. Residuals only fall as S grows, so one that is out of date is an
upper bound (Minoux 1978; Hemmi et al. 2022). An oracle keeps such bounds for all items, refines those that reach
high enough to matter, and opens a front: a few items whose residuals are exact, and stay so while items of the
front are picked. Every oracle must give the same residuals.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

import numpy as np

from raydpp.dpp.oracles.working_set import DenseFront


class Front(Protocol):
    """A set of items with exact residuals."""

    @property
    def rows(self) -> np.ndarray:
        """(p,) int64: the items."""

    @property
    def residuals(self) -> np.ndarray:
        """(p,) float64: their conditional variances given all picks; 0 for a pick."""

    def pick(self, j: int) -> None:
        """Make item ``rows[j]`` a pick, and condition the front on it."""


FrontT = TypeVar("FrontT", bound=Front)


class Oracle(Protocol[FrontT]):
    """What a search asks of an oracle."""

    @property
    def front_size(self) -> int:
        """How many items a front holds at the most."""

    @property
    def enough(self) -> int:
        """Fewer contenders than this are not worth a front while others can be refined."""

    @property
    def lookahead(self) -> int:
        """For how many picks to come it pays to refine items at once."""

    @property
    def bounds(self) -> np.ndarray:
        """(N,) float64: an upper bound on the residual of each item; 0 for a pick."""

    @property
    def stale(self) -> np.ndarray:
        """(N,) bool: whose bound does not yet take the last picks into account."""

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        """Bring the bounds of these items, (n,) int64, up to date, or below ``lowest``, (n,) float64."""

    @property
    def scout_size(self) -> int:
        """How many items ``scout`` takes at the most."""

    @property
    def error(self) -> float:
        """How far off the residuals of ``scout`` may be."""

    def scout(self, rows: np.ndarray) -> DenseFront | None:
        """Approximate residuals of these items, (n,) int64, all up to date, at little cost; None if there are none."""

    def open(self, rows: np.ndarray) -> FrontT:
        """A front of these items, (p,) int64."""

    def close(self, front: FrontT) -> None:
        """Take the front's picks into account, at least in the bounds of its items."""
