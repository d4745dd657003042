"""Greedy MAP search: how the largest gain is found, apart from how gains are computed (the oracle)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from raydpp.selection.contenders import best_rows, largest
from raydpp.selection.ledger import Ledger
from raydpp.selection.objective import Objective
from raydpp.selection.oracles import Front, Oracle
from raydpp.selection.outside import Outside
from raydpp.selection.picking import Picks, Progress, condition, why_nothing_is_left
from raydpp.selection.scouting import rehearse

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
        self._picks = Picks(oracle.lookahead, tolerance, objective.diversity)
        self.indices = self._picks.indices
        self.log_gains = self._picks.log_gains
        self.rounds = 0
        self.at_floor = False

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
                self.at_floor = left >= 0
                return why_nothing_is_left(ledger, len(picks.indices), left, objective.kernel.floor)
            stale = oracle.stale
            held_back = reach.max(where=stale, initial=-np.inf) - picks.margin
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
