"""A part of the items in an exact search over many: it keeps their features and bounds, and sends candidates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from raydpp.dpp import OracleName
from raydpp.dpp.features import Items, UnitRows
from raydpp.dpp.lazy_greedy import best_rows, largest, refine_ahead, score_bounds
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import bounded_oracle
from raydpp.dpp.sharded.messages import Candidates, RestSummary, RoundUpdate

_SOON = 0.5  # what the next picks may reach by this part of the expected decrease has to be up to date
_SUMMARY_SIZE = 64  # of how many items that are not sent the coordinator knows how high each may score


class Shard:
    """n of the items of an exact search, with an oracle that follows the picks made among all shards' candidates.

    Ids are strings, distinct in all shards; the oracle is ``cholesky`` or ``feature-space``; ``size`` is M, the largest
    number of picks of the search, with what is owned.
    """

    def __init__(self, items: Items, objective: Objective, oracle: OracleName, size: int) -> None:
        n = len(items)
        self._items = items
        self._ids: Sequence[str] = items.ids  # type: ignore[assignment]
        self._objective = objective
        self._rows = items.unit_rows()  # (n, D)
        self._order = items.order
        self._oracle = bounded_oracle(oracle)(self._rows, objective.kernel, size)
        self._eligible = np.ones(n, dtype=bool)
        self._eligible[items.excluded] = False
        self._delivered = np.zeros(n, dtype=bool)  # which the coordinator has
        self._round = -1
        self._refined_at = 0
        self.picks = 0  # how many are taken into account

    @property
    def available(self) -> dict[str, int]:
        """How many items may be picked, by source; all under one name where there are no sources."""
        if self._items.sources is None:
            return {"": int(self._eligible.sum())}
        labels, groups = np.unique(self._items.sources, return_inverse=True)
        eligible = np.bincount(groups[self._eligible], minlength=len(labels))
        return dict(zip(labels.tolist(), eligible.tolist(), strict=True))

    def advance(self, update: RoundUpdate, own: Exact) -> Candidates | None:
        """A round: follow the picks made since the last one, and send the best candidates.

        ``own`` are the exact residuals, after these picks, of the items that this shard sent in the last round. Returns
        None where it does not have the picks sent before: it was restarted since.
        """
        if update.number != self._round:
            if update.sent != self.picks:
                return None
            self._follow(update.features, own)
            self._round = update.number
        if update.tokens is not None and self._items.costs is not None:
            self._eligible &= self._items.costs <= update.tokens
        if update.blocked and self._items.sources is not None:
            self._eligible &= ~np.isin(self._items.sources, sorted(update.blocked))
        oracle, modular = self._oracle, self._items.modular
        scores, tie_bound = self._scores()
        last = float(scores.max()) if update.last_score is None else update.last_score
        target = last - update.expected_decrease
        # Refine or propose: not only once candidates are few, as on one machine, but before the next picks are stale.
        needed = bool((scores[oracle.stale] >= last - _SOON * update.expected_decrease).any())
        changed = self.picks > self._refined_at
        if last > -np.inf and refine_ahead(oracle, self._objective, modular, scores, target, needed, changed):
            self._refined_at = self.picks
            scores, tie_bound = self._scores()
        stale = oracle.stale
        rows = np.flatnonzero(~stale & (scores > scores.max(where=stale, initial=-np.inf)))
        if len(rows):
            rows = best_rows(rows, scores, tie_bound, stale, self._order, update.count)
        return self._send(rows, self._summary(rows, scores, tie_bound))

    def find(self, ids: Sequence[str]) -> Candidates:
        """Those of these items that are here, sent as candidates are."""
        place = {name: row for row, name in enumerate(self._ids)}
        return self._send(np.array([place[name] for name in ids if name in place], dtype=np.int64), RestSummary.empty())

    def left_above(self, features: np.ndarray, level: float) -> tuple[float, int]:
        """Follow picks, (k, D) as stored; then the best score left and how many score above a level.

        What is below the level is not brought up to date: its bound stands for it.
        """
        self._follow(features, Exact.empty())
        rows = np.flatnonzero(self._eligible)
        self._oracle.refine(rows, self._objective.residuals(level, self._items.modular[rows]))
        scores = self._scores()[0]
        return float(scores.max(initial=-np.inf)), int(np.count_nonzero(scores > level))

    def _follow(self, features: np.ndarray, own: Exact) -> None:
        self._delivered[own.rows] = True
        self._eligible[own.rows[own.picked]] = False
        picked = self._rows.take(slice(0)) if not len(features) else UnitRows(features, device=self._rows.device).take()
        self._oracle.append(picked, own)  # (k, D)
        self.picks += len(features)

    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        return score_bounds(self._oracle, self._objective, self._items.modular, self._eligible)  # (n,) each

    def _send(self, rows: np.ndarray, rest: RestSummary) -> Candidates:
        new = np.flatnonzero(~self._delivered[rows])
        some, items = rows[new], self._items
        return Candidates(
            rows,
            rest,
            float(self._oracle.bounds.max(where=self._eligible, initial=-1.0)),
            new,
            self._rows.stored(some),
            [self._ids[row] for row in some],
            items.modular[some],
            np.full(len(some), np.inf) if items.costs is None else items.costs[some],
            [""] * len(some) if items.sources is None else items.sources[some].tolist(),
        )

    def _summary(self, rows: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray) -> RestSummary:
        """Of all eligible items but those sent."""
        kept = self._eligible.copy()
        kept[rows] = False
        rest = np.flatnonzero(kept & (scores > -np.inf))
        if not len(rest):
            return RestSummary.empty()
        top = rest[largest(tie_bound[rest], _SUMMARY_SIZE)]
        top = top[np.argsort(-tie_bound[top])]
        first = np.minimum.accumulate(self._order[top])  # ranks
        named = {int(rank): self._ids[row] for rank, row in zip(self._order[top], top, strict=True)}
        others = np.setdiff1d(rest, top, assume_unique=True)
        other = self._ids[others[self._order[others].argmin()]] if len(others) else None
        return RestSummary(float(scores[rest].max()), tie_bound[top], [named[rank] for rank in first.tolist()], other)
