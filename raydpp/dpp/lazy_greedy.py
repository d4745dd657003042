"""Greedy MAP search: how the largest gain is found, apart from how gains are computed (the oracle)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raydpp.dpp.budget import Ledger
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles import Front, Oracle
from raydpp.dpp.speculation import Outside, rehearse

_SHRINK = 3.0  # what is kept up to date may be more than what matters by this factor


class Search:
    """Lazy greedy search over any oracle (Minoux 1978; with batches of contenders instead of single ones).

    A round refines the bounds of what the next picks may reach, opens a front of the best contenders, and picks
    inside the front while its best is better than every bound outside. Where approximate residuals are at hand, the
    front is what a rehearsal with them finds (see ``scouting``). Nothing in a pick depends on how many are still to
    come, but for the ledger's per-source minima.

    Attributes:
        indices: The picks so far.
        log_gains: Their log gains; one fewer, for a moment, inside a pick.
        rounds: How many fronts were opened.

    Args:
        oracle: Where residuals come from; no pick has been made yet.
        objective: What a pick is worth.
        order: (N,) int64, distinct: among tied items the one with the smallest is picked.
    """

    def __init__(self, oracle: Oracle[Any], objective: Objective, order: np.ndarray) -> None:
        self._oracle = oracle
        self._objective = objective
        self._order = order
        self._picks = Picks(oracle.lookahead, objective.diversity)
        self.indices = self._picks.indices
        self.log_gains = self._picks.log_gains
        self.rounds = 0

    def condition(self, rows: np.ndarray) -> None:
        """Make items picks, in this order, before the first pick; those at or below the floor change nothing."""
        condition(self._oracle, rows, self._objective.kernel.floor, self._oracle.front_size)

    def run(self, ledger: Ledger, stop_below: float = -math.inf, progress: Progress | None = None) -> str | None:
        """Pick until the ledger is full; returns why the search ended before, in words, or None.

        Args:
            ledger: What may still be picked.
            stop_below: End before the first pick whose log gain is less.
            progress: Called after each pick with the number of picks and the pick's log gain.
        """
        oracle, objective, picks = self._oracle, self._objective, self._picks
        while not ledger.full:
            scores, reach = objective.scores(oracle.bounds)  # (N,) upper bounds
            scores[~ledger.eligible] = reach[~ledger.eligible] = -np.inf
            if scores.max() == -np.inf:
                left = float(oracle.bounds.max(where=ledger.eligible, initial=-1.0))
                return why_nothing_is_left(ledger, len(picks.indices), left, objective.kernel.floor)
            stale = oracle.stale
            held_back = reach.max(where=stale, initial=-np.inf)
            contenders = np.flatnonzero(~stale & (scores > held_back))
            aim = (float(scores.max()) if picks.top is None else picks.top) - picks.drop
            ahead = np.flatnonzero(scores >= aim)  # what the next picks may reach
            few = len(contenders) < oracle.enough and bool((stale & (scores > -np.inf)).any())
            if few or (picks.anew and np.count_nonzero(~stale) > _SHRINK * len(ahead)):
                picks.anew = False
                if few:
                    picks.patience *= 2.0
                oracle.refine(ahead, objective.residuals(aim, ahead))
                continue
            front, outside = self._open(contenders, scores, reach, ledger)
            ended = picks.inside(front, objective, self._order, outside, ledger, stop_below, progress)
            oracle.close(front)
            self.rounds += 1
            if ended:
                return ended
        return None

    def _open(
        self, contenders: np.ndarray, scores: np.ndarray, reach: np.ndarray, ledger: Ledger
    ) -> tuple[Front, Outside]:
        """A front of what a rehearsal among the best contenders finds, else of the best, and what is outside."""
        oracle = self._oracle
        best = contenders[largest(scores[contenders], oracle.scout_size)]
        if (scout := oracle.scout(np.sort(best))) is not None:
            outside = Outside(scores, reach, self._order, scout.rows)
            rehearsal = rehearse(
                scout,
                oracle.error,
                self._objective,
                ledger.eligible[scout.rows],
                outside.highest,
                self._picks.fall,
                min(ledger.left, oracle.lookahead),
            )
            if 0 < len(rehearsal.rows) <= oracle.front_size:
                outside.rehearsal = rehearsal
                return oracle.open(rehearsal.rows), outside
        front = oracle.open(best_rows(contenders, scores, reach, oracle.stale, self._order, oracle.front_size))
        return front, Outside(scores, reach, self._order, front.rows)


Progress = Callable[[int, float], None]

_LEAST_FALL = 1e-5  # nats over the picks to come: less comes of ties, or nothing has been picked


@dataclass(frozen=True, eq=False)
class Selection:
    """What a search, or a baseline, picked.

    Attributes:
        indices: (m,) int64 row indices in the order of picking. Without per-source minima every prefix is the
            selection for that smaller budget.
        log_gains: (m,) float64: the log of each pick's conditional variance given the earlier picks (and what
            is owned), in nats; diversity only, whatever the quality weight. What is at or below the numerical
            floor, a copy of a pick, counts as the floor.
        log_det: The sum of ``log_gains``: log det of the kernel matrix of the picks, given what is owned.
        stopped: Why there are fewer picks than asked for, or where the floor was reached, in words; else None.
        oracle: How gains were computed.
    """

    indices: np.ndarray
    log_gains: np.ndarray
    log_det: float
    stopped: str | None = None
    oracle: str = ""

    @classmethod
    def of(
        cls, picks: Sequence[int], log_gains: Sequence[float], stopped: str | None = None, oracle: str = ""
    ) -> Selection:
        """From lists."""
        gains = np.array(log_gains, dtype=np.float64)
        return cls(np.array(picks, dtype=np.int64), gains, float(gains.sum()), stopped, oracle)


class Elsewhere(Protocol):
    """What is known of the items outside a front."""

    def below(self, best: float, reach: float, order: Any) -> bool:
        """Whether an item of the front that ties with its best score, exact, goes before everything outside."""

    def picked(self, index: int) -> None:
        """Hear of a pick."""


class Picks:
    """The picks of a search.

    Attributes:
        indices: The picks so far.
        log_gains: Their log gains; one fewer, for a moment, inside a pick.
        anew: Whether there was a pick since the one who searches last set this to False.
        patience: How much further than usual to look ahead; 1 after each pick.

    Args:
        lookahead: For how many picks to come the one who searches prepares at once.
        diversity: The objective's.
    """

    def __init__(self, lookahead: int, diversity: float = 1.0) -> None:
        self.indices: list[int] = []
        self.log_gains: list[float] = []
        self.anew = False
        self.patience = 1.0
        self._least = _LEAST_FALL * diversity
        self._lookahead = lookahead
        self._scores: deque[float] = deque(maxlen=lookahead + 1)  # of the last picks

    @property
    def top(self) -> float | None:
        """The last pick's score; None before the first."""
        return self._scores[-1] if self._scores else None

    @property
    def fall(self) -> float:
        """By how much the score fell with each of the last picks."""
        scores = self._scores
        return max(0.0, scores[0] - scores[-1]) / (len(scores) - 1) if len(scores) > 1 else 0.0

    @property
    def drop(self) -> float:
        """By how much scores may fall with the next picks, going by the last ones."""
        fall = self.fall * self._lookahead
        return self.patience * (fall if fall > self._least else 1e3 * self._least)

    def inside(
        self,
        front: Front,
        objective: Objective,
        order: np.ndarray,
        outside: Elsewhere,
        ledger: Ledger,
        stop_below: float = -math.inf,
        progress: Progress | None = None,
    ) -> str | None:
        """Pick inside a front while its best goes before everything outside.

        Args:
            front: Items with exact residuals.
            objective: What a pick is worth.
            order: (N,) distinct, of every item: among tied items the one with the smallest is picked.
            outside: The other items.
            ledger: What may still be picked.
            stop_below: End before the first pick whose log gain is less.
            progress: Called after each pick with the number of picks and the pick's log gain.

        Returns:
            Why the search is to end, in words; else None.
        """
        rows, floor = front.rows, objective.kernel.floor
        order = order[rows]  # (p,)
        while not ledger.full:
            scores, reach = objective.scores(front.residuals, rows)  # (p,) exact
            shut = ~ledger.eligible[rows]
            scores[shut] = reach[shut] = -np.inf
            best = scores.max(initial=-np.inf)
            if best == -np.inf:
                return None
            tied = np.flatnonzero(reach >= best)
            j = int(tied[order[tied].argmin()])
            if not outside.below(best, float(reach[j]), order[j]):
                return None
            gain = math.log(max(float(front.residuals[j]), floor))
            if gain < stop_below:
                return (
                    f"stopped at pick {len(self.indices) + 1}: the next example adds {gain:.4g} nats,"
                    f" less than {stop_below:g}"
                )
            index = int(rows[j])
            front.pick(j)
            outside.picked(index)
            ledger.take(index)
            self.indices.append(index)
            self.log_gains.append(gain)
            self._scores.append(best)
            self.patience = 1.0
            self.anew = True
            if progress is not None:
                progress(len(self.indices), gain)
        return None


