"""What the coordinator of an exact search and its shards send each other in a round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from raydpp.dpp.speculation import RestBound


@dataclass(frozen=True, eq=False)
class RoundUpdate:
    """What every shard gets at the start of a round."""

    number: int  # of the round
    sent: int  # how many picks were sent before
    features: np.ndarray  # (k, D) the picks made since, in order, as they are stored
    last_score: float | None  # the last pick's; None where there is none
    expected_decrease: float  # how far below it the next picks may be
    count: int  # how many candidates to send at most
    tokens: float | None = None  # what an item may cost at most
    blocked: frozenset[str] = frozenset()  # sources of which nothing may be picked any more


@dataclass(frozen=True, eq=False)
class Candidates:
    """What a shard answers."""

    rows: np.ndarray  # (c,) int64: the candidates, numbered as the shard does
    rest: RestSummary  # everything else
    largest_residual: float  # of what may still be picked, or a bound on it; -1 where nothing may
    new: np.ndarray  # (m,) places in rows of those that the coordinator does not have: the rest is about them
    features: np.ndarray  # (m, D) as stored
    ids: list[str]
    modular: np.ndarray  # (m,) float64
    costs: np.ndarray  # (m,) float64; infinite where costs do not count
    sources: list[str]


@dataclass(frozen=True, eq=False)
class RestSummary:
    """A bound on the items that a shard does not send."""

    best: float  # none of them scores above
    tie_bound: np.ndarray  # (j,) float64, falling: how high rounding may lift the j highest of them
    first: list[str]  # (j,) the smallest id among those down to each
    other: str | None  # the smallest id of all others

    @classmethod
    def empty(cls) -> RestSummary:
        return cls(-np.inf, np.empty(0), [], None)

    def may_precede(self, order: str, score: float) -> bool:
        """Whether an item that rounding may lift to this score may have a smaller id."""
        count = int(np.searchsorted(-self.tie_bound, -score, side="right"))
        if count == len(self.tie_bound) and self.other is not None and self.other < order:
            return True
        return count > 0 and self.first[count - 1] < order


class ShardRest(RestBound):
    """Of items that shards did not send."""

    def __init__(self, rest: Sequence[RestSummary]) -> None:
        self._rest = rest
        super().__init__(max(one.best for one in rest), max(float(one.tie_bound.max(initial=-np.inf)) for one in rest))

    def may_precede(self, order: str, score: float) -> bool:
        return any(one.may_precede(order, score) for one in self._rest)
