"""Partition-and-merge greedy MAP (GreeDi: Mirzasoleiman et al. 2013; composable core-sets: Indyk et al. 2014).

Greedy inside each random partition picks more than its share; greedy over the union of these picks selects again.
Everything here works on tables in memory; ``raydpp.select.partition_merge`` sends them over the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.dpp.budget import OTHERS, check_costs
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Progress, Selection
from raydpp.dpp.objective import Score, combine, modular_term
from raydpp.dpp.oracles.choice import OracleName
from raydpp.dpp.sharded.shard import Items
from raydpp.errors import UserError
from raydpp.tables import vectors


@dataclass(frozen=True)
class Request:
    """What to select by. See ``raydpp.dpp.greedy.greedy_map`` for what is not explained.

    Attributes:
        kernel: The similarity kernel.
        column: The column with the (D,) features.
        size: The number of picks; None if something else bounds the run.
        quality: The columns that say how good an example is; none where the weight is 0.
        weight: w in [0, 1].
        tokens: The largest sum of the cost column.
        cost: The column with the costs.
        minimum: Per source, in examples.
        maximum: Per source, in examples.
        min_log_gain: Where to stop.
        oracle: How gains are computed.
    """

    kernel: Kernel
    column: str = "gradient"
    size: int | None = None
    quality: tuple[Score, ...] = ()
    weight: float = 0.0
    tokens: float | None = None
    cost: str = "response_tokens"
    minimum: Mapping[str, float] = field(default_factory=dict)
    maximum: Mapping[str, float] = field(default_factory=dict)
    min_log_gain: float | None = None
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
        vectors(table[request.column]),  # (n, D)
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
        sources=sources,
        minimum=_present(request.minimum, sources),
        maximum=_present(request.maximum, sources),
        min_log_gain=request.min_log_gain,
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
        vectors(table[request.column]),  # (n, D)
        table["id"].to_pylist(),
        modular_term(table.num_rows, request.weight, request.scores(table), costs),
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


def parse_quotas(option: str, texts: Sequence[str], size: int | None) -> dict[str, float]:
    """``SOURCE=NUMBER`` or ``SOURCE=FRACTION`` of the size, ``*`` for every other source: -> counts."""
    quotas: dict[str, float] = {}
    for text in texts:
        source, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        if not source or number < 0 or (number > 1 and number != int(number)):
            raise UserError(f"{option} {text}: give SOURCE=NUMBER, or SOURCE=FRACTION below 1, or *=... for the others")
        if 0 < number < 1:
            if size is None:
                raise UserError(f"{option} {text}: a fraction is one of --size, which is not given")
            number = float(np.ceil(number * size - 1e-9) if option == "--minimum" else np.floor(number * size + 1e-9))
        quotas[source] = number
    return quotas


def expand_quotas(quotas: dict[str, float], sources: Sequence[str], option: str) -> dict[str, float]:
    """Quotas with ``*`` written out; a source that the table does not have is refused."""
    if unknown := [source for source in quotas if source != OTHERS and source not in sources]:
        raise UserError(f"{option} names the source {unknown[0]!r}; the table has {', '.join(sorted(sources))}")
    others = dict.fromkeys(sources, quotas[OTHERS]) if OTHERS in quotas else {}
    return others | {source: count for source, count in quotas.items() if source != OTHERS}


def parse_score(text: str) -> Score:
    """``COLUMN`` or ``COLUMN=WEIGHT``, such as ``loss=-0.5``."""
    column, found, weight = text.partition("=")
    try:
        value = float(weight) if found else 1.0
    except ValueError:
        value = np.nan
    if not column or not np.isfinite(value) or value == 0.0:
        raise UserError(f"--quality {text}: give COLUMN or COLUMN=WEIGHT, with a weight other than 0")
    return Score(column, value)


@dataclass(frozen=True, eq=False)
class Picked:
    """What came out of a selection.

    Attributes:
        rows: The picked rows of the gradient table, in the order of picking.
        selection: Gains and why it ended; its indices are of no use here.
        interrupted: Whether Ctrl-C ended it.
        rounds: How many rounds an exact search over shards took.
        seconds: How long each part of the work took.
    """

    rows: pa.Table
    selection: Selection
    interrupted: bool = False
    rounds: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
