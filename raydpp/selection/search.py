"""Greedy MAP search: how the largest gain is found, apart from how gains are computed (the oracle)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpp.selection.budget import Ledger
from raydpp.selection.objective import Objective
from raydpp.selection.oracles import Front, Oracle
from raydpp.selection.outside import Outside
from raydpp.selection.scouting import rehearse

Progress = Callable[[int, float], None]

_LEAST_FALL = 1e-5  # nats over the picks to come: less comes of ties, or nothing has been picked
_SHRINK = 3.0  # what is kept up to date may be more than what matters by this factor


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
        at_floor: Whether the search ended because all that is left is at or below the floor.

    Args:
        oracle: Where residuals come from; no pick has been made yet.
        objective: What a pick is worth.
        order: (N,) int64, distinct: among tied items the one with the smallest is picked.
        tolerance: Each pick's residual is at least (1 - tolerance) of the best one's; 0 is exact.
    """

    def __init__(self, oracle: Oracle[Any], objective: Objective, order: np.ndarray, tolerance: float = 0.0) -> None:
        self._oracle = oracle
        self._objective = objective
        self._order = order
        self._margin = -objective.diversity * math.log1p(-tolerance)  # what a pick's score may fall short by
        self.indices: list[int] = []
        self.log_gains: list[float] = []
        self.rounds = 0
        self._scores: deque[float] = deque(maxlen=oracle.lookahead + 1)  # of the last picks
        self._patience = 1.0
        self._picked = False  # since the last time that bounds were refined
        self.at_floor = False

    def condition(self, rows: np.ndarray) -> None:
        """Make items picks, in this order, before the first pick; those at or below the floor change nothing."""
        floor = self._objective.kernel.floor
        width = self._oracle.front_size
        for start in range(0, len(rows), width):
            front = self._oracle.open(rows[start : start + width])
            place = {int(row): j for j, row in enumerate(front.rows)}
            for row in rows[start : start + width].tolist():
                if front.residuals[place[row]] > floor:
                    front.pick(place[row])
            self._oracle.close(front)

    def run(self, ledger: Ledger, stop_below: float = -math.inf, progress: Progress | None = None) -> str | None:
        """Pick until the ledger is full; returns why the search ended before, in words, or None.

        Args:
            ledger: What may still be picked.
            stop_below: End before the first pick whose log gain is less.
            progress: Called after each pick with the number of picks and the pick's log gain.
        """
        oracle, objective = self._oracle, self._objective
        while not ledger.full:
            scores, reach = objective.scores(oracle.bounds)  # (N,) upper bounds
            scores[~ledger.eligible] = reach[~ledger.eligible] = -np.inf
            if scores.max() == -np.inf:
                return self._why_nothing_is_left(ledger)
            stale = oracle.stale
            held_back = reach.max(where=stale, initial=-np.inf) - self._margin
            contenders = np.flatnonzero(~stale & (scores > held_back))
            aim = self._aim(scores)
            ahead = np.flatnonzero(scores >= aim)  # what the next picks may reach
            few = len(contenders) < oracle.enough and bool((stale & (scores > -np.inf)).any())
            if few or (self._picked and np.count_nonzero(~stale) > _SHRINK * len(ahead)):
                self._picked = False
                if few:
                    self._patience *= 2.0
                oracle.refine(ahead, objective.residuals(aim, ahead))
                continue
            front, outside = self._open(contenders, scores, reach, ledger)
            ended = self._pick_inside(front, outside, ledger, stop_below, progress)
            oracle.close(front)
            self.rounds += 1
            if ended:
                return ended
        return None

    def _aim(self, scores: np.ndarray) -> float:
        """How low the scores of the next picks may fall, going by the last ones; lower each time until there is one."""
        top = self._scores[-1] if self._scores else float(scores.max())
        fall = self._fall * self._oracle.lookahead
        least = _LEAST_FALL * self._objective.diversity
        return top - self._patience * (fall if fall > least else 1e3 * least)

    @property
    def _fall(self) -> float:
        """By how much the score fell with each of the last picks."""
        scores = self._scores
        return max(0.0, scores[0] - scores[-1]) / (len(scores) - 1) if len(scores) > 1 else 0.0

    def _open(
        self, contenders: np.ndarray, scores: np.ndarray, reach: np.ndarray, ledger: Ledger
    ) -> tuple[Front, Outside]:
        """A front of what a rehearsal among the best contenders finds, else of the best, and what is outside."""
        oracle = self._oracle
        best = contenders[_largest(scores[contenders], oracle.scout_size)]
        if (scout := oracle.scout(np.sort(best))) is not None:
            outside = Outside(scores, reach, self._order, scout.rows)
            rehearsal = rehearse(
                scout,
                oracle.error,
                self._objective,
                ledger.eligible[scout.rows],
                outside.highest,
                self._fall,
                min(ledger.left, oracle.lookahead),
            )
            if 0 < len(rehearsal.rows) <= oracle.front_size:
                outside.rehearsal = rehearsal
                return oracle.open(rehearsal.rows), outside
        front = oracle.open(self._front_rows(contenders, scores, reach))
        return front, Outside(scores, reach, self._order, front.rows)

    def _front_rows(self, contenders: np.ndarray, scores: np.ndarray, reach: np.ndarray) -> np.ndarray:
        """The best contender and what ties with it; of more than fit, those that come first; then the next best."""
        size = self._oracle.front_size
        tied = np.flatnonzero(~self._oracle.stale & (reach >= scores[contenders].max()))
        if len(tied) > size:
            first = tied[np.argsort(self._order[tied])[: size - 1]]
            return np.unique(np.append(first, contenders[scores[contenders].argmax()]))
        rest = np.setdiff1d(contenders, tied, assume_unique=True)
        return np.concatenate([tied, rest[_largest(scores[rest], size - len(tied))]])

    def _pick_inside(
        self, front: Front, outside: Outside, ledger: Ledger, stop_below: float, progress: Progress | None
    ) -> str | None:
        rows, floor = front.rows, self._objective.kernel.floor
        order = self._order[rows]  # (p,)
        while not ledger.full:
            scores, reach = self._objective.scores(front.residuals, rows)  # (p,) exact
            shut = ~ledger.eligible[rows]
            scores[shut] = reach[shut] = -np.inf
            best = scores.max()
            if best == -np.inf:
                return None
            tied = np.flatnonzero(reach >= best)
            j = int(tied[order[tied].argmin()])
            if not outside.below(best, float(reach[j]), int(order[j]), self._margin):
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
            self._patience = 1.0
            self._picked = True
            if progress is not None:
                progress(len(self.indices), gain)
        return None

    def _why_nothing_is_left(self, ledger: Ledger) -> str:
        done = len(self.indices)
        where = f"stopped at pick {done + 1} of {done + ledger.left}"
        if not ledger.eligible.any():
            return f"{where}: {ledger.why_nothing()}"
        self.at_floor = True
        largest = float(self._oracle.bounds[ledger.eligible].max())
        return (
            f"{where}: nothing that is left adds to the picks (largest conditional variance {largest:.1e}, floor"
            f" {self._objective.kernel.floor:.1e}); the rest are copies of picks, or the rank is used up"
        )


def _largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest ``count`` values are, in no order."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    return np.argpartition(values, len(values) - count)[len(values) - count :]
