"""How a selection over partitions goes, before it does: which tasks, the memory each needs, what each computes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from raydpp.dpp.oracles.choice import OracleName, choose_oracle, choose_sharded_oracle
from raydpp.errors import UserError
from raydpp.runs import RunResult
from raydpp.select.inputs import ROWS_PER_PARTITION, SelectionJob
from raydpp.select.request import Request

_PROCESS = 400e6  # bytes of a process that has imported torch and pyarrow


@dataclass(frozen=True)
class MergeLevel:
    """Tasks that work side by side; each selects from the picks of a group of the tasks before, or from a partition."""

    groups: tuple[tuple[int, ...], ...]  # for each task, places in the level before
    rows: tuple[int, ...]  # how many each has to select from, at most
    request: Request  # what each is asked for

    @property
    def picks(self) -> tuple[int, ...]:
        """How many picks each hands on, at most."""
        return tuple(int(min(rows, self.request.budget.size or rows)) for rows in self.rows)


def merge_levels(request: Request, sizes: Sequence[int], oversample: float, most: int) -> list[MergeLevel]:
    """Greedy inside each partition, of these sizes, then merges until one task holds all picks.

    Picks are merged in groups of at most ``most`` rows where all of them are more than that and groups hand on fewer
    than they get; else by one task. Each task but the last hands on ``oversample`` times its share.
    """
    first = request.share(len(sizes), oversample)
    found = [MergeLevel(tuple((i,) for i in range(len(sizes))), tuple(sizes), first)]
    while len(found[-1].groups) > 1:
        picks = found[-1].picks
        groups = _groups(picks, most)
        merge = request.share(len(groups), oversample)
        level = MergeLevel(groups, tuple(sum(picks[i] for i in group) for group in groups), merge)
        if sum(level.picks) >= sum(picks):
            level = MergeLevel((tuple(range(len(picks))),), (sum(picks),), request)
        found.append(level)
    return found


def _groups(picks: Sequence[int], most: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours, two or more together, whose picks are at most so many where that can be."""
    groups: list[list[int]] = [[]]
    for i, count in enumerate(picks):
        if len(groups[-1]) > 1 and sum(picks[j] for j in groups[-1]) + count > most:
            groups.append([])
        groups[-1].append(i)
    if len(groups) > 1 and len(groups[-1]) == 1:
        groups[-2] += groups.pop()
    return tuple(tuple(group) for group in groups)


@dataclass(frozen=True)
class SearchCost:
    """What one search needs."""

    oracle: OracleName
    bytes: int  # of memory, at the peak
    flop: float  # in matrix products, about; those in float64 count twice
    picks: int  # at most; each takes a third of a millisecond beside the products

    def seconds(self, rate: float) -> float:
        """How long it takes where products run at this rate, in FLOP/s: searches reach half of it."""
        return self.flop / (0.5 * rate) + 3e-4 * self.picks


def search_cost(request: Request, rows: int, dimension: int, owned: int = 0, itemsize: int = 2) -> SearchCost:
    """What a search over n x D features needs, by the counts of ``tests/benchmarks/selection.py``.

    What is ``owned`` counts like picks; ``itemsize`` is of a stored number, in bytes.
    """
    picks = int(min(rows, request.budget.size or rows)) + owned
    oracle = choose_oracle(request.oracle, request.objective.kernel, rows, dimension, picks)
    features = 2.0 * rows * dimension * itemsize + 200.0 * rows  # as read, and as one array; ids and bounds
    if request.objective.quality_weight == 1.0:
        return SearchCost("auto", int(_PROCESS + features), 0.0, picks)
    if oracle == "feature-space":
        state = 40.0 * dimension**2 + features / 14
        flop = 2.0 * rows * picks * dimension + 25.0 * picks * dimension**2
    elif oracle == "cholesky":
        state = 4.2 * rows * picks + 4.0 * picks**2
        flop = 0.8 * rows * picks**2 + 1.2 * picks**3 + 2.0 * rows * picks * dimension
    else:
        state = 8.0 * rows * (picks + 2 * dimension)
        flop = 4.0 * rows * picks * (dimension + picks)
    return SearchCost(oracle, int(_PROCESS + features + state), flop, picks)


PICKS_PER_ROUND = 30
"""Of exact rounds; see ``tests/benchmarks/distributed.py``."""

_PRODUCT = 2048
_clock = tqdm.format_interval  # seconds -> "12:34"


