"""What is known of the items outside a front: whether one of them may be a better pick."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from raydpp.selection.messages import Held
from raydpp.selection.scouting import Rehearsal


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

    def below(self, best: float, reach: float, order: int, margin: float) -> bool:
        """Whether an item of the front that ties with its best score, exact, goes before everything outside."""
        if self.rehearsal is not None and best + margin <= self.rehearsal.highest[self._rehearsed]:
            return False
        if best + margin > self.highest:
            return True
        if reach + margin < self._best:
            return False
        return margin > 0 or order < self._order[self._reach >= best].min()


class HeldBack:
    """What is known of the items that shards hold back. See ``Outside``."""

    def __init__(self, held: Sequence[Held]) -> None:
        self._held = held
        self._best = max(one.best for one in held)
        self._highest = max(float(one.reach.max(initial=-np.inf)) for one in held)

    def picked(self, index: int) -> None:
        """Nothing: what is held back is the same."""

    def below(self, best: float, reach: float, order: Any, margin: float) -> bool:
        """Whether an item of the front that ties with its best score, exact, goes before everything held back."""
        if best + margin > self._highest:
            return True
        if reach + margin < self._best:
            return False
        return margin > 0 or not any(one.before(order, best) for one in self._held)
