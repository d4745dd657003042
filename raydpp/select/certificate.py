"""What partition-and-merge may have lost: after it, one look at everything that was not picked."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.cluster import memory_for
from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import condition
from raydpp.dpp.oracles.choice import OracleName, bounded_oracle, choose_sharded_oracle
from raydpp.dpp.sharded.shard import Shard
from raydpp.progress import progress_bar
from raydpp.select.plan import need
from raydpp.select.request import Picked, Request
from raydpp.tables import GradientTable, Part, vectors

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Certificate:
    """What is left beside what was accepted, as what they add to the objective (in nats, where only diversity counts).

    Attributes:
        largest_left: The most that any example left would add; None where none is left.
        smallest_accepted: The least that a pick added when it was picked.
        above: How many examples left would each add more than ``smallest_accepted``.
    """

    largest_left: float | None
    smallest_accepted: float
    above: int

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


def certify(
    table: GradientTable,
    groups: list[list[Part]],
    request: Request,
    picked: Picked,
    title: str,
    owned: Any = None,
    exclude: pa.Array | None = None,
    owned_rows: int = 0,
) -> Certificate | None:
    """One pass over all partitions for what each example left would still add, given the picks.

    What cannot reach the smallest accepted is not computed to the end. None where the budget is in tokens or per
    source: there what is left is not free to be picked.

    Args:
        table: The table.
        groups: Its files, in partitions.
        request: What was selected by.
        picked: What came out.
        title: Of the progress bar.
        owned: A reference to the (O, D) features of what is there already, or None.
        exclude: Ids not to be picked.
        owned_rows: O.
    """
    import ray

    budget, objective = request.budget, request.objective
    if budget.tokens is not None or budget.minimum or budget.maximum or objective.quality_weight == 1.0:
        return None
    picks, gains = picked.rows, picked.selection.log_gains
    accepted = float((objective.diversity * gains + request.items(picks).modular).min())
    ids = [pa.array(picks["id"].to_pylist(), pa.string()), *([] if exclude is None else [exclude])]
    features = vectors(picks[request.column])  # (k, D)
    size = len(picks) + owned_rows
    oracle = choose_sharded_oracle(request.oracle, objective.kernel, table.rows, table.dimension, size)
    told = ray.remote(_told).remote(owned, features, objective.kernel, oracle)
    common = (table, request, oracle, size, told, accepted, ray.put(pa.concat_arrays(ids)))
    task: Any = ray.remote(_left)
    memory = [
        memory_for(need(request, sum(part.rows for part in group), table.dimension, owned_rows).bytes, title)
        for group in groups
    ]
    waiting = [task.options(memory=m).remote(group, *common) for group, m in zip(groups, memory, strict=True)]
    found: list[tuple[float, int]] = []
    with progress_bar(f"{title}: certificate", len(groups), "partitions") as bar:
        while waiting:
            finished, waiting = ray.wait(waiting)
            found += ray.get(finished)
            bar.update(len(finished))
    best = max(one for one, _ in found)
    return Certificate(None if best == -math.inf else best, accepted, sum(count for _, count in found))


def _told(owned: np.ndarray | None, picks: np.ndarray, kernel: Kernel, oracle: OracleName) -> np.ndarray:
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
    told: np.ndarray,
    accepted: float,
    shut: pa.Array,
) -> tuple[float, int]:
    items = request.items(table.read(parts, request.columns), shut)
    return Shard(items, request.objective, oracle, size).left_above(told, accepted)
