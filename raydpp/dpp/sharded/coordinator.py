"""Exact greedy MAP over shards: rounds of candidates from all, picks among them, and the picks told to all.

Lazy greedy (Minoux 1978) does not ask where bounds are kept. Each shard brings the bounds of its own items up to
date and sends its best, with what it knows of those it holds back; here they are solved in float64 against all
picks, and picked from while the best goes before everything held back. The picks are those of one machine.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from raydpp.dpp.budget import Budget, BudgetState
from raydpp.dpp.features import Features, UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Picks, Progress, condition, why_nothing_is_left
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import OracleName, bounded_oracle
from raydpp.dpp.oracles.working_set import WorkingSet
from raydpp.dpp.sharded.messages import Candidates, RoundUpdate, ShardRest
from raydpp.errors import UserError

_SLACK = 1.5  # shards of the same size have not the same number of the next picks
_LARGEST = 8192  # how many items are solved together at the most: their covariance takes half a gigabyte


class Shards(Protocol):
    """Shards, wherever they are (see ``shard.Shard``)."""

    def __len__(self) -> int: ...

    def advance(self, update: RoundUpdate, own: Mapping[int, Exact]) -> dict[int, Candidates | None]:
        """A round of some shards: the same update for all, and to each, by its number, what is its own."""

    def find(self, ids: Sequence[str]) -> list[Candidates]:
        """Items by their ids, from every shard."""


class ShardedGreedy:
    """An exact search over shards.

    Attributes:
        picks: The picks; their indices are numbers in the order of arrival here (see ``where``).
        rounds: How many rounds there were.

    Args:
        shards: Where the items are.
        kernel: The kernel.
        oracle: ``cholesky`` or ``feature-space``, as the shards have.
        size: M, the largest number of picks, with what is owned.
        budget: What may be picked.
        rows: N, the number of items of all shards.
        available: How many of them may be picked, by source.
        diversity: The weight of diversity, 1 - w in (0, 1].
    """

    def __init__(
        self,
        shards: Shards,
        kernel: Kernel,
        oracle: OracleName,
        size: int,
        budget: Budget,
        rows: int,
        available: Mapping[str, int],
        diversity: float = 1.0,
    ) -> None:
        self._shards = shards
        self._kernel = kernel
        self._kind = bounded_oracle(oracle)
        self._size = size
        self._diversity = diversity
        self._sources = sorted(available)
        self._ledger = budget.streaming_state(rows, {source: available[source] for source in self._sources})
        self.picks = Picks(self._kind.lookahead, diversity)
        self._items = CandidateCache(self._sources)
        self._given: Any | None = None
        self._news = np.empty(0, dtype=np.int64)  # picks that the shards have not been told
        self._told = 0
        self._story: list[np.ndarray] = []  # all that they have been told, (k, D) each
        self._own = {i: Exact.empty() for i in range(len(shards))}
        self._patience = 1
        self.rounds = 0

    @property
    def where(self) -> list[tuple[int, int]]:
        """The shard of each pick and its row there, in the order of picking."""
        return [self._items.origin[index] for index in self.picks.indices]

    @property
    def ids(self) -> list[str]:
        """The id of each pick."""
        return [str(self._items.order[index]) for index in self.picks.indices]

    def own(self, features: Features) -> None:
        """Make what is there already picks, (O, D), before anything else; at or below the floor it changes nothing."""
        given = UnitRows(features)
        kind = self._shards.find([])[0].features.dtype  # as on one machine, they are stored as the candidates are
        rows = UnitRows(given.stored(np.arange(len(given))).astype(kind))
        self._items.own(rows, self._ledger)
        self._news = condition(self, np.arange(len(rows)), self._kernel.floor, self._kind.working_set_size)

    def adopt(self, ids: Sequence[str], log_gains: Sequence[float]) -> None:
        """Go on behind these picks, which an earlier search over the same items made in this order.

        Raises:
            UserError: An id that no shard has.
        """
        if not ids:
            return
        for i, found in enumerate(self._shards.find(ids)):
            self._items.admit(i, found, self._ledger)
        place = {name: index for index, name in enumerate(self._items.order)}
        if missing := [name for name in ids if name not in place]:
            raise UserError(f"the pick {missing[0]} of the run to go on with is in no shard: the table has changed")
        picked = np.array([place[name] for name in ids], dtype=np.int64)
        given, rows = self._state()
        given.append(rows.take(torch.from_numpy(picked)))
        for index, gain in zip(picked.tolist(), log_gains, strict=True):
            self._ledger.take(index)
            self.picks.indices.append(index)
            self.picks.log_gains.append(gain)
        self._news = np.concatenate([self._news, picked])
        self._own = self._items.picks(picked.tolist(), len(self._shards))

    def run(self, stop_below: float = -math.inf, progress: Progress | None = None) -> str | None:
        """Pick until the budget is used up; returns why it ended before, in words, or None. See ``LocalGreedy.run``."""
        picks, state = self.picks, self._ledger
        while state.left > 0:
            answers = self._ask()
            if all(not len(a.rows) and a.held.best == -np.inf for a in answers):
                left = max(a.left for a in answers)
                if left < 0 and state.limits[0] is not None:
                    return None  # no item costs so little
                return why_nothing_is_left(state, len(picks.indices), left, self._kernel.floor)
            found = [self._items.admit(i, answer, state) for i, answer in enumerate(answers)]
            working_set = self.solve(np.concatenate(found))
            outside = ShardRest([answer.held for answer in answers])
            before = len(picks.indices)
            objective = Objective(
                self._kernel, self._diversity, self._items.modular if self._items.modular.any() else None
            )
            ended = picks.inside(working_set, objective, self._items.order, outside, state, stop_below, progress)
            self.commit(working_set)
            self._report(working_set, found, answers)
            self.rounds += 1
            if ended:
                return ended
            made = len(picks.indices) - before
            if not made:
                picks.backoff *= 2.0
            self._patience = 2 * self._patience if made < 2 else 1  # one at a time it never gets beyond many copies
        return None

    def solve(self, rows: np.ndarray) -> WorkingSet:
        """A working set of items that have arrived, (p,) int64, exact."""
        return self._state()[0].solve(rows)

    def commit(self, working_set: WorkingSet) -> None:
        """Take the working set's picks into account."""
        self._state()[0].commit(working_set)

    def _state(self) -> tuple[Any, UnitRows]:
        """What is known of the items that have arrived, given the picks; and these items."""
        if (rows := self._items.rows) is None:
            raise RuntimeError("nothing has arrived")
        if self._given is None:
            self._given = self._kind.posterior_type(rows, self._kernel, self._size)
        self._given.rows = rows
        return self._given, rows

    def _ask(self) -> list[Candidates]:
        """Tell all shards what is new, and hear who may be next; one that has forgotten hears the whole story."""
        picks, count = self.picks, len(self._shards)
        features = self._items.stored(self._news)
        tokens, allowed = self._ledger.limits
        usual = max(4, math.ceil((_SLACK if count > 1 else 1.0) * self._kind.working_set_size / count))
        each = min(usual * self._patience, max(usual, _LARGEST // count))
        update = RoundUpdate(
            self.rounds,
            self._told,
            features,
            picks.last_score,
            picks.expected_decrease,
            each,
            tokens,
            frozenset(source for source, may in zip(self._sources, allowed, strict=False) if not may),
        )
        answers = self._shards.advance(update, self._own)
        self._story.append(features)
        if lost := [i for i, answer in answers.items() if answer is None]:
            everything = np.concatenate([some for some in self._story if len(some)] or [features])
            picked = self._items.picks(picks.indices, count)
            again = replace(update, known=0, features=everything)
            answers |= self._shards.advance(again, {i: picked[i] for i in lost})
        self._told += len(features)
        self._news = self._news[:0]
        heard = [answers[i] for i in range(count)]
        if missing := [i for i, answer in enumerate(heard) if answer is None]:
            raise RuntimeError(f"shard {missing[0]} does not follow the search")
        return [answer for answer in heard if answer is not None]

    def _report(self, working_set: WorkingSet, found: list[np.ndarray], answers: list[Candidates]) -> None:
        """Keep for the next round what the shards are to hear: the picks, and the exact residuals of what they sent."""
        self._news = np.concatenate([self._news, working_set.rows[working_set.picked]])
        picked, start = np.zeros(len(working_set.rows), dtype=bool), 0
        picked[working_set.picked] = True
        for i, (some, answer) in enumerate(zip(found, answers, strict=True)):
            here = slice(start, start + len(some))
            self._own[i] = Exact(answer.rows, working_set.residuals[here], np.flatnonzero(picked[here]).tolist())
            start += len(some)


class CandidateCache:
    """n items, numbered as they came; each comes once.

    Attributes:
        order: (n,) ids, as objects.
        modular: (n,) float64: what each is worth whatever was picked before.
        origin: The shard of each, and its row there.

    Args:
        sources: The names of the state's groups.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._rows: UnitRows | None = None
        self._come: list[UnitRows] = []  # since rows were last asked for
        self.order = np.empty(0, dtype=object)
        self.modular = np.empty(0)
        self.origin: list[tuple[int, int]] = []
        self._index: dict[tuple[int, int], int] = {}
        self._ids: set[str] = set()
        self._groups = {source: i for i, source in enumerate(sources)}

    @property
    def rows(self) -> UnitRows | None:
        """(n, D), as the shards store them; None before the first."""
        if self._come:  # put behind the others together: each time all are copied
            first, *more = self._come if self._rows is None else [self._rows, *self._come]
            self._rows, self._come = first.with_rows(*more), []
        return self._rows

    def own(self, rows: UnitRows, state: BudgetState) -> None:
        """Take in what is owned and in no shard: it cannot be picked."""
        state.extend(len(rows))
        self.origin += [(-1, -1)] * len(rows)
        self._append(rows, [f"owned {i}" for i in range(len(rows))], np.zeros(len(rows)))

    def admit(self, shard: int, sent: Candidates, state: BudgetState) -> np.ndarray:
        """Take in what has never come before; returns the numbers of all that the shard has sent: (c,) int64.

        Raises:
            UserError: An id that another shard has sent too.
        """
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
            state.admit(groups, sent.costs[fresh])
            self._append(UnitRows(sent.features[fresh]), names, sent.modular[fresh])
        return np.array([self._index[shard, row] for row in sent.rows.tolist()], dtype=np.int64)

    def _append(self, rows: UnitRows, ids: list[str], modular: np.ndarray) -> None:
        self._come.append(rows)
        self.order = np.concatenate([self.order, np.array(ids, dtype=object)])
        self.modular = np.concatenate([self.modular, modular])

    def stored(self, index: np.ndarray) -> np.ndarray:
        """The features of some, (k,) -> (k, D), as they are stored."""
        return np.empty((0, 1)) if (rows := self.rows) is None else rows.stored(index)

    def picks(self, index: Iterable[int], shards: int) -> dict[int, Exact]:
        """Picks, (k,), by the shard that they are from."""
        own: dict[int, list[int]] = {shard: [] for shard in range(shards)}
        for shard, row in (self.origin[i] for i in index):
            own[shard].append(row)
        return {
            shard: Exact(np.array(rows, dtype=np.int64), np.zeros(len(rows)), list(range(len(rows))))
            for shard, rows in own.items()
        }
