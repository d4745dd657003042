"""What partition-and-merge may have lost: after it, one look at everything that was not picked."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import condition
from raydpp.dpp.oracles.choice import OracleName, bounded_oracle, choose_sharded_oracle
from raydpp.dpp.sharded.shard import Shard
from raydpp.progress import progress_bar
from raydpp.select.inputs import SelectionJob
from raydpp.select.plan import search_cost
from raydpp.select.request import Picked, Request
from raydpp.tables import GradientTable, Part, vectors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificate:
    """What is left beside what was accepted, by what it adds to the objective (nats, where only diversity counts)."""

    largest_left: float | None  # the most that any example left would add; None where none is left
    smallest_accepted: float  # the least that a pick added when it was picked
    above: int  # how many examples left would each add more than the smallest accepted

    def __str__(self) -> str:
        if self.largest_left is None:
            return "certificate: nothing is left"
        beside = f"the best left adds {self.largest_left:.4f}, the smallest accepted {self.smallest_accepted:.4f}"
        if not self.above:
            return f"certificate: {beside}: nothing left is worth more than what was accepted"
        over = self.largest_left - self.smallest_accepted
        return f"certificate: {beside}: {self.above:,} left are worth more, the best by {over:.4f}"

    @property
    def facts(self) -> dict[str, Any]:
        """For run.json."""
        return asdict(self)


def certify(job: SelectionJob, picked: Picked) -> Certificate | None:
    """One pass over all partitions for what each example left would still add, given the picks.

    What cannot reach the smallest accepted is not computed to the end. None where the budget is in tokens or per
    source: there what is left is not free to be picked.
    """
    table, request, tasks = job.table, job.request, job.tasks
    budget, objective = request.budget, request.objective
    if budget.tokens is not None or budget.minimum or budget.maximum or objective.quality_weight == 1.0:
        return None
    picks, gains = picked.rows, picked.selection.log_gains
    accepted = float((objective.diversity * gains + request.items(picks).modular).min())
    ids = [pa.array(picks["id"].to_pylist(), pa.string()), job.given.excluded]
    features = vectors(picks[request.column])  # (k, D)
    size = len(picks) + job.given.count
    oracle = choose_sharded_oracle(request.oracle, objective.kernel, table.rows, table.dimension, size)
    conditions = tasks.submit(_distinct, job.given.features, features, objective.kernel, oracle)
    common = (table, request, oracle, size, conditions, accepted, tasks.put(pa.concat_arrays(ids)))
    running = [
        tasks.submit(_left, parts, *common, memory=search_cost(request, rows, table.dimension, job.given.count).bytes)
        for parts, rows in zip(job.partitions, job.partition_rows, strict=True)
    ]
    found: list[tuple[float, int]] = []
    with progress_bar(f"{job.title}: certificate", len(running), "partitions") as bar:
        for one in tasks.as_completed(running):
            found.append(one)
            bar.update()
    best = max(one for one, _ in found)
    return Certificate(None if best == -math.inf else best, accepted, sum(count for _, count in found))


def _distinct(owned: np.ndarray | None, picks: np.ndarray, kernel: Kernel, oracle: OracleName) -> np.ndarray:
    """Everything to condition on, but copies: (k, D) as stored."""
    features: Sequence[np.ndarray] = [picks] if owned is None else [owned.astype(picks.dtype), picks]
    rows = UnitRows(np.concatenate(features))
    given = bounded_oracle(oracle).posterior_type(rows, kernel, len(rows))
    return rows.stored(condition(given, np.arange(len(rows)), kernel.floor, width=256))


def _left(
    parts: list[Part],
    table: GradientTable,
    request: Request,
    oracle: OracleName,
    size: int,
    conditions: np.ndarray,
    accepted: float,
    excluded: pa.Array,
) -> tuple[float, int]:
    items = request.items(table.read(parts, request.columns), excluded)
    return Shard(items, request.objective, oracle, size).left_above(conditions, accepted)
