"""Speculation: which items the next picks will come from, by approximate residuals, before exact ones are computed."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.working_set import WorkingSet

ORDER_SLACK = 1.0
"""Picks may come in another order than was speculated: what would be the best this many picks later is kept."""


@dataclass(frozen=True, eq=False)
class Speculation:
    """What speculation found."""

    rows: np.ndarray  # (p,) int64, rising: the items that picks may come from
    picks: list[int]  # (k,) the picks speculated, in order
    highest: np.ndarray  # (k + 1,) float64: after so many of these picks, no other item speculated on scores above

    def made(self, done: set[int], count: int) -> int:
        """How many of the first picks speculated have been made, knowing that ``count`` have."""
        while count < len(self.picks) and self.picks[count] in done:
            count += 1
        return count


def speculate(
    working_set: WorkingSet,
    error: float,
    objective: Objective,
    modular: np.ndarray,
    eligible: np.ndarray,
    rest: float,
    decrease: float,
    most: int,
) -> Speculation:
    """Greedy picks, ``most`` of them, inside a working set of n items whose residuals are right up to ``error``.

    ``rest`` is the highest score that an item outside may have, ``decrease`` by how much scores fall with each pick,
    about. The working set is used up.
    """
    rows, allowed = working_set.rows, eligible.copy()
    diversity, floor = objective.diversity, objective.kernel.floor
    wanted = np.zeros(len(rows), dtype=bool)
    picks: list[int] = []
    uppers: list[np.ndarray] = []
    while True:
        # The bound holds whatever is picked beside the picks speculated: residuals only fall, so what holds after
        # some picks holds after more, and the exact search may pick in another order.
        upper = objective.scores(working_set.residuals + error, modular)[1]  # (n,)
        upper[~allowed] = -np.inf
        uppers.append(upper)
        j = int(upper.argmax())
        if upper[j] == -np.inf:
            break
        residual = max(working_set.residuals[j] - error, floor)
        lower = diversity * math.log(residual) + modular[j]
        if len(picks) == most or working_set.residuals[j] <= max(2.0 * error, floor) or lower <= rest:
            break
        wanted |= upper >= lower - ORDER_SLACK * decrease - 2.0 * diversity * error / residual
        working_set.pick(j)
        allowed[j] = False
        picks.append(int(rows[j]))
    highest = np.where(wanted, -np.inf, uppers).max(axis=1)  # (k + 1,)
    return Speculation(rows[wanted], picks, highest)


class RestBound(ABC):
    """A bound on the items outside a working set: none scores above ``best``, nor is lifted above ``highest``."""

    def __init__(self, best: float, highest: float) -> None:
        self._best = best
        self.highest = highest

    def certifies(self, best: float, tie_bound: float, order: Any) -> bool:
        """Whether an item of the working set that ties with its best score goes before everything outside."""
        if best > self.highest:
            return True
        return tie_bound >= self._best and not self.may_precede(order, best)

    @abstractmethod
    def may_precede(self, order: Any, score: float) -> bool:
        """Whether an item outside that rounding may lift to this score may come first in order."""

    def picked(self, index: int) -> None:  # noqa: B027
        """Take a pick inside the working set into account."""


class LocalRest(RestBound):
    """Of items on this machine: all N but those ``inside``, in the working set or speculated on.

    Those speculated on may be above ``highest``; what bounds the ones left out of the working set is ``speculation``.
    """

    def __init__(self, scores: np.ndarray, tie_bound: np.ndarray, order: np.ndarray, inside: np.ndarray) -> None:
        outside = np.ones(len(scores), dtype=bool)
        outside[inside] = False
        self._tie_bound = np.where(outside, tie_bound, -np.inf)  # (N,)
        super().__init__(scores.max(where=outside, initial=-np.inf), float(self._tie_bound.max(initial=-np.inf)))
        self._order = order
        self.speculation: Speculation | None = None
        self._picks: set[int] = set()
        self._made = 0  # of the picks speculated

    def picked(self, index: int) -> None:
        if self.speculation is not None:
            self._picks.add(index)
            self._made = self.speculation.made(self._picks, self._made)

    def certifies(self, best: float, tie_bound: float, order: int) -> bool:
        if self.speculation is not None and best <= self.speculation.highest[self._made]:
            return False
        return super().certifies(best, tie_bound, order)

    def may_precede(self, order: int, score: float) -> bool:
        return bool(order >= self._order[self._tie_bound >= score].min())
