"""Which items the next picks will come from: a speculation on approximate residuals, before exact ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.working_set import WorkingSet

ORDER_SLACK = 1.0
"""Picks may come in another order than was speculated: what would be the best this many picks later is kept."""


@dataclass(frozen=True, eq=False)
class Speculation:
    """What a speculation found.

    Attributes:
        rows: (p,) int64, rising: the items that picks may come from.
        picks: (k,) the picks rehearsed, in order.
        highest: (k + 1,) float64: after so many of these picks, no other item of the speculation scores above.
    """

    rows: np.ndarray
    picks: list[int]
    highest: np.ndarray

    def after(self, done: set[int], count: int) -> int:
        """How many of the first picks rehearsed have been made, knowing that ``count`` have."""
        while count < len(self.picks) and self.picks[count] in done:
            count += 1
        return count


def speculate(
    working_set: WorkingSet,
    error: float,
    objective: Objective,
    eligible: np.ndarray,
    outside: float,
    fall: float,
    most: int,
) -> Speculation:
    """Greedy picks inside a working set whose residuals are only right up to an error.

    Residuals only fall, so what holds after some picks holds after more: the bounds are right whatever is picked
    beside the picks rehearsed, and the exact search may pick in another order.

    Args:
        working_set: n items; its covariance is approximate. It is used up.
        error: How far off a residual may be.
        objective: What a pick is worth.
        eligible: (n,) bool: what may be picked.
        outside: The highest score that an item outside the working set may have.
        fall: By how much scores fall with each pick, about.
        most: How many picks to speculate at the most.
    """
    rows, allowed = working_set.rows, eligible.copy()
    diversity, kernel = objective.diversity, objective.kernel
    modular = np.zeros(len(rows)) if objective.modular is None else objective.modular[rows]
    wanted = np.zeros(len(rows), dtype=bool)
    picks: list[int] = []
    uppers: list[np.ndarray] = []
    while True:
        upper = objective.scores(working_set.residuals + error, rows)[1]  # (n,)
        upper[~allowed] = -np.inf
        uppers.append(upper)
        j = int(upper.argmax())
        if upper[j] == -np.inf:
            break
        residual = max(working_set.residuals[j] - error, kernel.floor)
        sure = diversity * math.log(residual) + modular[j]
        if len(picks) == most or working_set.residuals[j] <= max(2.0 * error, kernel.floor) or sure <= outside:
            break
        wanted |= upper >= sure - ORDER_SLACK * fall - 2.0 * diversity * error / residual
        working_set.pick(j)
        allowed[j] = False
        picks.append(int(rows[j]))
    highest = np.where(wanted, -np.inf, uppers).max(axis=1)  # (k + 1,)
    return Speculation(rows[wanted], picks, highest)


class LocalRest:
    """What is known of the items outside a working set while picks are made inside.

    Attributes:
        highest: No item outside scores above, but those of the speculation.
        speculation: What is known of the items that were in the speculation and are not in the working set.

    Args:
        scores: (N,) float64: upper bounds on what each item is worth.
        tie_bound: (N,) float64: how high rounding may have them reach (see ``Objective.scores``).
        order: (N,) int64: among tied items the one with the smallest is picked.
        working_set: (p,) the items that are not outside, in the working set or in the speculation.
    """

    def __init__(self, scores: np.ndarray, tie_bound: np.ndarray, order: np.ndarray, working_set: np.ndarray) -> None:
        inside = np.zeros(len(scores), dtype=bool)
        inside[working_set] = True
        self._reach = np.where(inside, -np.inf, tie_bound)
        self._order = order
        self._best = scores.max(where=~inside, initial=-np.inf)
        self.highest = float(self._reach.max(initial=-np.inf))
        self.speculation: Speculation | None = None
        self._picks: set[int] = set()
        self._rehearsed = 0

    def picked(self, index: int) -> None:
        """Hear of a pick."""
        if self.speculation is not None:
            self._picks.add(index)
            self._rehearsed = self.speculation.after(self._picks, self._rehearsed)

    def certifies(self, best: float, tie_bound: float, order: int) -> bool:
        """Whether an item of the working set that ties with its best score, exact, goes before everything outside."""
        if self.speculation is not None and best <= self.speculation.highest[self._rehearsed]:
            return False
        if best > self.highest:
            return True
        if tie_bound < self._best:
            return False
        return bool(order < self._order[self._reach >= best].min())
