"""Exact greedy MAP over shards: rounds of candidates from all, picks among them, and the picks sent to all.

Lazy greedy (Minoux 1978) does not ask where bounds are kept. Each shard brings the bounds of its own items up to
date and sends its best, with a bound on the rest; here they are solved in float64 against all picks, and picked from
while the best goes before all that was not sent. The picks are those of one machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from raydpp.dpp import OracleName
from raydpp.dpp.budget import Budget, BudgetState
from raydpp.dpp.features import Features, UnitRows
from raydpp.dpp.lazy_greedy import LazyGreedy, Proposal, condition
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import bounded_oracle
from raydpp.dpp.oracles.working_set import WorkingSet
from raydpp.dpp.sharded.messages import Candidates, RoundUpdate, ShardRest
from raydpp.errors import UserError

_SLACK = 1.5  # shards of the same size have not the same number of the next picks
_LARGEST = 8192  # how many items are solved together at most: their covariance takes half a gigabyte


class Shards(Protocol):
    """Shards, wherever they are (see ``shard.Shard``)."""

    def __len__(self) -> int: ...

    def advance(self, update: RoundUpdate, own: Mapping[int, Exact]) -> dict[int, Candidates | None]:
        """A round of some shards: the same update for all, and to each, by its number, what is its own."""

    def find(self, ids: Sequence[str]) -> list[Candidates]:
        """Items by their ids, from every shard."""


class ShardedGreedy(LazyGreedy):
    """An exact search over shards that have the same objective, oracle and size.

    ``rows`` is N, of all shards; ``available`` says how many of these may be picked, by source. The indices of picks
    are numbers in the cache of candidates (see ``where`` and ``ids``).
    """

    def __init__(
        self,
        shards: Shards,
        objective: Objective,
        oracle: OracleName,
        size: int,
        budget: Budget,
        rows: int,
        available: Mapping[str, int],
    ) -> None:
        self._sources = sorted(available)
        self._oracle = bounded_oracle(oracle)
        state = budget.streaming_state(rows, {source: available[source] for source in self._sources})
        super().__init__(objective, state, self._oracle.lookahead)
        self._shards = shards
        self._size = size
        self._cache = CandidateCache(self._sources)
        self._posterior: Any = None
        self._unsent = np.empty(0, dtype=np.int64)  # picks that the shards do not have
        self._history: list[np.ndarray] = []  # all that were sent, (k, D) each
        self._own = {shard: Exact.empty() for shard in range(len(shards))}
        self._widening = 1

    @property
    def where(self) -> list[tuple[int, int]]:
        """The shard of each pick and its row there, in the order of picking."""
        return [self._cache.origin[index] for index in self.picks.indices]

    @property
    def ids(self) -> list[str]:
        """The id of each pick."""
        return [str(self._cache.order[index]) for index in self.picks.indices]

    def condition_on(self, features: Features) -> None:
        """Make what is there already picks, (O, D), before anything else; at or below the floor it changes nothing."""
        candidates = torch.from_numpy(self._shards.find([])[0].features)
        rows = UnitRows(features).stored_as(candidates)  # as on one machine
        self._cache.add_owned(rows, self._state)
        floor, width = self._objective.kernel.floor, self._oracle.working_set_size
        self._unsent = condition(self._solver(), np.arange(len(rows)), floor, width)

    def resume_from(self, ids: Sequence[str], log_gains: Sequence[float]) -> None:
        """Go on behind these picks, which an earlier search over the same items made in this order."""
        if not ids:
            return
        for shard, found in enumerate(self._shards.find(ids)):
            self._cache.add(shard, found, self._state)
        place = {name: index for index, name in enumerate(self._cache.order)}
        if missing := [name for name in ids if name not in place]:
            raise UserError(f"the pick {missing[0]} of the run to go on with is in no shard: the table has changed")
        picked = np.array([place[name] for name in ids], dtype=np.int64)
        solver = self._solver()
        solver.append(solver.rows.take(torch.from_numpy(picked)))
        for index, gain in zip(picked.tolist(), log_gains, strict=True):
            self._state.spend(index)
            self.picks.indices.append(index)
            self.picks.log_gains.append(gain)
        self._unsent = np.concatenate([self._unsent, picked])
        self._own = self._cache.by_shard(picked, np.zeros(len(picked)), range(len(picked)), len(self._shards))

    def propose(self) -> Proposal | float:
        answers = self._ask()
        if all(not len(answer.rows) and answer.rest.best == -np.inf for answer in answers):
            return max(answer.largest_residual for answer in answers)
        rows = np.concatenate([self._cache.add(i, answer, self._state) for i, answer in enumerate(answers)])
        rest = ShardRest([answer.rest for answer in answers])
        return Proposal(self._solver().solve(rows), self._cache.order[rows], self._cache.modular[rows], rest)

    def commit(self, working_set: WorkingSet) -> None:
        """Take picks into account here, and keep for the shards what is new of the items that they sent."""
        self._solver().commit(working_set)
        rows, made = working_set.rows, len(working_set.picked)
        self._unsent = np.concatenate([self._unsent, rows[working_set.picked]])
        self._own = self._cache.by_shard(rows, working_set.residuals, working_set.picked, len(self._shards))
        if not made:
            self.picks.backoff *= 2.0
        self._widening = 2 * self._widening if made < 2 else 1  # one pick a round never gets beyond many copies

    def _solver(self) -> Any:
        """The posterior of the items in the cache."""
        rows = self._cache.rows
        if self._posterior is None:
            self._posterior = self._oracle.posterior_type(rows, self._objective.kernel, self._size)
        self._posterior.rows = rows
        return self._posterior

    def _ask(self) -> list[Candidates]:
        """Send all shards what is new, and receive their candidates; one that was restarted gets the whole history."""
        picks, count = self.picks, len(self._shards)
        features = self._cache.stored(self._unsent)
        tokens, allowed = self._state.limits
        usual = max(4, math.ceil((_SLACK if count > 1 else 1.0) * self._oracle.working_set_size / count))
        update = RoundUpdate(
            self.rounds,
            sum(len(some) for some in self._history),
            features,
            picks.last_score,
            picks.expected_decrease,
            min(usual * self._widening, max(usual, _LARGEST // count)),
            tokens,
            frozenset(source for source, may in zip(self._sources, allowed, strict=False) if not may),
        )
        answers = self._shards.advance(update, self._own)
        if len(features):
            self._history.append(features)
        if lost := [i for i, answer in answers.items() if answer is None]:
            everything = np.concatenate(self._history or [features])
            made = len(picks.indices)
            picked = self._cache.by_shard(picks.indices, np.zeros(made), range(made), count)
            answers |= self._shards.advance(replace(update, sent=0, features=everything), {i: picked[i] for i in lost})
        self._unsent = self._unsent[:0]
        found = [answers[i] for i in range(count)]
        if missing := [i for i, answer in enumerate(found) if answer is None]:
            raise RuntimeError(f"shard {missing[0]} does not follow the search")
        return [answer for answer in found if answer is not None]


class CandidateCache:
    """All items that shards ever sent, numbered in the order of arrival; ``sources`` name the budget's groups."""

    def __init__(self, sources: Sequence[str]) -> None:
        self._rows: UnitRows | None = None
        self._added: list[UnitRows] = []  # since rows were last asked for
        self.order = np.empty(0, dtype=object)  # (n,) ids
        self.modular = np.empty(0)  # (n,)
        self.origin: list[tuple[int, int]] = []  # the shard of each, and its row there; -1 for what is owned
        self._index: dict[tuple[int, int], int] = {}
        self._ids: set[str] = set()
        self._groups = {source: i for i, source in enumerate(sources)}

    @property
    def rows(self) -> UnitRows:
        """(n, D), as the shards store them."""
        if self._added:  # put behind the others together: each time all are copied
            first, *more = self._added if self._rows is None else [self._rows, *self._added]
            self._rows, self._added = first.with_rows(*more), []
        if self._rows is None:
            raise RuntimeError("no item was sent")
        return self._rows

    def add_owned(self, rows: UnitRows, state: BudgetState) -> None:
        """Take in what is owned and in no shard: it cannot be picked."""
        n = len(rows)
        state.add_items(np.zeros(n, dtype=np.int64), np.full(n, np.inf), eligible=False)
        self.origin += [(-1, -1)] * n
        self._append(rows, [f"owned {i}" for i in range(n)], np.zeros(n))

    def add(self, shard: int, sent: Candidates, state: BudgetState) -> np.ndarray:
        """Take in what is new; returns the numbers of all that the shard has sent: (c,) int64."""
        fresh = [j for j, place in enumerate(sent.new) if (shard, int(sent.rows[place])) not in self._index]
        if fresh:
            for key in ((shard, int(row)) for row in sent.rows[sent.new[fresh]]):
                self._index[key] = len(self.origin)
                self.origin.append(key)
            names = [sent.ids[j] for j in fresh]
            if twice := self._ids.intersection(names):
                raise UserError(f"the id {min(twice)} is in two partitions: ids must be distinct")
            self._ids.update(names)
            groups = np.array([self._groups.get(sent.sources[j], 0) for j in fresh], dtype=np.int64)
            state.add_items(groups, sent.costs[fresh])
            self._append(UnitRows(sent.features[fresh]), names, sent.modular[fresh])
        return np.array([self._index[shard, row] for row in sent.rows.tolist()], dtype=np.int64)

    def _append(self, rows: UnitRows, ids: list[str], modular: np.ndarray) -> None:
        self._added.append(rows)
        self.order = np.concatenate([self.order, np.array(ids, dtype=object)])
        self.modular = np.concatenate([self.modular, modular])

    def stored(self, index: np.ndarray) -> np.ndarray:
        """The features of some, (k,) -> (k, D), as they are stored."""
        return self.rows.stored(index) if self.origin else np.empty((0, 1))

    def by_shard(self, index: Any, residuals: np.ndarray, picked: Sequence[int], shards: int) -> dict[int, Exact]:
        """Exact residuals of items, (k,), and places of picks among them, by shard and as numbered there."""
        origin = np.array([self.origin[i] for i in index], dtype=np.int64).reshape(-1, 2)  # (k, 2)
        found = {}
        for shard in range(shards):
            here = np.flatnonzero(origin[:, 0] == shard)
            found[shard] = Exact(origin[here, 1], residuals[here], np.flatnonzero(np.isin(here, picked)).tolist())
        return found
