"""Greedy MAP over a gradient table, on the cluster: a task for each partition, one for the merge."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.selection.oracles.choice import choose_oracle
from raydpp.selection.partition import Request, merge, select_rows
from raydpp.selection.search import Selection
from raydpp.stages.progress import Counter, progress_bar, reporter, watch
from raydpp.stages.tables import GradientTable
from raydpp.store import Part

log = logging.getLogger(__name__)

ROWS_PER_PARTITION = 65_536
OVERSAMPLE = 2.0


@dataclass(frozen=True, eq=False)
class Picked:
    """What came out of a selection.

    Attributes:
        rows: The picked rows of the gradient table, in the order of picking.
        selection: Gains and why it ended; its indices are of no use here.
        interrupted: Whether Ctrl-C ended it.
    """

    rows: pa.Table
    selection: Selection
    interrupted: bool = False


def distributed_greedy(
    table: GradientTable,
    groups: list[list[Part]],
    request: Request,
    oversample: float,
    title: str,
    owned: Any = None,
    exclude: pa.Array | None = None,
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
    """
    import ray

    counter = ray.remote(num_cpus=0)(Counter).remote()
    threads = max([1, *(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])])
    local = request.share(len(groups), oversample)
    options: dict[str, Any] = {"max_retries": 3, "retry_exceptions": [OSError]}
    columns = request.columns
    excluded = ray.put(exclude)
    first = ray.remote(**options)(_select_partition)
    _say_oracle(table, groups, local, title)
    with progress_bar(title, _total(groups, request, local), "picks") as bar:
        each = threads if len(groups) == 1 else 1
        parts = [first.remote(table, group, columns, local, counter, each, owned, excluded) for group in groups]
        stopped = watch(parts, counter, bar, stoppable=len(groups) == 1)
        chosen = parts[0]
        if len(groups) > 1:
            chosen = ray.remote(**options)(_merge).remote(request, counter, threads, owned, *parts)
            stopped = watch([chosen], counter, bar, stoppable=True)
        rows, selection = ray.get(chosen)
        if bar.total is not None and not stopped:
            bar.n = bar.total
        bar.update(0)
    return Picked(rows, selection, stopped and "interrupted" in (selection.stopped or ""))


def _total(groups: list[list[Part]], request: Request, local: Request) -> int | None:
    if request.size is None or local.size is None:
        return None
    if len(groups) == 1:
        return request.size
    return sum(min(local.size, sum(part.rows for part in group)) for group in groups) + request.size


def _say_oracle(table: GradientTable, groups: list[list[Part]], local: Request, title: str) -> None:
    if local.weight == 1.0:
        return
    rows = max(sum(part.rows for part in group) for group in groups)
    name = choose_oracle(local.oracle, local.kernel, rows, table.dimension, min(rows, local.size or rows))
    log.info("%s: greedy MAP by the %s oracle%s", title, name, "" if local.oracle != "auto" else " (chosen by size)")


def _select_partition(
    table: GradientTable,
    parts: list[Part],
    columns: tuple[str, ...],
    request: Request,
    counter: Any,
    threads: int,
    owned: np.ndarray | None,
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
    rows, selection = merge([picks for picks, _ in parts], request, reporter(counter), owned)
    return rows, _without_indices(selection)


def _without_indices(selection: Selection) -> Selection:
    """They are places in a table that stays with the task."""
    return replace(selection, indices=np.arange(len(selection.indices)))
