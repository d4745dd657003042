"""Exact greedy MAP over a gradient table on the cluster: an actor for each shard, rounds led from here.

Ray starts an actor that died anew, wherever there is room; it reads its files again, hears the whole story of the
picks, and the search goes on. The picks so far are kept in OUT/rounds, from which the same command goes on where a
search had to end.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs

from raydpp.cluster import memory_for
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.oracles.choice import choose_sharded_oracle
from raydpp.dpp.sharded.coordinator import ShardedGreedy
from raydpp.progress import progress_bar
from raydpp.select.plan import need
from raydpp.select.request import Picked, Request
from raydpp.select.shard_actors import ShardActors
from raydpp.storage import resolve
from raydpp.tables import GradientTable, Part, read_columns, write_table

log = logging.getLogger(__name__)

SAVE_EVERY = 10.0
"""Seconds between two records of the picks so far."""


def exact_greedy(
    table: GradientTable,
    groups: list[list[Part]],
    request: Request,
    title: str,
    record: str,
    owned: Any = None,
    exclude: pa.Array | None = None,
    owned_rows: int = 0,
    start: tuple[list[str], list[float]] | None = None,
) -> Picked:
    """Greedy over all files at once; the picks are those of a search over one table that holds them all.

    Ctrl-C ends the search with the picks it has, which are the selection for that budget.

    Args:
        table: The table.
        groups: Its files, in shards.
        request: What to select by.
        title: Of the progress bar.
        record: URL of a Parquet file that keeps the picks so far, and is gone on from where it exists.
        owned: A reference to the (O, D) features of what is there already, or None.
        exclude: Ids not to be picked.
        owned_rows: O.
        start: Ids and log gains of picks to go on behind, where the record has none.

    Raises:
        UserError: A shard has no node to run on any more, or dies again and again.
    """
    import ray

    began = time.monotonic()
    have = None if owned is None else ray.get(owned)
    rows, most = table.rows, int(request.budget.size or table.rows)
    size, budget = min(most, rows) + owned_rows, replace(request.budget, size=most)
    oracle = choose_sharded_oracle(request.oracle, request.objective.kernel, rows, table.dimension, size)
    log.info("%s: exact greedy MAP over %d shards by the %s oracle", title, len(groups), oracle)
    largest = max(sum(part.rows for part in group) for group in groups)
    memory = memory_for(need(replace(request, budget=budget), largest, table.dimension, owned_rows).bytes, title)
    shards = ShardActors(table, groups, request, oracle, size, exclude, memory)
    try:
        search = ShardedGreedy(
            shards,
            request.objective,
            oracle,
            size,
            budget,
            rows,
            shards.available(),
        )
        loaded = time.monotonic()
        if have is not None:
            search.condition_on(have)
        if done := _recorded(record) or start:
            search.resume_from(*done)
            log.info("%s: goes on behind %d picks", title, len(done[0]))
        stopped, interrupted = _run(search, request, title, record)
        gains = search.picks.log_gains
        seconds = {"reading": loaded - began, "rounds": time.monotonic() - loaded}
        rows_picked = shards.take(search.where[: len(gains)])
    finally:
        shards.close()
    found = Selection.of(range(len(gains)), gains, stopped, oracle)
    return Picked(rows_picked, found, interrupted, search.rounds, seconds)


def _run(search: ShardedGreedy, request: Request, title: str, record: str) -> tuple[str | None, bool]:
    """Search; returns why it ended early, in words, and whether Ctrl-C did it. Whatever happens, picks are kept."""
    picks, saved = search.picks, time.monotonic()
    with progress_bar(title, None if request.budget.size is None else int(request.budget.size), "picks") as bar:
        bar.update(len(picks.log_gains))

        def report(count: int, gain: float) -> None:
            nonlocal saved
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
            _save(search, record)


def _save(search: ShardedGreedy, record: str) -> None:
    gains = search.picks.log_gains
    write_table(record, pa.table({"id": search.ids[: len(gains)], "log_gain": np.array(gains, np.float64)}))


def _recorded(record: str) -> tuple[list[str], list[float]] | None:
    system, path = resolve(record)
    if system.get_file_info(path).type != pafs.FileType.File:
        return None
    table = read_columns([Part(record, 0)], ["id", "log_gain"])
    return (table["id"].to_pylist(), table["log_gain"].to_pylist()) if len(table) else None
