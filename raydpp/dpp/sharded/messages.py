"""What the shards of an exact search and the one who picks tell each other in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class RoundUpdate:
    """What every shard is told in a round.

    Attributes:
        number: The round's.
        known: How many picks were told before.
        features: (k, D) the picks made since, in order, as they are stored.
        last_score: The last pick's score; None where there is none.
        expected_decrease: How far below it the next picks may be.
        count: How many candidates to send at the most.
        tokens: The most that an item may cost.
        blocked: Sources of which nothing may be picked any more.
    """

    number: int
    known: int
    features: np.ndarray
    last_score: float | None
    expected_decrease: float
    count: int
    tokens: float | None = None
    blocked: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class RestSummary:
    """What a shard says of the items it holds back.

    Attributes:
        best: None of them scores above.
        tie_bound: (j,) float64, falling: the highest that rounding may have them reach.
        first: (j,) the smallest id among those down to each.
        rest: The smallest id of all others; None where there is no other.
    """

    best: float
    tie_bound: np.ndarray
    first: list[str]
    rest: str | None

    def before(self, order: str, tie_bound: float) -> bool:
        """Whether an item that reaches so high may have a smaller id."""
        count = int(np.searchsorted(-self.tie_bound, -tie_bound, side="right"))
        if count == len(self.tie_bound) and self.rest is not None and self.rest < order:
            return True
        return count > 0 and self.first[count - 1] < order


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a shard sends in a round.

    Attributes:
        rows: (c,) int64: the candidates, numbered as the shard does.
        held: Everything else.
        left: The largest residual, or an upper bound on it, of what may still be picked; -1 where nothing may.
        new: (m,) places in ``rows`` of those that were never sent before; the rest is about them.
        features: (m, D) as stored.
        ids: m names.
        modular: (m,) float64: what each is worth whatever was picked before.
        costs: (m,) float64; infinite where costs do not count.
        sources: m labels.
    """

    rows: np.ndarray
    held: RestSummary
    left: float
    new: np.ndarray
    features: np.ndarray
    ids: list[str]
    modular: np.ndarray
    costs: np.ndarray
    sources: list[str]


class ShardRest:
    """What is known of the items that shards hold back. See ``LocalRest``."""

    def __init__(self, held: Sequence[RestSummary]) -> None:
        self._held = held
        self._best = max(one.best for one in held)
        self._highest = max(float(one.tie_bound.max(initial=-np.inf)) for one in held)

    def picked(self, index: int) -> None:
        """Nothing: what is held back is the same."""

    def certifies(self, best: float, tie_bound: float, order: Any) -> bool:
        """Whether an item of the working set that ties with its best score, exact, goes before everything held back."""
        if best > self._highest:
            return True
        if tie_bound < self._best:
            return False
        return not any(one.before(order, best) for one in self._held)