def estimate(job: SelectionJob, exact: bool, oversample: float, out: str) -> RunResult:
    """Say which tasks a selection takes, their memory and their time; nothing is read or written.

    The record holds the ``estimate``: seconds, bytes of the largest task, rounds. UserError without a size.
    """
    table, cpus, size = job.table, job.tasks.cpus, job.request.budget.size
    if size is None:
        raise UserError("--dry-run needs a --size: how many picks tokens or a log gain allow is not known before")
    rate = float(job.tasks.get(job.tasks.submit(_rate)))  # FLOP/s of one CPU
    found, lines = _rounds(job, rate) if exact else _merges(job, oversample, rate)
    head = (
        f"select --dry-run: {size:,} of {table.rows:,} examples, D = {table.dimension},"
        f" {job.request.objective.kernel.name} kernel, {cpus} CPUs at {rate / 1e9:.0f} GFLOP/s each"
    )
    tail = f"about {_clock(found['seconds'])} in all, without reading"
    return RunResult(out, {"estimate": found}, "\n".join([head, *(f"  {line}" for line in lines), f"  {tail}"]))


def _merges(job: SelectionJob, oversample: float, rate: float) -> tuple[dict[str, Any], list[str]]:
    plan, cpus = merge_levels(job.request, job.partition_rows, oversample, ROWS_PER_PARTITION), job.tasks.cpus
    seconds, largest, lines = 0.0, 0, []
    for depth, level in enumerate(plan):
        count = len(level.groups)
        threads = max(1, job.tasks.threads // count)
        one = search_cost(level.request, max(level.rows), job.table.dimension)
        took = math.ceil(count / max(1, cpus // threads)) * one.seconds(rate * threads)
        seconds, largest = seconds + took, max(largest, one.bytes)
        what = f"{count} {'merge' if depth else 'partition'}{'s' if count > 1 else ''} of {max(level.rows):,} rows"
        lines.append(
            f"{what}: {max(level.picks):,} picks each by the {one.oracle} oracle, {one.bytes / 1e9:.1f} GB,"
            f" {_clock(one.seconds(rate * threads))} a task, {_clock(took)} in all"
        )
    if len(plan) > 1:
        pass_ = search_cost(job.request, max(plan[0].rows), job.table.dimension)
        largest = max(largest, pass_.bytes)
        took = 0.5 * math.ceil(len(plan[0].groups) / cpus) * pass_.flop / (0.5 * rate)
        seconds += took
        lines.append(f"certificate: {pass_.bytes / 1e9:.1f} GB a partition, at most {_clock(took)}")
    return {"seconds": seconds, "bytes": largest, "rounds": None}, lines


def _rounds(job: SelectionJob, rate: float) -> tuple[dict[str, Any], list[str]]:
    table, sizes = job.table, job.partition_rows
    size = int(job.request.budget.size or table.rows)
    oracle = choose_sharded_oracle(job.request.oracle, job.request.objective.kernel, table.rows, table.dimension, size)
    request = replace(job.request, oracle=oracle)
    one = search_cost(request, max(sizes), table.dimension)
    rounds = math.ceil(size / PICKS_PER_ROUND)
    row = table.dimension * np.dtype(table.kind.value_type.to_pandas_dtype()).itemsize  # bytes
    whole = search_cost(request, table.rows, table.dimension)
    seconds = whole.seconds(rate * min(job.tasks.cpus, len(sizes)))
    seconds += rounds * (0.005 + 0.002 * len(sizes))  # calls and their answers
    lines = [
        f"{len(sizes)} shards of {max(sizes):,} rows in actors, by the {oracle} oracle, {one.bytes / 1e9:.1f} GB each",
        f"about {rounds:,} rounds; in each {PICKS_PER_ROUND * row / 1e3:.0f} KB of picks to every node,"
        f" some {10 * PICKS_PER_ROUND * row / 1e6:.1f} MB of candidates back",
    ]
    return {"seconds": seconds, "bytes": one.bytes, "rounds": rounds}, lines


def _rate() -> float:
    """FLOP/s of float32 matrix products on one thread: the best of a second."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    x, best = torch.randn(_PRODUCT, _PRODUCT), math.inf
    end = time.perf_counter() + 1.0
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        _ = x @ x
        best = min(best, time.perf_counter() - start)
    torch.set_num_threads(threads)
    return 2.0 * _PRODUCT**3 / best
