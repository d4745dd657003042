"""Greedy MAP by partition and merge: a task for each partition, then merges of their picks.

GreeDi (Mirzasoleiman et al. 2013); composable core-sets (Indyk et al. 2014). Greedy inside each random partition picks
more than its share, greedy over the union of these picks selects again, in several levels where one task would not hold
it. What the merge may have lost, ``certificate`` says.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from raydpp.dpp.lazy_greedy import Selection
from raydpp.progress import progress_bar, reporter
from raydpp.select.inputs import ROWS_PER_PARTITION, SelectionJob
from raydpp.select.partition_cache import keep_picks, kept_picks
from raydpp.select.plan import MergeLevel, merge_levels, search_cost
from raydpp.select.request import Picked, Request, select_rows
from raydpp.tables import GradientTable, Part, concatenated

log = logging.getLogger(__name__)

OVERSAMPLE = 4.0
"""By `python tests/benchmarks/distributed.py --parts loss`: 0.003 nats per pick at the most for 16 partitions."""


def distributed_greedy(job: SelectionJob, oversample: float) -> Picked:
    """Greedy inside each partition, then over the union of their picks; nothing but the result comes here.

    Ctrl-C ends the last search with the picks it has, which are the selection for that budget; before, while several
    partitions are at work, it ends the stage.

    Args:
        job: What to select.
        oversample: How many times its share a partition hands in.
    """
    tasks, table = job.tasks, job.table
    plan = merge_levels(job.request, job.partition_rows, oversample, ROWS_PER_PARTITION)
    _log_plan(job, plan)
    excluded = tasks.put(job.given.excluded)
    picks: list[Any] = []  # references: the rows that each task picked, and its selection
    seconds: dict[str, float] = {}
    total = None if job.request.budget.size is None else sum(sum(level.picks) for level in plan)
    with progress_bar(job.title, total, "picks") as bar:
        counter = tasks.counter(bar)
        for depth, level in enumerate(plan):
            start = time.monotonic()
            threads = max(1, tasks.threads // len(level.groups))
            common = (level.request, counter, threads, job.given.features)
            costs = [search_cost(level.request, rows, table.dimension, job.given.count) for rows in level.rows]
            if depth == 0:
                kept = [job.cache.file_for(parts, level.request) if job.cache else None for parts in job.partitions]
                work: list[Any] = [
                    (_select_partition, table, parts, excluded, file)
                    for parts, file in zip(job.partitions, kept, strict=True)
                ]
            else:
                work = [(_merge, *(picks[i] for i in group)) for group in level.groups]
            picks = [
                tasks.submit(function, *common, *more, memory=cost.bytes)
                for (function, *more), cost in zip(work, costs, strict=True)
            ]
            tasks.wait(picks, counter, bar, stoppable=len(picks) == 1)
            name = "merge" if depth else "partitions"
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
        rows, selection = tasks.get(picks[0])
        interrupted = "interrupted" in (selection.stopped or "")
        if bar.total is not None and not interrupted:
            bar.n = bar.total
        bar.update(0)
    return Picked(rows, selection, interrupted, seconds=seconds, kept=[file.name for file in kept if file])


def _log_plan(job: SelectionJob, plan: list[MergeLevel]) -> None:
    request = plan[0].request
    if request.objective.quality_weight == 1.0:
        return
    name = search_cost(request, max(plan[0].rows), job.table.dimension).oracle
    chosen = "" if request.oracle != "auto" else " (chosen by size)"
    log.info("%s: greedy MAP by the %s oracle%s", job.title, name, chosen)
    for level in plan[1:]:
        log.info("%s: then %s rows in %d merge tasks", job.title, f"{sum(level.rows):,}", len(level.groups))


def _select_partition(
    request: Request,
    counter: Any,
    threads: int,
    owned: np.ndarray | None,
    table: GradientTable,
    parts: list[Part],
    exclude: pa.Array | None,
    kept: Part | None,
) -> tuple[pa.Table, Selection]:
    if kept and (found := kept_picks(kept, request)):
        return found
    torch.set_num_threads(threads)
    rows, selection = select_rows(table.read(parts, request.columns), request, reporter(counter), owned, exclude)
    if kept:
        keep_picks(kept, request, rows, selection)
    return rows, _without_indices(selection)


def _merge(
    request: Request,
    counter: Any,
    threads: int,
    owned: np.ndarray | None,
    *parts: tuple[pa.Table, Selection],
) -> tuple[pa.Table, Selection]:
    torch.set_num_threads(threads)
    rows, selection = select_rows(concatenated([picks for picks, _ in parts]), request, reporter(counter), owned)
    return rows, _without_indices(selection)


def _without_indices(selection: Selection) -> Selection:
    """They are places in a table that stays with the task."""
    return replace(selection, indices=np.arange(len(selection.indices)))
