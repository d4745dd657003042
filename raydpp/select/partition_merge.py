"""Greedy MAP over a gradient table, on the cluster: a task for each partition, one for the merge."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.cluster import memory_for, threads_of_a_node
from raydpp.dpp.lazy_greedy import Selection
from raydpp.progress import Counter, progress_bar, reporter, watch
from raydpp.select.plan import ROWS_PER_PARTITION, Level, levels, need
from raydpp.select.request import Picked, Request, select_rows
from raydpp.tables import GradientTable, Part

log = logging.getLogger(__name__)
OVERSAMPLE = 4.0
"""By `python tests/benchmarks/distributed.py --parts loss`: 0.003 nats a pick at the most for 16 partitions."""


def distributed_greedy(
    table: GradientTable,
    groups: list[list[Part]],
    request: Request,
    oversample: float,
    title: str,
    owned: Any = None,
    exclude: pa.Array | None = None,
    owned_rows: int = 0,
) -> Picked:
    """Greedy inside each group of files, then over the union of their picks; nothing but the result comes here.

    Ctrl-C ends the last search with the picks it has, which are the selection for that budget; before, while several
    partitions are at work, it ends the stage.

    Args:
        table: The table.
        groups: Its files, in partitions.
        request: What to select by.
        oversample: How many times its share a partition hands in.
        title: Of the progress bar.
        owned: A reference to the (O, D) features of what is there already, or None.
        exclude: Ids not to be picked.
        owned_rows: O.
    """
    import ray

    counter = ray.remote(num_cpus=0)(Counter).remote()
    plan = levels(request, [sum(part.rows for part in group) for group in groups], oversample, ROWS_PER_PARTITION)
    _say(table, plan, title)
    excluded = ray.put(exclude)
    parts: list[Any] = [None] * len(groups)
    seconds: dict[str, float] = {}
    with progress_bar(title, _total(plan), "picks") as bar:
        for depth, level in enumerate(plan):
            start = time.monotonic()
            each = max(1, threads_of_a_node() // len(level.bundles))
            remote: Any = ray.remote(_merge if depth else _select_partition)
            tasks = [
                remote.options(max_retries=3, retry_exceptions=[OSError], memory=memory_for(bytes_, title))
                for bytes_ in (need(level.request, rows, table.dimension, owned_rows).bytes for rows in level.rows)
            ]
            common = (level.request, counter, each, owned)
            if depth:
                parts = [
                    task.remote(*common, *(parts[i] for i in bundle))
                    for task, bundle in zip(tasks, level.bundles, strict=True)
                ]
            else:
                parts = [
                    task.remote(*common, table, group, request.columns, excluded)
                    for task, group in zip(tasks, groups, strict=True)
                ]
            stopped = watch(parts, counter, bar, stoppable=len(parts) == 1)
            name = "merge" if depth else "partitions"
            seconds[name] = seconds.get(name, 0.0) + time.monotonic() - start
        rows, selection = ray.get(parts[0])
        if bar.total is not None and not stopped:
            bar.n = bar.total
        bar.update(0)
    return Picked(rows, selection, stopped and "interrupted" in (selection.stopped or ""), seconds=seconds)


def _total(plan: list[Level]) -> int | None:
    return None if plan[0].request.budget.size is None else sum(sum(level.picks) for level in plan)


def _say(table: GradientTable, plan: list[Level], title: str) -> None:
    request = plan[0].request
    if request.objective.quality_weight == 1.0:
        return
    name = need(request, max(plan[0].rows), table.dimension).oracle
    log.info("%s: greedy MAP by the %s oracle%s", title, name, "" if request.oracle != "auto" else " (chosen by size)")
    for level in plan[1:]:
        log.info("%s: then %s rows in %d merge tasks", title, f"{sum(level.rows):,}", len(level.bundles))


def _select_partition(
    request: Request,
    counter: Any,
    threads: int,
    owned: np.ndarray | None,
    table: GradientTable,
    parts: list[Part],
    columns: tuple[str, ...],
    exclude: pa.Array | None,
) -> tuple[pa.Table, Selection]:
    import torch

    torch.set_num_threads(threads)
    rows, selection = select_rows(table.read(parts, columns), request, reporter(counter), owned, exclude)
    return rows, _without_indices(selection)


def _merge(
    request: Request,
    counter: Any,
    threads: int,
    owned: np.ndarray | None,
    *parts: tuple[pa.Table, Selection],
) -> tuple[pa.Table, Selection]:
    import torch

    torch.set_num_threads(threads)
    rows, selection = select_rows(pa.concat_tables([picks for picks, _ in parts]), request, reporter(counter), owned)
    return rows, _without_indices(selection)


def _without_indices(selection: Selection) -> Selection:
    """They are places in a table that stays with the task."""
    return replace(selection, indices=np.arange(len(selection.indices)))
