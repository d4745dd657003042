"""Exact greedy MAP over a gradient table on the cluster: an actor for each shard, rounds led from here.

Ray restarts an actor that died wherever there is room; it reads its files again, receives all picks so far, and the
search goes on. The picks so far are kept in OUT/rounds, from which the same command
resumes where a search had to end.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace

import numpy as np
import pyarrow as pa

from raydpp import metrics
from raydpp.cluster import memory_for
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.oracles.choice import choose_sharded_oracle
from raydpp.dpp.sharded.coordinator import ShardedGreedy
from raydpp.progress import progress_bar
from raydpp.select.inputs import SelectionJob
from raydpp.select.plan import search_cost
from raydpp.select.request import Picked, Request
from raydpp.select.shard_actors import ShardActors
from raydpp.tables import Part, write_table

log = logging.getLogger(__name__)

SAVE_EVERY = 10.0
"""Seconds between two records of the picks so far."""


def exact_greedy(job: SelectionJob, record: Part, start: tuple[list[str], list[float]] | None = None) -> Picked:
    """Greedy over all files at once; the picks are those of a search over one table that holds them all.

    Ctrl-C ends the search with the picks it has, which are the selection for that budget.

    Args:
        job: What to select; its partitions are the shards.
        record: A Parquet file that keeps the picks so far, and is resumed from where it exists.
        start: Ids and log gains of picks to go on behind, where the record has none.

    Raises:
        UserError: A shard has no node to run on any more, or dies again and again.
    """
    began = time.monotonic()
    table, request, given = job.table, job.request, job.given
    owned = None if given.features is None else job.tasks.get(given.features)
    rows, most = table.rows, int(request.budget.size or table.rows)
    size, budget = min(most, rows) + given.count, replace(request.budget, size=most)
    oracle = choose_sharded_oracle(request.oracle, request.objective.kernel, rows, table.dimension, size)
    log.info("%s: exact greedy MAP over %d shards by the %s oracle", job.title, len(job.partitions), oracle)
    cost = search_cost(replace(request, budget=budget), max(job.partition_rows), table.dimension, given.count)
    shards = ShardActors(job, oracle, size, memory_for(cost.bytes, job.title))
    try:
        search = ShardedGreedy(shards, request.objective, oracle, size, budget, rows, shards.available())
        loaded = time.monotonic()
        if owned is not None:
            search.condition_on(owned)
        if done := _recorded(record) or start:
            search.resume_from(*done)
            log.info("%s: resumes after %d picks", job.title, len(done[0]))
        stopped, interrupted = _run(search, request, job.title, record)
        gains = search.picks.log_gains
        seconds = {"reading": loaded - began, "rounds": time.monotonic() - loaded}
        rows_picked = shards.take(search.where[: len(gains)])
    finally:
        shards.close()
    found = Selection.of(range(len(gains)), gains, stopped, oracle)
    return Picked(rows_picked, found, interrupted, search.rounds, seconds)


def _run(search: ShardedGreedy, request: Request, title: str, record: Part) -> tuple[str | None, bool]:
    """Search; returns why it ended early, and whether Ctrl-C did it. Whatever happens, picks are kept."""
    picks, saved = search.picks, time.monotonic()
    total, rounds = None if request.budget.size is None else int(request.budget.size), 0
    with progress_bar(title, total, "picks", len(picks.log_gains)) as bar:

        def report(count: int, gain: float) -> None:
            nonlocal saved, rounds
            metrics.count("rounds", search.rounds - rounds)
            rounds = search.rounds
            bar.set_postfix(log_gain=f"{gain:.3f}", rounds=search.rounds, refresh=False)
            bar.update(count - bar.n)
            if time.monotonic() - saved > SAVE_EVERY:
                _save(search, record)
                saved = time.monotonic()

        try:
            return search.run(report), False
        except KeyboardInterrupt:
            if not picks.log_gains:
                raise
            return f"interrupted after {len(picks.log_gains)} picks, which are the selection for that budget", True
        finally:
            metrics.count("rounds", search.rounds - rounds)
            _save(search, record)


def _save(search: ShardedGreedy, record: Part) -> None:
    gains = search.picks.log_gains
    write_table(
        record.folder, record.name, pa.table({"id": search.ids[: len(gains)], "log_gain": np.array(gains, np.float64)})
    )


def _recorded(record: Part) -> tuple[list[str], list[float]] | None:
    if not record.folder.has(record.name):
        return None
    table = record.read(["id", "log_gain"])
    return (table["id"].to_pylist(), table["log_gain"].to_pylist()) if len(table) else None
