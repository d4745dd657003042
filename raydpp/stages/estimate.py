"""select --estimate: what a selection would cost on this cluster, from its plan and a second of matrix products."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

from tqdm import tqdm

from raydpp.errors import UserError
from raydpp.selection.partition import Request
from raydpp.selection.plan import Level, levels, need
from raydpp.stages.cluster import threads_of_a_node
from raydpp.stages.distributed import ROWS_PER_PARTITION
from raydpp.stages.run import Outcome
from raydpp.stages.tables import GradientTable
from raydpp.store import Part

PICKS_PER_ROUND = 30
"""Of exact rounds; see ``tests/benchmarks/distributed.py``."""

_PRODUCT = 2048
_clock = tqdm.format_interval  # seconds -> "12:34"


def estimate(
    table: GradientTable, groups: list[list[Part]], request: Request, exact: bool, oversample: float, out: str
) -> Outcome:
    """Say which tasks a selection takes, their memory and their time; nothing is read or written.

    Args:
        table: The table.
        groups: Its files, in partitions.
        request: What to select by.
        exact: Whether all partitions are searched at once.
        oversample: How many times its share a partition hands in.
        out: Where the run would write.

    Returns:
        An outcome whose record holds the ``estimate``: seconds, bytes of the largest task, rounds.

    Raises:
        UserError: There is no size to reckon with.
    """
    import ray

    if request.size is None:
        raise UserError("--estimate needs a --size: how many picks tokens or a log gain allow is not known before")
    rate = float(ray.get(ray.remote(_rate).remote()))  # FLOP/s of one CPU
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    sizes = [sum(part.rows for part in group) for group in groups]
    if exact:
        found, lines = _rounds(table, request, sizes, rate, cpus)
    else:
        found, lines = _merges(table, request, levels(request, sizes, oversample, ROWS_PER_PARTITION), rate, cpus)
    head = (
        f"select --estimate: {request.size:,} of {table.rows:,} examples, D = {table.dimension}, {request.kernel.name}"
        f" kernel, {cpus} CPUs at {rate / 1e9:.0f} GFLOP/s each"
    )
    tail = f"about {_clock(found['seconds'])} in all, without reading"
    return Outcome(out, {"estimate": found}, "\n".join([head, *(f"  {line}" for line in lines), f"  {tail}"]))


def _merges(
    table: GradientTable, request: Request, plan: list[Level], rate: float, cpus: int
) -> tuple[dict[str, Any], list[str]]:
    seconds, largest, lines = 0.0, 0, []
    for depth, level in enumerate(plan):
        tasks = len(level.bundles)
        each = max(1, threads_of_a_node() // tasks)
        one = need(level.request, max(level.rows), table.dimension)
        took = math.ceil(tasks / max(1, cpus // each)) * one.seconds(rate * each)
        seconds, largest = seconds + took, max(largest, one.bytes)
        what = f"{tasks} {'merge' if depth else 'partition'}{'s' if tasks > 1 else ''} of {max(level.rows):,} rows"
        lines.append(
            f"{what}: {max(level.picks):,} picks each by the {one.oracle} oracle, {one.bytes / 1e9:.1f} GB,"
            f" {_clock(one.seconds(rate * each))} a task, {_clock(took)} in all"
        )
    if len(plan) > 1:
        pass_ = need(request, max(plan[0].rows), table.dimension)
        largest = max(largest, pass_.bytes)
        took = 0.5 * math.ceil(len(plan[0].bundles) / cpus) * pass_.flop / (0.5 * rate)
        seconds += took
        lines.append(f"certificate: {pass_.bytes / 1e9:.1f} GB a partition, at most {_clock(took)}")
    return {"seconds": seconds, "bytes": largest, "rounds": None}, lines


def _rounds(
    table: GradientTable, request: Request, sizes: list[int], rate: float, cpus: int
) -> tuple[dict[str, Any], list[str]]:
    size = request.size or table.rows
    whole = need(request, table.rows, table.dimension)
    oracle = "cholesky" if whole.oracle == "textbook" else whole.oracle
    one = need(replace(request, oracle=oracle), max(sizes), table.dimension)
    rounds = math.ceil(size / PICKS_PER_ROUND)
    row = table.dimension * 2  # bytes, as float16
    seconds = need(replace(request, oracle=oracle), table.rows, table.dimension).seconds(rate * min(cpus, len(sizes)))
    seconds += rounds * (0.005 + 0.002 * len(sizes))  # calls and their answers
    lines = [
        f"{len(sizes)} shards of {max(sizes):,} rows in actors, by the {oracle} oracle, {one.bytes / 1e9:.1f} GB each",
        f"about {rounds:,} rounds; in each {PICKS_PER_ROUND * row / 1e3:.0f} KB of picks to every node,"
        f" some {10 * PICKS_PER_ROUND * row / 1e6:.1f} MB of contenders back",
    ]
    return {"seconds": seconds, "bytes": one.bytes, "rounds": rounds}, lines


def _rate() -> float:
    """FLOP/s of float32 matrix products on one thread: the best of a second."""
    import torch

    torch.set_num_threads(1)
    x, best = torch.randn(_PRODUCT, _PRODUCT), math.inf
    end = time.perf_counter() + 1.0
    while best == math.inf or time.perf_counter() < end:
        start = time.perf_counter()
        _ = x @ x
        best = min(best, time.perf_counter() - start)
    return 2.0 * _PRODUCT**3 / best
