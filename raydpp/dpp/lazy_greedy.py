"""Greedy MAP search: how the largest gain is found, apart from how gains are computed (the oracle)."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from raydpp.dpp.budget import BudgetState
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles import Oracle, Solved
from raydpp.dpp.speculation import LocalRest, speculate

_SHRINK = 3.0  # what is kept up to date may be more than what matters by this factor


class LocalGreedy:
    """Lazy greedy search over any oracle (Minoux 1978; with batches of candidates instead of single ones).

    A round refines the bounds of what the next picks may reach, solves a working set of the best candidates and picks
    inside it while its best is better than every bound outside. With approximate residuals at hand, the working set
    is what speculation with them finds. Nothing in a pick depends on how many are still to come, but for the budget's
    per-source minima.

    Attributes:
        indices: The picks so far.
        log_gains: Their log gains; one fewer, for a moment, inside a pick.
        rounds: How many working sets were opened.

    Args:
        oracle: Where residuals come from; no pick has been made yet.
        objective: What a pick is worth.
        order: (N,) int64, distinct: among tied items the one with the smallest is picked.
    """

    def __init__(self, oracle: Oracle, objective: Objective, order: np.ndarray) -> None:
        self._oracle = oracle
        self._objective = objective
        self._order = order
        self._picks = Picks(oracle.lookahead, objective.diversity)
        self.indices = self._picks.indices
        self.log_gains = self._picks.log_gains
        self.rounds = 0

    def condition(self, rows: np.ndarray) -> None:
        """Make items picks, in this order, before the first pick; those at or below the floor change nothing."""
        condition(self._oracle, rows, self._objective.kernel.floor, self._oracle.working_set_size)

    def run(self, state: BudgetState, stop_below: float = -math.inf, progress: Progress | None = None) -> str | None:
        """Pick until the state is full; returns why the search ended before, in words, or None.

        Args:
            state: What may still be picked.
            stop_below: End before the first pick whose log gain is less.
            progress: Called after each pick with the number of picks and the pick's log gain.
        """
        oracle, objective, picks = self._oracle, self._objective, self._picks
        while not state.full:
            scores, tie_bound = objective.scores(oracle.bounds)  # (N,) upper bounds
            scores[~state.eligible] = tie_bound[~state.eligible] = -np.inf
            if scores.max() == -np.inf:
                left = float(oracle.bounds.max(where=state.eligible, initial=-1.0))
                return why_nothing_is_left(state, len(picks.indices), left, objective.kernel.floor)
            stale = oracle.stale
            held_back = tie_bound.max(where=stale, initial=-np.inf)
            candidates = np.flatnonzero(~stale & (scores > held_back))
            aim = (float(scores.max()) if picks.last_score is None else picks.last_score) - picks.expected_decrease
            ahead = np.flatnonzero(scores >= aim)  # what the next picks may reach
            few = len(candidates) < oracle.min_candidates and bool((stale & (scores > -np.inf)).any())
            if few or (picks.changed and np.count_nonzero(~stale) > _SHRINK * len(ahead)):
                picks.changed = False
                if few:
                    picks.backoff *= 2.0
                oracle.refine(ahead, objective.residuals(aim, ahead))
                continue
            working_set, outside = self._open(candidates, scores, tie_bound, state)
            ended = picks.inside(working_set, objective, self._order, outside, state, stop_below, progress)
            oracle.commit(working_set)
            self.rounds += 1
            if ended:
                return ended
        return None

    def _open(
        self, candidates: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray, state: BudgetState
    ) -> tuple[Solved, LocalRest]:
        """A working set of what speculation among the best candidates finds, else of the best; and the rest."""
        oracle = self._oracle
        best = candidates[largest(scores[candidates], oracle.speculation_size)]
        if (approximated := oracle.approximate(np.sort(best))) is not None:
            outside = LocalRest(scores, tie_bound, self._order, approximated.rows)
            speculation = speculate(
                approximated,
                oracle.error,
                self._objective,
                state.eligible[approximated.rows],
                outside.highest,
                self._picks.recent_decrease,
                min(state.left, oracle.lookahead),
            )
            if 0 < len(speculation.rows) <= oracle.working_set_size:
                outside.speculation = speculation
                return oracle.solve(speculation.rows), outside
        working_set = oracle.solve(
            best_rows(candidates, scores, tie_bound, oracle.stale, self._order, oracle.working_set_size)
        )
        return working_set, LocalRest(scores, tie_bound, self._order, working_set.rows)


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


class RestBound(Protocol):
    """What is known of the items outside a working set."""

    def certifies(self, best: float, tie_bound: float, order: Any) -> bool:
        """Whether an item of the working set that ties with its best score, exact, goes before everything outside."""

    def picked(self, index: int) -> None:
        """Hear of a pick."""


class Picks:
    """The picks of a search.

    Attributes:
        indices: The picks so far.
        log_gains: Their log gains; one fewer, for a moment, inside a pick.
        changed: Whether there was a pick since the one who searches last set this to False.
        backoff: How much further than usual to look ahead; 1 after each pick.

    Args:
        lookahead: For how many picks to come the one who searches prepares at once.
        diversity: The objective's.
    """

    def __init__(self, lookahead: int, diversity: float = 1.0) -> None:
        self.indices: list[int] = []
        self.log_gains: list[float] = []
        self.changed = False
        self.backoff = 1.0
        self._least = _LEAST_FALL * diversity
        self._lookahead = lookahead
        self._scores: deque[float] = deque(maxlen=lookahead + 1)  # of the last picks

    @property
    def last_score(self) -> float | None:
        """The last pick's score; None before the first."""
        return self._scores[-1] if self._scores else None

    @property
    def recent_decrease(self) -> float:
        """By how much the score fell with each of the last picks."""
        scores = self._scores
        return max(0.0, scores[0] - scores[-1]) / (len(scores) - 1) if len(scores) > 1 else 0.0

    @property
    def expected_decrease(self) -> float:
        """By how much scores may fall with the next picks, going by the last ones."""
        fall = self.recent_decrease * self._lookahead
        return self.backoff * (fall if fall > self._least else 1e3 * self._least)

    def inside(
        self,
        working_set: Solved,
        objective: Objective,
        order: np.ndarray,
        outside: RestBound,
        state: BudgetState,
        stop_below: float = -math.inf,
        progress: Progress | None = None,
    ) -> str | None:
        """Pick inside a working set while its best goes before everything outside.

        Args:
            working_set: Items with exact residuals.
            objective: What a pick is worth.
            order: (N,) distinct, of every item: among tied items the one with the smallest is picked.
            outside: The other items.
            state: What may still be picked.
            stop_below: End before the first pick whose log gain is less.
            progress: Called after each pick with the number of picks and the pick's log gain.

        Returns:
            Why the search is to end, in words; else None.
        """
        rows, floor = working_set.rows, objective.kernel.floor
        order = order[rows]  # (p,)
        while not state.full:
            scores, tie_bound = objective.scores(working_set.residuals, rows)  # (p,) exact
            blocked = ~state.eligible[rows]
            scores[blocked] = tie_bound[blocked] = -np.inf
            best = scores.max(initial=-np.inf)
            if best == -np.inf:
                return None
            tied = np.flatnonzero(tie_bound >= best)
            j = int(tied[order[tied].argmin()])
            if not outside.certifies(best, float(tie_bound[j]), order[j]):
                return None
            gain = math.log(max(float(working_set.residuals[j]), floor))
            if gain < stop_below:
                return (
                    f"stopped at pick {len(self.indices) + 1}: the next example adds {gain:.4g} nats,"
                    f" less than {stop_below:g}"
                )
            index = int(rows[j])
            working_set.pick(j)
            outside.picked(index)
            state.take(index)
            self.indices.append(index)
            self.log_gains.append(gain)
            self._scores.append(best)
            self.backoff = 1.0
            self.changed = True
            if progress is not None:
                progress(len(self.indices), gain)
        return None


