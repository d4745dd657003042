"""What to select by, over tables in memory; and what came out. Nothing here needs torch before a search starts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.dpp import OracleName, Progress
from raydpp.dpp.budget import Budget
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.objective import Objective, Score, combine
from raydpp.errors import UserError
from raydpp.tables import vectors

if TYPE_CHECKING:
    from raydpp.dpp.features import Items


@dataclass(frozen=True)
class Request:
    """What to select by."""

    budget: Budget  # in counts
    objective: Objective
    column: str = "gradient"  # with the (D,) features
    quality: tuple[Score, ...] = ()  # the columns that say how good an example is; none where quality does not count
    cost: str = "response_tokens"  # the column with the costs, for a budget of tokens
    oracle: OracleName = "auto"  # how gains are computed

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns it reads, beside id, source and features."""
        return (*(score.column for score in self.quality), *([self.cost] if self.budget.tokens is not None else []))

    def scores(self, table: pa.Table) -> np.ndarray | None:
        """(n,) standardised quality scores of a table's rows; None where quality does not count."""
        if not self.quality:
            return None
        return combine([numbers(table, score.column) for score in self.quality], self.quality)

    def items(self, table: pa.Table, exclude: pa.Array | None = None) -> Items:
        """A table's n rows, with id and features, as items; those with an id in ``exclude`` are not to be picked."""
        from raydpp.dpp.features import Items

        n, quotas, costs = table.num_rows, self.budget.minimum or self.budget.maximum, None
        excluded = np.zeros(n, dtype=bool) if exclude is None else pc.is_in(table["id"], exclude).to_numpy()
        if self.budget.tokens is not None:
            costs = np.where(excluded, 1.0, numbers(table, self.cost))
        items = Items(
            vectors(table[self.column]),  # (n, D)
            table["id"].to_pylist(),
            costs=costs,
            sources=table["source"].to_numpy().astype(np.str_) if quotas else None,
            excluded=np.flatnonzero(excluded),
        )
        return replace(items, modular=self.objective.modular(n, self.scores(table), costs))

    def share(self, partitions: int, oversample: float) -> Request:
        """What each partition is asked for: its part of the budget and the minima times ``oversample``."""
        if partitions == 1:
            return self
        part, whole = min(1.0, oversample / partitions), self.budget
        minimum = {source: math.ceil(part * count) for source, count in whole.minimum.items()}
        size = None if whole.size is None else min(whole.size, max(math.ceil(part * whole.size), sum(minimum.values())))
        tokens = None if whole.tokens is None else part * whole.tokens
        return replace(self, budget=replace(whole, size=size, tokens=tokens, minimum=minimum))


def select_rows(
    table: pa.Table,
    request: Request,
    progress: Progress | None = None,
    owned: np.ndarray | None = None,
    exclude: pa.Array | None = None,
) -> tuple[pa.Table, Selection]:
    """Greedy MAP over a table in memory: the picked rows in the order of picking, and the selection.

    ``owned`` are (O, D) features of what is there already, ``exclude`` ids that are not to be picked. All rows may be
    picked where there are fewer than the budget's size.
    """
    if exclude is not None:
        table = table.filter(pc.invert(pc.is_in(table["id"], exclude)))
    if not table.num_rows or request.budget.size == 0:
        return table.slice(0, 0), Selection.of([], [], "there is nothing to pick from")
    from raydpp.dpp.greedy import greedy

    items = request.items(table)
    budget = request.budget.within(items)
    found = greedy(items, budget, request.objective, owned=owned, oracle=request.oracle, progress=progress)
    return table.take(pa.array(found.indices)), found


def numbers(table: pa.Table, column: str) -> np.ndarray:
    """A column as (n,) float64; nulls and what is not a number are refused."""
    try:
        values = pc.cast(table[column], pa.float64())
    except pa.ArrowException as error:
        raise UserError(f"the column {column!r} is {table[column].type}, not numbers") from error
    if values.null_count:
        raise UserError(f"{values.null_count} rows have no {column!r} to be judged by (null)")
    return values.to_numpy()


def parse_quotas(option: str, texts: Sequence[str]) -> dict[str, float]:
    """``SOURCE=NUMBER`` or ``SOURCE=FRACTION`` of the size, ``*`` for every other source."""
    quotas: dict[str, float] = {}
    for text in texts:
        source, _, value = text.rpartition("=")
        try:
            number = float(value)
        except ValueError:
            number = -1.0
        whole = (
            math.isfinite(number) and number >= 1 and number == int(number) and "." not in value
        )  # 1.0 is one, or all: who knows
        if not source or not (whole or 0 <= number < 1):
            raise UserError(f"{option} {text}: give SOURCE=NUMBER, or SOURCE=FRACTION below 1, or *=... for the others")
        quotas[source] = number
    return quotas


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
    """What came out of a selection."""

    rows: pa.Table  # the picked rows of the gradient table, in the order of picking
    selection: Selection  # gains and why it ended; its indices are of no use here
    interrupted: bool = False  # by Ctrl-C
    rounds: int | None = None  # of an exact search over shards
    seconds: Mapping[str, float] = field(default_factory=dict)  # how long each part of the work took
    kept: Sequence[str] = ()  # files of the cache with the picks of its partitions
