"""The account of a search: what may still be picked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np


class Ledger:
    """What may still be picked; items only ever become ineligible.

    Attributes:
        eligible: (N,) bool: what may be picked next.
        left: How many items may still be picked at the most.
    """

    def __init__(
        self,
        eligible: np.ndarray,
        size: int,
        tokens: float | None = None,
        costs: np.ndarray | None = None,
        groups: np.ndarray | None = None,
        minimum: np.ndarray | None = None,
        maximum: np.ndarray | None = None,
    ) -> None:
        self.eligible = eligible
        self.left = size
        self._tokens = tokens
        self._costs = costs
        self._groups = np.zeros(len(eligible), dtype=np.int64) if groups is None else groups
        self._least = np.zeros(1) if minimum is None else minimum.copy()
        self._most = np.full(1, math.inf) if maximum is None else maximum.copy()
        if costs is not None and tokens is not None:
            eligible &= costs <= tokens
        for group in np.flatnonzero(self._most <= 0):
            eligible[self._groups == group] = False
        self._reserve()

    @property
    def full(self) -> bool:
        """Whether the budget is used up: no item more, or none that costs so little."""
        return self.left == 0 or (self._tokens is not None and not self.eligible.any())

    @property
    def at_most(self) -> int:
        """An upper bound on the number of picks that are still possible."""
        count = min(self.left, int(self.eligible.sum()))
        if self._costs is None or self._tokens is None:
            return count
        cheapest = np.cumsum(np.sort(self._costs[self.eligible]))
        return min(count, int(np.searchsorted(cheapest, self._tokens, side="right")))

    def take(self, index: int) -> None:
        """Book a pick."""
        group = self._groups[index]
        self.eligible[index] = False
        self.left -= 1
        if self._costs is not None and self._tokens is not None:
            self._tokens -= float(self._costs[index])
            self.eligible &= self._costs <= self._tokens
        self._most[group] -= 1
        if self._most[group] <= 0:
            self.eligible[self._groups == group] = False
        if self._least[group] > 0:
            self._least[group] -= 1
        self._reserve()

    @property
    def terms(self) -> tuple[float | None, np.ndarray]:
        """What may be picked next: the most that it may cost, and whether it may be of a group, (groups,) bool."""
        owed = bool(self._least.any()) and self.left <= self._least.sum()
        return self._tokens, (self._most > 0) & ((self._least > 0) | (not owed))

    def extend(self, rows: int) -> None:
        """Put rows behind the items that are never eligible."""
        self.admit(np.zeros(rows, dtype=np.int64), np.full(rows, math.inf))
        self.eligible[len(self.eligible) - rows :] = False

    def admit(self, groups: np.ndarray, costs: np.ndarray) -> None:
        """Put items behind the others, (n,) of these groups and costs, that meet the ``terms``."""
        self.eligible = np.concatenate([self.eligible, np.ones(len(groups), dtype=bool)])
        self._groups = np.concatenate([self._groups, groups])
        if self._costs is not None:
            self._costs = np.concatenate([self._costs, costs])

    def why_nothing(self) -> str:
        """Why nothing is eligible though the budget is not used up, in words."""
        return "the maxima of the sources leave nothing to pick" if np.isfinite(self._most).any() else "no item is left"

    def _reserve(self) -> None:
        """When what is left is owed to the minima, only their sources may be picked."""
        if self._least.any() and self.left <= self._least.sum():
            self.eligible &= (self._least > 0)[self._groups]


def in_order(ledger: Ledger, order: Iterable[int], progress: Callable[[int, float], None] | None = None) -> list[int]:
    """Take what is eligible, in this order, until the ledger is full; ``progress`` hears of NaN log gains."""
    picks: list[int] = []
    for index in order:
        if ledger.full:
            break
        if ledger.eligible[index]:
            ledger.take(int(index))
            picks.append(int(index))
            if progress is not None:
                progress(len(picks), math.nan)
    return picks
