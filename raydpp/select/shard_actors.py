"""Shards of a gradient table in actors of the cluster."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.cluster import alive_nodes, growth, value_of
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import OracleName
from raydpp.dpp.sharded.messages import Candidates, RoundUpdate
from raydpp.dpp.sharded.shard import Shard
from raydpp.errors import UserError
from raydpp.select.inputs import SelectionJob
from raydpp.select.request import Request
from raydpp.tables import GradientTable, Part, concatenated

log = logging.getLogger(__name__)

PATIENCE = 300.0
"""Seconds that shards may have no node to run on before the search ends; a worker's packages are installed in it."""

DEATHS = 5
"""How often a shard's process may die in one round before the search ends."""

_LOOK = 2.0  # seconds between two looks at the shards' processes


class ShardActors:
    """Shards in actors of the cluster, for ``ShardedGreedy``.

    Ray restarts an actor that died wherever there is room, and calls it again. What a shard is made of comes with every
    call, since what is given to a constructor in the object store is gone when it is called again.
    """

    def __init__(self, job: SelectionJob, oracle: OracleName, size: int, memory: int = 0) -> None:
        import ray

        count = len(job.partitions)
        now, possible = _cpus()
        cpus = cpus_of_each(count, possible)
        self._needs = f"{cpus:g} CPU" + (f" and {memory / 1e9:.1f} GB of memory" if memory else "")
        threads = max(1, now // count)
        setup = _Setup(job.table, job.partitions, job.request, oracle, size, job.given.excluded, threads)
        self._put = job.tasks.put
        self._setup = [self._put(setup)]  # in a list a reference stays one: each actor reads it once
        make = ray.remote(_ShardActor).options(
            num_cpus=cpus, memory=memory or None, max_restarts=-1, max_task_retries=-1, scheduling_strategy="SPREAD"
        )
        self._actors: list[Any] = [make.remote(number) for number in range(count)]

    def __len__(self) -> int:
        return len(self._actors)

    def available(self) -> dict[str, int]:
        """How many items may be picked, by source."""
        found: dict[str, int] = {}
        for counts in self._all(lambda actor: actor.available.remote(self._setup)):
            for source, count in counts.items():
                found[source] = found.get(source, 0) + count
        return found

    def advance(self, update: RoundUpdate, own: Mapping[int, Exact]) -> dict[int, Candidates | None]:
        """A round of some shards."""
        sent = self._put(update)  # once, however many receive it
        return self._collect({i: self._actors[i].advance.remote(self._setup, sent, exact) for i, exact in own.items()})

    def find(self, ids: Sequence[str]) -> list[Candidates]:
        """Items by their ids, from every shard."""
        wanted = self._put(list(ids))
        return self._all(lambda actor: actor.find.remote(self._setup, wanted))

    def take(self, where: Sequence[tuple[int, int]]) -> pa.Table:
        """Rows of the table: a shard and a row there, for each."""
        order = sorted(range(len(where)), key=lambda k: where[k])
        rows: dict[int, list[int]] = {shard: [] for shard in range(len(self))}
        for k in order:
            rows[where[k][0]].append(where[k][1])
        found = self._collect({i: self._actors[i].take.remote(self._setup, some) for i, some in rows.items()})
        return concatenated([found[i] for i in range(len(self))]).take(pa.array(np.argsort(order), pa.int64()))

    def close(self) -> None:
        """End the actors."""
        import ray

        for actor in self._actors:
            ray.kill(actor)

    def _all(self, call: Callable[[Any], Any]) -> list[Any]:
        found = self._collect({i: call(actor) for i, actor in enumerate(self._actors)})
        return [found[i] for i in range(len(self))]

    def _collect(self, references: Mapping[int, Any]) -> dict[int, Any]:
        import ray

        found: dict[int, Any] = {}
        waiting = {reference: i for i, reference in references.items()}
        watch = _Watch(len(self), self._needs)
        while waiting:
            finished, _ = ray.wait(list(waiting), timeout=_LOOK)
            found |= {waiting.pop(reference): ray.get(reference) for reference in finished}
            watch.look([] if finished else [self._actors[i] for i in waiting.values()])
        return found


class _Watch:
    """Ends a hopeless wait for shards: they have no node to run on and get none, or die again and again."""

    def __init__(self, count: int, needs: str) -> None:
        self._count = count
        self._needs = needs
        self._unplaced = 0
        self._since = time.monotonic()
        self._warned = False
        self._restarts: dict[Any, int] = {}  # at the first look

    def look(self, actors: Sequence[Any]) -> None:
        """Look at those actors that are waited for: one that only takes its time is in a process."""
        from ray._private.state import state

        rows = {actor._actor_id: state.actor_table(actor._actor_id.hex()) for actor in actors}
        for actor, row in rows.items():
            restarts = row.get("NumRestarts", 0)
            if restarts - self._restarts.setdefault(actor, restarts) >= DEATHS:
                raise UserError(
                    f"the process of a shard died {DEATHS} times in one round, most likely for lack of memory: use"
                    " more --partitions, a smaller --size, or larger nodes"
                )
        unplaced = sum(row.get("State") != "ALIVE" for row in rows.values())
        if unplaced != self._unplaced or not unplaced:
            self._unplaced, self._since = unplaced, time.monotonic()
            return
        waited = time.monotonic() - self._since
        now, possible = _cpus()
        what = f"{unplaced} of {self._count} shards have no node to run on: each needs {self._needs} of its own"
        if waited > PATIENCE and possible <= now:
            raise UserError(
                f"{what}. The picks so far are kept: the same command resumes from them, once there is room"
            )
        if waited > PATIENCE / 5 and not self._warned:
            log.warning("%s; waiting for room", what)
            self._warned = True


def cpus_of_each(shards: int, cpus: int) -> float:
    """The CPUs of a shard's actor: one, or where there are more shards such a part of one that all find room.

    The parts of one CPU are those of one node: five shards get halves of four CPUs, not four fifths.
    """
    return math.floor(1e4 / math.ceil(shards / max(1, cpus))) / 1e4  # Ray counts in ten-thousandths


def _cpus() -> tuple[int, int]:
    """The whole CPUs of the cluster's nodes: now, and as many as it can get."""
    now = sum(int(node["Resources"].get("CPU", 0)) for node in alive_nodes())
    return now, max(now, int(growth().get("CPU", 0)))


@dataclass(frozen=True, eq=False)
class _Setup:
    """What shards are made of: see ``exact.exact_greedy``."""

    table: GradientTable
    partitions: list[list[Part]]
    request: Request
    oracle: OracleName
    size: int
    excluded: pa.Array
    threads: int


class _ShardActor:
    """A shard, made with the first call; each call brings a reference, in a list, to what it is made of."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._made: tuple[pa.Table, Shard] | None = None

    def available(self, setup: list[Any]) -> dict[str, int]:
        return self._make(setup)[1].available

    def advance(self, setup: list[Any], update: RoundUpdate, own: Exact) -> Candidates | None:
        return self._make(setup)[1].advance(update, own)

    def find(self, setup: list[Any], ids: list[str]) -> Candidates:
        return self._make(setup)[1].find(ids)

    def take(self, setup: list[Any], rows: list[int]) -> pa.Table:
        return self._make(setup)[0].take(pa.array(rows, pa.int64()))

    def _make(self, setup: list[Any]) -> tuple[pa.Table, Shard]:
        if self._made is None:
            import torch

            of: _Setup = value_of(setup[0])
            torch.set_num_threads(of.threads)
            table = of.table.read(of.partitions[self._number], of.request.columns)
            items = of.request.items(table, of.excluded)
            self._made = table, Shard(items, of.request.objective, of.oracle, of.size)
            pa.default_memory_pool().release_unused()  # what reading and sorting have left behind
        return self._made
