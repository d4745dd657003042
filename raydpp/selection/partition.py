"""Partition-and-merge greedy MAP (GreeDi: Mirzasoleiman et al. 2013; composable core-sets: Indyk et al. 2014).

Greedy inside each random partition picks more than its share; greedy over the union of these picks selects again.
Everything here works on tables in memory; ``raydpp.stages.select`` sends them over the cluster.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import store
from raydpp.errors import UserError
from raydpp.selection.greedy import Progress, Selection, greedy_map
from raydpp.selection.kernels import Kernel
from raydpp.selection.quality import standardise


@dataclass(frozen=True)
class Request:
    """What to select by, the same for partitions and merge.

    Attributes:
        kernel: The similarity kernel.
        column: The column with the (D,) features.
        quality: The column with the quality scores; None where the weight is 0.
        weight: w in [0, 1], see ``raydpp.selection.greedy.Objective``.
        mean: Of the quality column over the whole table.
        std: Of the quality column over the whole table.
    """

    kernel: Kernel
    column: str = "gradient"
    quality: str | None = None
    weight: float = 0.0
    mean: float = 0.0
    std: float = 0.0

    def scores(self, table: pa.Table) -> np.ndarray | None:
        """(n,) standardised quality scores of a table's rows; None where quality does not count."""
        if self.quality is None:
            return None
        values = pc.cast(table[self.quality], pa.float64())
        if values.null_count:
            raise UserError(f"{values.null_count} rows have no {self.quality!r} to be judged by (null)")
        return standardise(values.to_numpy(), self.mean, self.std)


def budget(size: int | float, rows: int) -> int:
    """A budget as a count: an int is one, a fraction between 0 and 1 is of the rows (at least one)."""
    if isinstance(size, float) and not size.is_integer():
        if not 0 < size < 1:
            raise UserError(f"--size {size}: give a whole number of examples, or a fraction between 0 and 1")
        return max(1, round(size * rows))
    count = int(size)
    if count < 1:
        raise UserError(f"--size {size}: at least one example has to be selected")
    if count > rows:
        raise UserError(f"--size {size} is a larger budget than the pool of {rows} examples: lower it, or add data")
    return count


def share(size: int, partitions: int, oversample: float) -> int:
    """How many picks each partition hands to the merge; its part of the budget times ``oversample``."""
    return size if partitions == 1 else min(size, math.ceil(oversample * size / partitions))


def select_rows(
    table: pa.Table, size: int, request: Request, progress: Progress | None = None
) -> tuple[pa.Table, Selection]:
    """Greedy MAP over a table in memory.

    Args:
        table: Rows with id and features, in any order: ties go to the smallest id.
        size: The number of picks; all rows where there are fewer.
        request: The kernel, the columns, the quality.
        progress: Called after each pick with the number of picks and the pick's log gain.

    Returns:
        The picked rows in the order of picking, and the selection.
    """
    selection = greedy_map(
        store.vectors(table[request.column]),  # (n, D)
        min(size, table.num_rows),
        kernel=request.kernel.name,
        gamma=request.kernel.gamma,
        ridge=request.kernel.ridge,
        quality=request.scores(table),
        quality_weight=request.weight,
        ids=table["id"].to_pylist(),
        progress=progress,
    )
    return table.take(pa.array(selection.indices)), selection


def merge(
    picks: Sequence[pa.Table], size: int, request: Request, progress: Progress | None = None
) -> tuple[pa.Table, Selection]:
    """Greedy MAP over the union of the partitions' picks. See ``select_rows``."""
    return select_rows(pa.concat_tables(picks), size, request, progress)
