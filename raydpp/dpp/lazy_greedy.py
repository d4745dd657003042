"""Lazy greedy search: how the largest gain is found, apart from how gains are computed and where the items are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from raydpp.dpp import Progress
from raydpp.dpp.budget import BudgetState
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles import Oracle, Solved
from raydpp.dpp.speculation import LocalRest, RestBound, speculate

_LEAST_DECREASE = 1e-5  # nats over the picks to come: less comes of ties, or nothing has been picked
_SHRINK = 3.0  # what is kept up to date may be more than what matters by this factor


class LazyGreedy(ABC):
    """The loop of every greedy search (Minoux 1978; with batches of candidates instead of single ones).

    Residuals only fall, so stale ones are upper bounds. A round solves a working set of the best candidates exactly,
    and picks inside it while a bound on the rest certifies that its best goes before everything else. Subclasses say
    where candidates come from: an oracle on this machine, or shards on many. Nothing in a pick depends on how many are
    still to come, but for the budget's per-source minima.
    """

    def __init__(self, objective: Objective, state: BudgetState, lookahead: int) -> None:
        self._objective = objective
        self._state = state
        self.picks = Picks(lookahead, objective.diversity)
        self.rounds = 0  # how many working sets were solved

    @abstractmethod
    def propose(self) -> Proposal | float:
        """What to pick from next; or where nothing is above the floor, the largest residual left, -1 if none is."""

    @abstractmethod
    def commit(self, working_set: Any) -> None:
        """Take the picks made inside the working set proposed last into account."""

    def run(self, progress: Progress | None = None) -> str | None:
        """Pick until the budget is used up; returns why the search ended before, or None."""
        while self._state.left > 0:
            proposal = self.propose()
            if not isinstance(proposal, Proposal):
                return why_nothing_is_left(self._state, len(self.picks.indices), proposal, self._objective.kernel.floor)
            ended = self._pick_inside(proposal, progress)
            self.commit(proposal.working_set)
            self.rounds += 1
            if ended:
                return ended
        return None

    def _pick_inside(self, proposal: Proposal, progress: Progress | None) -> str | None:
        """Pick inside a working set while its best is certified; returns why the search is to end, else None."""
        working_set, order, picks, state = proposal.working_set, proposal.order, self.picks, self._state
        rows = working_set.rows
        while not state.full:
            scores, tie_bound = self._objective.scores(working_set.residuals, proposal.modular)  # (p,) exact
            blocked = ~state.eligible[rows]
            scores[blocked] = tie_bound[blocked] = -np.inf
            best = scores.max(initial=-np.inf)
            if best == -np.inf:
                return None
            # What ties within rounding falls to the smallest id: in another batch it would have rounded otherwise.
            tied = np.flatnonzero(tie_bound >= best)
            j = int(tied[order[tied].argmin()])
            if not proposal.rest.certifies(best, float(tie_bound[j]), order[j]):
                return None
            gain = math.log(max(float(working_set.residuals[j]), self._objective.kernel.floor))
            if gain < state.min_log_gain:
                where, least = len(picks.indices) + 1, state.min_log_gain
                return f"stopped at pick {where}: the next example adds {gain:.4g} nats, less than {least:g}"
            index = int(rows[j])
            working_set.pick(j)
            proposal.rest.picked(index)
            state.spend(index)
            picks.add(index, gain, best)
            if progress is not None:
                progress(len(picks.indices), gain)
        return None


class LocalGreedy(LazyGreedy):
    """A search over the N items of an oracle, with speculation where it has approximate residuals at hand.

    ``order``, (N,) int64 and distinct, breaks ties: the smallest first; ``modular``, (N,), are the modular terms.
    """

    def __init__(
        self, oracle: Oracle, objective: Objective, order: np.ndarray, modular: np.ndarray, state: BudgetState
    ) -> None:
        super().__init__(objective, state, oracle.lookahead)
        self._oracle = oracle
        self._order = order
        self._modular = modular

    def condition_on(self, rows: np.ndarray) -> None:
        """Make items picks, in this order, before the first pick; those at or below the floor change nothing."""
        condition(self._oracle, rows, self._objective.kernel.floor, self._oracle.working_set_size)

    def propose(self) -> Proposal | float:
        oracle, picks, eligible = self._oracle, self.picks, self._state.eligible
        while True:
            scores, tie_bound = score_bounds(oracle, self._objective, self._modular, eligible)  # (N,)
            if scores.max() == -np.inf:
                return float(oracle.bounds.max(where=eligible, initial=-1.0))
            stale = oracle.stale
            candidates = np.flatnonzero(~stale & (scores > tie_bound.max(where=stale, initial=-np.inf)))
            # Refine or propose: candidates are above all stale bounds. While they are few, and others can join them,
            # bring more up to date, further ahead each time; else pick from them.
            few = len(candidates) < oracle.min_candidates and bool((stale & (scores > -np.inf)).any())
            target = (float(scores.max()) if picks.last_score is None else picks.last_score) - picks.expected_decrease
            if not refine_ahead(oracle, self._objective, self._modular, scores, target, few, picks.changed):
                return self._solve(candidates, scores, tie_bound)
            picks.changed = False
            if few:
                picks.backoff *= 2.0

    def commit(self, working_set: Solved) -> None:
        self._oracle.commit(working_set)

    def _solve(self, candidates: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray) -> Proposal:
        """What speculation among the candidates finds; else the best of them, as many as a working set holds."""
        oracle, order = self._oracle, self._order
        rest = self._speculate(candidates, scores, tie_bound)
        if rest is not None and rest.speculation is not None:
            working_set = oracle.solve(rest.speculation.rows)
        else:
            size = oracle.working_set_size
            working_set = oracle.solve(best_rows(candidates, scores, tie_bound, oracle.stale, order, size))
            rest = LocalRest(scores, tie_bound, order, working_set.rows)
        return Proposal(working_set, order[working_set.rows], self._modular[working_set.rows], rest)

    def _speculate(self, candidates: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray) -> LocalRest | None:
        oracle, state = self._oracle, self._state
        approximate = oracle.approximate(np.sort(candidates[largest(scores[candidates], oracle.speculation_size)]))
        if approximate is None:
            return None
        rows, most = approximate.rows, min(state.left, oracle.lookahead)
        rest = LocalRest(scores, tie_bound, self._order, rows)
        modular, eligible, decrease = self._modular[rows], state.eligible[rows], self.picks.recent_decrease
        found = speculate(approximate, oracle.error, self._objective, modular, eligible, rest.highest, decrease, most)
        if 0 < len(found.rows) <= oracle.working_set_size:
            rest.speculation = found
        return rest


@dataclass(frozen=True, eq=False)
class Proposal:
    """What the next picks may come from."""

    working_set: Solved  # p items with exact residuals
    order: np.ndarray  # (p,) distinct: of tied items the one with the smallest is picked
    modular: np.ndarray  # (p,) float64: their modular terms
    rest: RestBound  # on all other items


class Picks:
    """The picks of a search, and how far ahead to look for the next ones."""

    def __init__(self, lookahead: int, diversity: float = 1.0) -> None:
        self.indices: list[int] = []
        self.log_gains: list[float] = []  # one fewer, for a moment, inside a pick
        self.changed = False  # whether there was a pick since the search last set this to False
        self.backoff = 1.0  # how much further than usual to look ahead; 1 after each pick
        self._least = _LEAST_DECREASE * diversity
        self._lookahead = lookahead
        self._scores: deque[float] = deque(maxlen=lookahead + 1)  # of the last picks

    def add(self, index: int, log_gain: float, score: float) -> None:
        self.indices.append(index)
        self.log_gains.append(log_gain)
        self._scores.append(score)
        self.backoff = 1.0
        self.changed = True

    @property
    def last_score(self) -> float | None:
        """None before the first pick."""
        return self._scores[-1] if self._scores else None

    @property
    def recent_decrease(self) -> float:
        """By how much the score fell with each of the last picks."""
        scores = self._scores
        return max(0.0, scores[0] - scores[-1]) / (len(scores) - 1) if len(scores) > 1 else 0.0

    @property
    def expected_decrease(self) -> float:
        """By how much scores may fall with the next ``lookahead`` picks, going by the last ones."""
        decrease = self.recent_decrease * self._lookahead
        return self.backoff * (decrease if decrease > self._least else 1e3 * self._least)


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
        stopped: Why there are fewer picks than asked for; else None.
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
        gains = np.array(log_gains, dtype=np.float64)
        return cls(np.array(picks, dtype=np.int64), gains, float(gains.sum()), stopped, oracle)


def score_bounds(
    oracle: Oracle, objective: Objective, modular: np.ndarray, eligible: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Upper bounds on all items' scores and on what rounding may make of them, (N,) each; -inf if not eligible."""
    scores, tie_bound = objective.scores(oracle.bounds, modular)
    scores[~eligible] = tie_bound[~eligible] = -np.inf
    return scores, tie_bound


