"""Which items the next picks will come from: a rehearsal with approximate residuals, before exact ones are paid for."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.working_set import DenseFront

SWAPS = 1.0
"""Picks may come in another order than in the rehearsal; what as many picks as this later would be the best is kept."""


@dataclass(frozen=True, eq=False)
class Rehearsal:
    """What a rehearsal found.

    Attributes:
        rows: (p,) int64, rising: the items that picks may come from.
        picks: (k,) the picks rehearsed, in order.
        highest: (k + 1,) float64: after so many of these picks, no other item of the rehearsal scores above.
    """

    rows: np.ndarray
    picks: list[int]
    highest: np.ndarray

    def after(self, done: set[int], count: int) -> int:
        """How many of the first picks rehearsed have been made, knowing that ``count`` have."""
        while count < len(self.picks) and self.picks[count] in done:
            count += 1
        return count


def rehearse(
    front: DenseFront, error: float, objective: Objective, eligible: np.ndarray, outside: float, fall: float, most: int
) -> Rehearsal:
    """Greedy picks inside a front whose residuals are only right up to an error.

    Residuals only fall, so what holds after some picks holds after more: the bounds are right whatever is picked
    beside the picks rehearsed, and the exact search may pick in another order.

    Args:
        front: n items; its covariance is approximate. It is used up.
        error: How far off a residual may be.
        objective: What a pick is worth.
        eligible: (n,) bool: what may be picked.
        outside: The highest score that an item outside the front may have.
        fall: By how much scores fall with each pick, about.
        most: How many picks to rehearse at the most.
    """
    rows, open_ = front.rows, eligible.copy()
    diversity, kernel = objective.diversity, objective.kernel
    offsets = np.zeros(len(rows)) if objective.offsets is None else objective.offsets[rows]
    wanted = np.zeros(len(rows), dtype=bool)
    picks: list[int] = []
    uppers: list[np.ndarray] = []
    while True:
        upper = objective.scores(front.residuals + error, rows)[1]  # (n,)
        upper[~open_] = -np.inf
        uppers.append(upper)
        j = int(upper.argmax())
        if upper[j] == -np.inf:
            break
        residual = max(front.residuals[j] - error, kernel.floor)
        sure = diversity * math.log(residual) + offsets[j]
        if len(picks) == most or front.residuals[j] <= max(2.0 * error, kernel.floor) or sure <= outside:
            break
        wanted |= upper >= sure - SWAPS * fall - 2.0 * diversity * error / residual
        front.pick(j)
        open_[j] = False
        picks.append(int(rows[j]))
    highest = np.where(wanted, -np.inf, uppers).max(axis=1)  # (k + 1,)
    return Rehearsal(rows[wanted], picks, highest)


class Outside:
    """What is known of the items outside a front while picks are made inside.

    Attributes:
        highest: No item outside scores above, but those of the rehearsal.
        rehearsal: What is known of the items that were in the rehearsal and are not in the front.

    Args:
        scores: (N,) float64: upper bounds on what each item is worth.
        reach: (N,) float64: how high rounding may have them reach (see ``Objective.scores``).
        order: (N,) int64: among tied items the one with the smallest is picked.
        front: (p,) the items that are not outside, in the front or in the rehearsal.
    """

    def __init__(self, scores: np.ndarray, reach: np.ndarray, order: np.ndarray, front: np.ndarray) -> None:
        inside = np.zeros(len(scores), dtype=bool)
        inside[front] = True
        self._reach = np.where(inside, -np.inf, reach)
        self._order = order
        self._best = scores.max(where=~inside, initial=-np.inf)
        self.highest = float(self._reach.max(initial=-np.inf))
        self.rehearsal: Rehearsal | None = None
        self._picks: set[int] = set()
        self._rehearsed = 0

    def picked(self, index: int) -> None:
        """Hear of a pick."""
        if self.rehearsal is not None:
            self._picks.add(index)
            self._rehearsed = self.rehearsal.after(self._picks, self._rehearsed)

    def below(self, best: float, reach: float, order: int) -> bool:
        """Whether an item of the front that ties with its best score, exact, goes before everything outside."""
        if self.rehearsal is not None and best <= self.rehearsal.highest[self._rehearsed]:
            return False
        if best > self.highest:
            return True
        if reach < self._best:
            return False
        return bool(order < self._order[self._reach >= best].min())