def condition(oracle: Any, rows: np.ndarray, floor: float, width: int) -> np.ndarray:
    """Make items picks of an oracle, in this order and so many in a working set, before the first pick of a search.

    Returns:
        Those that were; the others, at or below the floor, change nothing.
    """
    made = []
    for start in range(0, len(rows), width):
        working_set = oracle.solve(rows[start : start + width])
        place = {int(row): j for j, row in enumerate(working_set.rows)}
        for row in rows[start : start + width].tolist():
            if working_set.residuals[place[row]] > floor:
                working_set.pick(place[row])
                made.append(row)
        oracle.commit(working_set)
    return np.array(made, dtype=np.int64)


def why_nothing_is_left(state: BudgetState, done: int, largest: float, floor: float) -> str:
    """Why a search ended before its budget was used up, in words.

    Args:
        state: The state, of which something is left.
        done: How many picks were made.
        largest: The largest residual of what may still be picked; nothing may where it is negative.
        floor: The kernel's.
    """
    where = f"stopped at pick {done + 1} of {done + state.left}"
    if largest < 0:
        return f"{where}: {state.why_nothing()}"
    return (
        f"{where}: numerically rank-deficient, as nothing that is left adds to the picks (largest conditional variance"
        f" {largest:.1e}, floor {floor:.1e}); the rest are copies of picks, or the rank is used up"
    )


def best_rows(
    candidates: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray, stale: np.ndarray, order: np.ndarray, size: int
) -> np.ndarray:
    """The best candidate and what ties with it; of more than fit, those that come first; then the next best.

    Args:
        candidates: (n,) items whose bounds are up to date.
        scores, tie_bound: (N,) of every item, see ``Objective.scores``.
        stale: (N,) bool: whose bound is out of date.
        order: (N,) distinct: those with the smallest come first.
        size: How many to return at the most.
    """
    tied = np.flatnonzero(~stale & (tie_bound >= scores[candidates].max()))
    if len(tied) > size:
        first = tied[np.argsort(order[tied])[: size - 1]]
        return np.unique(np.append(first, candidates[scores[candidates].argmax()]))
    rest = np.setdiff1d(candidates, tied, assume_unique=True)
    return np.concatenate([tied, rest[largest(scores[rest], size - len(tied))]])


def largest(values: np.ndarray, count: int) -> np.ndarray:
    """Where the largest ``count`` values are, in no order."""
    if count >= len(values):
        return np.arange(len(values))
    if count == 0:
        return np.empty(0, dtype=np.int64)
    return np.argpartition(values, len(values) - count)[len(values) - count :]
