"""Partition-and-merge greedy MAP (GreeDi: Mirzasoleiman et al. 2013; composable core-sets: Indyk et al. 2014).

Greedy inside each random partition picks more than its share; greedy over the union of these picks selects again.
Everything here works on tables in memory; ``raydpp.stages.distributed`` sends them over the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import store
from raydpp.errors import UserError
from raydpp.selection.budget import OTHERS, check_costs
from raydpp.selection.greedy import AtFloor, greedy_map
from raydpp.selection.kernels import Kernel
from raydpp.selection.objective import worth
from raydpp.selection.oracles.choice import OracleName
from raydpp.selection.picking import Progress, Selection
from raydpp.selection.quality import Score, combine
from raydpp.selection.shard import Items


@dataclass(frozen=True)
class Request:
    """What to select by. See ``raydpp.selection.greedy.greedy_map`` for what is not explained.

    Attributes:
        kernel: The similarity kernel.
        column: The column with the (D,) features.
        size: The number of picks; None if something else bounds the run.
        quality: The columns that say how good an example is; none where the weight is 0.
        weight: w in [0, 1].
        tokens: The largest sum of the cost column.
        cost: The column with the costs.
        cost_power: How much costs count.
        minimum: Per source, in examples.
        maximum: Per source, in examples.
        min_log_gain: Where to stop.
        at_floor: Whether to go on at the floor.
        tolerance: Of each pick.
        oracle: How gains are computed.
    """

    kernel: Kernel
    column: str = "gradient"
    size: int | None = None
    quality: tuple[Score, ...] = ()
    weight: float = 0.0
    tokens: float | None = None
    cost: str = "response_tokens"
    cost_power: float = 1.0
    minimum: Mapping[str, float] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    min_log_gain: float | None = None
    at_floor: AtFloor = "stop"
    tolerance: float = 0.0
    oracle: OracleName = "auto"

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, beside id, source and features."""
        return (*(score.column for score in self.quality), *([self.cost] if self.tokens is not None else []))

    def scores(self, table: pa.Table) -> np.ndarray | None:
        """(n,) standardised quality scores of a table's rows; None where quality does not count."""
        if not self.quality:
            return None
        return combine([numbers(table, score.column) for score in self.quality], self.quality)

    def share(self, partitions: int, oversample: float) -> Request:
        """What each partition is asked for: its part of the budget and the minima times ``oversample``."""
        if partitions == 1:
            return self
        part = min(1.0, oversample / partitions)
        minimum = {source: math.ceil(part * count) for source, count in self.minimum.items()}
        size = None if self.size is None else min(self.size, max(math.ceil(part * self.size), sum(minimum.values())))
        return replace(self, size=size, tokens=None if self.tokens is None else part * self.tokens, minimum=minimum)


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column as (n,) float64; nulls and what is not a number are refused."""
    try:
        values = pc.cast(table[column], pa.float64())
    except pa.ArrowException as error:
        raise UserError(f"the column {column!r} is {table[column].type}, not numbers") from error
    if values.null_count:
        raise UserError(f"{values.null_count} rows have no {column!r} to be judged by (null)")
    return values.to_numpy()


def select_rows(
    table: pa.Table,
    request: Request,
    progress: Progress | None = None,
    owned: np.ndarray | None = None,
    exclude: pa.Array | None = None,
) -> tuple[pa.Table, Selection]:
    """Greedy MAP over a table in memory.

    Args:
        table: Rows with id and features, in any order: ties go to the smallest id.
        request: What to select by; all rows where there are fewer than its size.
        progress: Called after each pick with the number of picks and the pick's log gain.
        owned: (O, D) features of what is there already.
        exclude: Ids that are not to be picked, here or elsewhere.

    Returns:
        The picked rows in the order of picking, and the selection.
    """
    if exclude is not None:
        table = table.filter(pc.invert(pc.is_in(table["id"], exclude)))
    if not table.num_rows or request.size == 0:
        return table.slice(0, 0), Selection.of([], [], "there is nothing to pick from")
    sources = table["source"].to_pylist() if request.minimum or request.maximum else None
    selection = greedy_map(
        store.vectors(table[request.column]),  # (n, D)
        None if request.size is None else min(request.size, table.num_rows),
        kernel=request.kernel.name,
        gamma=request.kernel.gamma,
        ridge=request.kernel.ridge,
        quality=request.scores(table),
        quality_weight=request.weight,
        ids=table["id"].to_pylist(),
        owned=owned,
        tokens=request.tokens,
        costs=None if request.tokens is None else numbers(table, request.cost),
        cost_power=request.cost_power,
        sources=sources,
        minimum=_present(request.minimum, sources),
        maximum=_present(request.maximum, sources),
        min_log_gain=request.min_log_gain,
        at_floor=request.at_floor,
        tolerance=request.tolerance,
        oracle=request.oracle,
        progress=progress or False,
    )
    return table.take(pa.array(selection.indices)), selection


def items_of(table: pa.Table, request: Request, exclude: pa.Array | None = None) -> Items:
    """A table's rows as the items of a shard.

    Args:
        table: n rows with id and features.
        request: What to select by.
        exclude: Ids that are not to be picked, here or elsewhere.
    """
    shut = pc.is_in(table["id"], pa.array([], pa.string()) if exclude is None else exclude).to_numpy()
    costs = None if request.tokens is None else np.where(shut, 1.0, numbers(table, request.cost))
    costs = None if costs is None else check_costs(costs, table.num_rows)
    return Items(
        store.vectors(table[request.column]),  # (n, D)
        table["id"].to_pylist(),
        worth(table.num_rows, request.weight, request.scores(table), costs, request.cost_power),
        table["source"].to_numpy().astype(np.str_) if request.minimum or request.maximum else None,
        costs,
        np.flatnonzero(shut),
    )


def merge(
    picks: Sequence[pa.Table], request: Request, progress: Progress | None = None, owned: np.ndarray | None = None
) -> tuple[pa.Table, Selection]:
    """Greedy MAP over the union of the partitions' picks. See ``select_rows``."""
    return select_rows(pa.concat_tables(picks), request, progress, owned)


def _present(quotas: Mapping[str, float], sources: Sequence[str] | None) -> dict[str, float]:
    """The quotas of the sources that occur here."""
    here = set(sources or ())
    return {source: quota for source, quota in quotas.items() if source == OTHERS or source in here}
