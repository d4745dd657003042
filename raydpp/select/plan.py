"""How a selection over partitions goes, before it does: which tasks, the memory each needs, what each computes."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from raydpp.cluster import threads_of_a_node
from raydpp.dpp.oracles.choice import OracleName, choose_oracle
from raydpp.errors import UserError
from raydpp.runs import Outcome
from raydpp.select.request import Request
from raydpp.tables import GradientTable, Part

_PROCESS = 400e6  # bytes of a process that has imported torch and pyarrow


@dataclass(frozen=True)
class Level:
    """Tasks that work side by side.

    Attributes:
        bundles: For each task the places, in the level before, of those whose picks it selects from; of partitions in
            the first level.
        rows: How many rows each has to select from, at most.
        request: What each is asked for.
    """

    bundles: tuple[tuple[int, ...], ...]
    rows: tuple[int, ...]
    request: Request

    @property
    def picks(self) -> tuple[int, ...]:
        """How many picks each hands on, at most."""
        return tuple(int(min(rows, self.request.budget.size or rows)) for rows in self.rows)


def levels(request: Request, sizes: Sequence[int], oversample: float, most: int) -> list[Level]:
    """Greedy inside each partition, then merges until one task holds all picks.

    Picks are merged in bundles of at most ``most`` rows where all of them are more than that and bundles hand on fewer
    than they get; else by one task.

    Args:
        request: What is to come out.
        sizes: The rows of each partition.
        oversample: How many times its share a task hands on, but the last.
        most: The rows that a task should have at the most.
    """
    first = request.share(len(sizes), oversample)
    found = [Level(tuple((i,) for i in range(len(sizes))), tuple(sizes), first)]
    while len(found[-1].bundles) > 1:
        picks = found[-1].picks
        bundles = _bundles(picks, most)
        merge = request.share(len(bundles), oversample)
        level = Level(bundles, tuple(sum(picks[i] for i in bundle) for bundle in bundles), merge)
        if sum(level.picks) >= sum(picks):
            level = Level((tuple(range(len(picks))),), (sum(picks),), request)
        found.append(level)
    return found


def _bundles(picks: Sequence[int], most: int) -> tuple[tuple[int, ...], ...]:
    """Neighbours, two or more together, whose picks are at most so many where that can be."""
    bundles: list[list[int]] = [[]]
    for i, count in enumerate(picks):
        if len(bundles[-1]) > 1 and sum(picks[j] for j in bundles[-1]) + count > most:
            bundles.append([])
        bundles[-1].append(i)
    if len(bundles) > 1 and len(bundles[-1]) == 1:
        bundles[-2] += bundles.pop()
    return tuple(tuple(bundle) for bundle in bundles)


@dataclass(frozen=True)
class Need:
    """What one search needs.

    Attributes:
        oracle: How gains are computed.
        bytes: Of memory, at the peak.
        flop: In matrix products, about, counted as float32: those in float64 count twice.
        picks: At most; each takes a third of a millisecond beside the products.
    """

    oracle: OracleName
    bytes: int
    flop: float
    picks: int

    def seconds(self, rate: float) -> float:
        """How long it takes where products run at this rate, in FLOP/s: searches reach half of it."""
        return self.flop / (0.5 * rate) + 3e-4 * self.picks


def need(request: Request, rows: int, dimension: int, owned: int = 0, itemsize: int = 2) -> Need:
    """What a search over so many rows needs, by the counts of ``tests/benchmarks/selection.py``.

    Args:
        request: What is asked for; its size is the number of picks.
        rows: n.
        dimension: D.
        owned: O, how many are there already: they count like picks.
        itemsize: Bytes of a stored number.
    """
    picks = int(min(rows, request.budget.size or rows)) + owned
    oracle = choose_oracle(request.oracle, request.objective.kernel, rows, dimension, picks)
    features = 2.0 * rows * dimension * itemsize + 200.0 * rows  # as read, and as one array; ids and bounds
    if request.objective.quality_weight == 1.0:
        return Need("auto", int(_PROCESS + features), 0.0, picks)
    if oracle == "feature-space":
        state = 40.0 * dimension**2 + features / 14
        flop = 1.2 * rows * picks * dimension
    elif oracle == "cholesky":
        state = 4.2 * rows * picks + 4.0 * picks**2
        flop = 0.8 * rows * picks**2 + 1.2 * picks**3 + 1.0 * rows * picks * dimension
    else:
        state = 8.0 * rows * (picks + 2 * dimension)
        flop = 4.0 * rows * picks * (dimension + picks)
    return Need(oracle, int(_PROCESS + features + state), flop, picks)


ROWS_PER_PARTITION = 65_536

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

    size = request.budget.size
    if size is None:
        raise UserError("--estimate needs a --size: how many picks tokens or a log gain allow is not known before")
    rate = float(ray.get(ray.remote(_rate).remote()))  # FLOP/s of one CPU
    cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
    sizes = [sum(part.rows for part in group) for group in groups]
    if exact:
        found, lines = _rounds(table, request, sizes, rate, cpus)
    else:
        found, lines = _merges(table, request, levels(request, sizes, oversample, ROWS_PER_PARTITION), rate, cpus)
    head = (
        f"select --estimate: {size:,} of {table.rows:,} examples, D = {table.dimension},"
        f" {request.objective.kernel.name} kernel, {cpus} CPUs at {rate / 1e9:.0f} GFLOP/s each"
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
    size = request.budget.size or table.rows
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