def refine_ahead(
    oracle: Oracle,
    objective: Objective,
    modular: np.ndarray,
    scores: np.ndarray,
    target: float,
    needed: bool,
    changed: bool,
) -> bool:
    """Refine the items that score at the target or above, as the next picks may, if that is due; whether it was.

    It is if it is ``needed`` to pick at all, or if picks have ``changed`` the scores since, so that far more items are
    kept up to date than matter.
    """
    ahead = np.flatnonzero(scores >= target)
    due = needed or (changed and int(np.count_nonzero(~oracle.stale)) > _SHRINK * len(ahead))
    if due:
        oracle.refine(ahead, objective.residuals(target, modular[ahead]))
    return due


def best_rows(
    candidates: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray, stale: np.ndarray, order: np.ndarray, size: int
) -> np.ndarray:
    """At most ``size`` items: what ties with the best of the candidates, (n,), the first in order; then the next best.

    What ties need not be a candidate, but may not be stale.
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


def condition(solver: Any, rows: np.ndarray, floor: float, width: int) -> np.ndarray:
    """Make items picks of an oracle or a posterior, in this order and ``width`` at a time; returns those that were.

    Those at or below the floor change nothing.
    """
    made = []
    for start in range(0, len(rows), width):
        working_set = solver.solve(rows[start : start + width])
        place = {int(row): j for j, row in enumerate(working_set.rows)}
        for row in rows[start : start + width].tolist():
            if working_set.residuals[place[row]] > floor:
                working_set.pick(place[row])
                made.append(row)
        solver.commit(working_set)
    return np.array(made, dtype=np.int64)


def why_nothing_is_left(state: BudgetState, done: int, largest: float, floor: float) -> str | None:
    """Why a search ends after ``done`` picks, by the largest residual left; None if its tokens are used up."""
    where = f"stopped at pick {done + 1} of {done + state.left}"
    if largest < 0:
        return None if state.tokens is not None else f"{where}: {state.why_nothing()}"
    return (
        f"{where}: numerically rank-deficient, as nothing that is left adds to the picks (largest conditional variance"
        f" {largest:.1e}, floor {floor:.1e}); the rest are copies of picks, or the rank is used up"
    )
