"""A part of the items in an exact search over many: it keeps their features and bounds, and sends who may be next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from raydpp.dpp.features import Features, UnitRows, id_order
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import best_rows, largest
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import OracleName, bounded_oracle
from raydpp.dpp.sharded.messages import Candidates, RestSummary, RoundUpdate

_SHRINK = 3.0  # what is kept up to date may be more than what matters by this factor
_SOON = 0.5  # what the next picks may reach by this part of the drop looked ahead has to be up to date
_SUMMARY_SIZE = 64  # of how many items held back is known how high each reaches


@dataclass(frozen=True, eq=False)
class Items:
    """The items of a shard.

    Attributes:
        features: (n, D) of unit norm.
        ids: n distinct strings, distinct in all shards.
        modular: (n,) float64: what each is worth whatever was picked before.
        sources: (n,) labels; None where there are no quotas.
        costs: (n,) what each costs; None where costs do not count.
        exclude: (k,) items never to be picked.
    """

    features: Features
    ids: Sequence[str]
    modular: np.ndarray | None = None
    sources: np.ndarray | None = None
    costs: np.ndarray | None = None
    exclude: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))


class Shard:
    """n of the items of an exact search, with an oracle that follows the picks made among all shards' candidates.

    Attributes:
        picks: How many picks are taken into account.

    Args:
        items: The items.
        kernel: The kernel.
        oracle: ``cholesky`` or ``feature-space``.
        size: M, the largest number of picks of the search, with what is owned.
        diversity: The weight of diversity, 1 - w in (0, 1].
    """

    def __init__(self, items: Items, kernel: Kernel, oracle: OracleName, size: int, diversity: float = 1.0) -> None:
        self._items = items
        self._rows = UnitRows(items.features, items.ids)  # (n, D)
        n = len(self._rows)
        self._oracle = bounded_oracle(oracle)(self._rows, kernel, size)
        self._objective = Objective(kernel, diversity, items.modular)
        self._order = id_order(items.ids, n)
        self._eligible = np.ones(n, dtype=bool)
        self._eligible[items.exclude] = False
        self._sent = np.zeros(n, dtype=bool)
        self._round = -1
        self._refined_at = 0
        self.picks = 0

    @property
    def available(self) -> dict[str, int]:
        """How many items may be picked, by source; all under one name where there are no sources."""
        if self._items.sources is None:
            return {"": int(self._eligible.sum())}
        labels, counts = np.unique(self._items.sources, return_inverse=True)
        eligible = np.bincount(counts[self._eligible], minlength=len(labels))
        return dict(zip(labels.tolist(), eligible.tolist(), strict=True))

    def advance(self, update: RoundUpdate, own: Exact) -> Candidates | None:
        """A round: follow the picks made since the last one, and say who may be next.

        Args:
            update: What all shards are told.
            own: The exact residuals, after these picks, of the items that this one sent in the last round.

        Returns:
            None where this shard has not been told of the picks before: it has been made anew since.
        """
        if update.number != self._round:
            if update.known != self.picks:
                return None
            self._follow(update.features, own)
            self._round = update.number
        if update.tokens is not None and self._items.costs is not None:
            self._eligible &= self._items.costs <= update.tokens
        if update.blocked and self._items.sources is not None:
            self._eligible &= ~np.isin(self._items.sources, sorted(update.blocked))
        return self._candidates(update)

    def find(self, ids: Sequence[str]) -> Candidates:
        """Those of these items that are here, sent as candidates are."""
        place = {name: row for row, name in enumerate(self._items.ids)}
        rows = np.array([place[name] for name in ids if name in place], dtype=np.int64)
        return self._send(rows, np.empty(0), np.empty(0), self._left)

    def left_above(self, features: np.ndarray, level: float) -> tuple[float, int]:
        """Follow picks, (k, D) as stored; then the best score left and how many score above a level.

        What cannot reach the level is not brought up to date: its bound stands for it.
        """
        self._follow(features, Exact.empty())
        rows = np.flatnonzero(self._eligible)
        self._oracle.refine(rows, self._objective.residuals(level, rows))
        scores = self._scores()[0]
        return float(scores.max(initial=-np.inf)), int(np.count_nonzero(scores > level))

    def _follow(self, features: np.ndarray, own: Exact) -> None:
        self._sent[own.rows] = True  # they have arrived
        self._eligible[own.rows[own.picked]] = False
        picked = self._rows.take(slice(0)) if not len(features) else UnitRows(features, device=self._rows.device).take()
        self._oracle.append(picked, own)  # (k, D)
        self.picks += len(features)

    @property
    def _left(self) -> float:
        return float(self._oracle.bounds.max(where=self._eligible, initial=-1.0))

    def _scores(self) -> tuple[np.ndarray, np.ndarray]:
        scores, tie_bound = self._objective.scores(self._oracle.bounds)  # (n,)
        scores[~self._eligible] = tie_bound[~self._eligible] = -np.inf
        return scores, tie_bound

    def _candidates(self, update: RoundUpdate) -> Candidates:
        scores, tie_bound = self._scores()
        top = float(scores.max()) if update.last_score is None else update.last_score
        aim = top - update.expected_decrease
        ahead = np.flatnonzero(scores >= aim)
        stale = self._oracle.stale
        due = bool((scores[stale] >= top - _SOON * update.expected_decrease).any())
        loose = self.picks > self._refined_at and np.count_nonzero(~stale) > _SHRINK * len(ahead)
        if top > -np.inf and (due or loose):
            self._oracle.refine(ahead, self._objective.residuals(aim, ahead))
            self._refined_at = self.picks
            (scores, tie_bound), stale = self._scores(), self._oracle.stale
        limit = scores.max(where=stale, initial=-np.inf)
        fresh = np.flatnonzero(~stale & (scores > limit))
        rows = best_rows(fresh, scores, tie_bound, stale, self._order, update.count) if len(fresh) else fresh
        return self._send(rows, scores, tie_bound, self._left)

    def _send(self, rows: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray, left: float) -> Candidates:
        new = np.flatnonzero(~self._sent[rows])
        some, items = rows[new], self._items
        return Candidates(
            rows,
            self._held(rows, scores, tie_bound) if len(scores) else RestSummary(-np.inf, scores, [], None),
            left,
            new,
            self._rows.stored(some),
            [items.ids[row] for row in some],
            np.zeros(len(some)) if items.modular is None else items.modular[some],
            np.full(len(some), np.inf) if items.costs is None else items.costs[some],
            [""] * len(some) if items.sources is None else items.sources[some].tolist(),
        )

    def _held(self, rows: np.ndarray, scores: np.ndarray, tie_bound: np.ndarray) -> RestSummary:
        back = self._eligible.copy()
        back[rows] = False
        back = np.flatnonzero(back & (scores > -np.inf))
        if not len(back):
            return RestSummary(-np.inf, np.empty(0), [], None)
        top = back[largest(tie_bound[back], _SUMMARY_SIZE)]
        top = top[np.argsort(-tie_bound[top])]
        first = np.minimum.accumulate(self._order[top])  # ranks
        named = {int(rank): self._items.ids[row] for rank, row in zip(self._order[top], top, strict=True)}
        rest = np.setdiff1d(back, top, assume_unique=True)
        smallest = self._items.ids[rest[self._order[rest].argmin()]] if len(rest) else None
        return RestSummary(
            float(scores[back].max()), tie_bound[top], [named[rank] for rank in first.tolist()], smallest
        )
