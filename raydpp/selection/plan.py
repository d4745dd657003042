"""How a selection over partitions goes, before it does: which tasks, the memory each needs, what each computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raydpp.selection.oracles.choice import OracleName, choose_oracle
from raydpp.selection.partition import Request

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
        return tuple(rows if self.request.size is None else min(rows, self.request.size) for rows in self.rows)


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
    picks = min(rows, request.size or rows) + owned
    oracle = choose_oracle(request.oracle, request.kernel, rows, dimension, picks)
    features = 2.0 * rows * dimension * itemsize + 200.0 * rows  # as read, and as one array; ids and bounds
    if request.weight == 1.0:
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
