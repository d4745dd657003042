"""Oracles: how the gain of each candidate is computed, apart from how the largest is found.

The gain in log det of adding item i to the picks S is log k(i, i | S), the log of the conditional variance of
i given S (the Schur complement), its residual. Residuals only fall as S grows, so a stale one is an upper bound
(Minoux 1978; Hemmi et al. 2022). An oracle keeps such bounds for all items, refines those that are high enough to
matter, and solves a working set: a few items whose residuals are exact, and stay so while picks are made among them.
Every oracle must give the same residuals.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from raydpp.dpp.oracles.working_set import WorkingSet


class Solved(Protocol):
    """Items with exact residuals: a ``WorkingSet``, or all items of the textbook oracle."""

    @property
    def rows(self) -> np.ndarray:
        """(p,) int64: the items."""

    @property
    def residuals(self) -> np.ndarray:
        """(p,) float64: their conditional variances given all picks; 0 for a pick."""

    def pick(self, j: int) -> None:
        """Make item ``rows[j]`` a pick, and condition the others on it."""


class Oracle(Protocol):
    """What a search asks of an oracle."""

    working_set_size: int  # how many items a working set holds at most
    min_candidates: int  # fewer than these are not worth a working set while others can be refined
    lookahead: int  # for how many picks to come it pays to refine items at once
    speculation_size: int  # how many items ``approximate`` takes at most

    @property
    def bounds(self) -> np.ndarray:
        """(N,) float64: an upper bound on the residual of each item; 0 for a pick."""

    @property
    def stale(self) -> np.ndarray:
        """(N,) bool: whose bound does not yet take the last picks into account."""

    @property
    def error(self) -> float:
        """How far off the residuals of ``approximate`` may be."""

    def refine(self, rows: np.ndarray, lowest: np.ndarray) -> None:
        """Bring the bounds of these items, (n,) int64, up to date, or below ``lowest``, (n,) float64."""

    def approximate(self, rows: np.ndarray) -> WorkingSet | None:
        """A working set of these items, (n,) int64 rising, right up to the error; None if one is not up to date."""

    def solve(self, rows: np.ndarray) -> Solved:
        """The exact working set of these items, (p,) int64."""

    def commit(self, working_set: Any) -> None:
        """Take the picks of the last working set solved into account, at least in the bounds of its items."""