def condition(oracle: Any, rows: np.ndarray, floor: float, width: int) -> np.ndarray:
    """Make items picks of an oracle, in this order and so many in a front, before the first pick of a search.

    Returns:
        Those that were; the others, at or below the floor, change nothing.
    """
    made = []
    for start in range(0, len(rows), width):
        front = oracle.open(rows[start : start + width])
        place = {int(row): j for j, row in enumerate(front.rows)}
        for row in rows[start : start + width].tolist():
            if front.residuals[place[row]] > floor:
                front.pick(place[row])
                made.append(row)
        oracle.close(front)
    return np.array(made, dtype=np.int64)


def why_nothing_is_left(ledger: Ledger, done: int, largest: float, floor: float) -> str:
    """Why a search ended before its budget was used up, in words.

    Args:
        ledger: The account, of which something is left.
        done: How many picks were made.
        largest: The largest residual of what may still be picked; nothing may where it is negative.
        floor: The kernel's.
    """
    where = f"stopped at pick {done + 1} of {done + ledger.left}"
    if largest < 0:
        return f"{where}: {ledger.why_nothing()}"
    return (
        f"{where}: numerically rank-deficient, as nothing that is left adds to the picks (largest conditional variance"
        f" {largest:.1e}, floor {floor:.1e}); the rest are copies of picks, or the rank is used up"
    )


def best_rows(
    contenders: np.ndarray, scores: np.ndarray, reach: np.ndarray, stale: np.ndarray, order: np.ndarray, size: int
) -> np.ndarray:
    """The best contender and what ties with it; of more than fit, those that come first; then the next best.

    Args:
        contenders: (n,) items whose bounds are up to date.
        scores, reach: (N,) of every item, see ``Objective.scores``.
        stale: (N,) bool: whose bound is out of date.
        order: (N,) distinct: those with the smallest come first.
        size: How many to return at the most.
    """
    tied = np.flatnonzero(~stale & (reach >= scores[contenders].max()))
    if len(tied) > size:
        first = tied[np.argsort(order[tied])[: size - 1]]
        return np.unique(np.append(first, contenders[scores[contenders].argmax()]))
    rest = np.setdiff1d(contenders, tied, assume_unique=True)
    return np.concatenate([tied, rest[largest(scores[rest], size - len(tied))]])


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest ``count`` values are, in no order."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    return np.argpartition(values, len(values) - count)[len(values) - count :]
