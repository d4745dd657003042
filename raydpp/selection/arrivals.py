"""The items that shards have sent to where the picks are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from raydpp.errors import UserError
from raydpp.selection.features import UnitRows
from raydpp.selection.ledger import Ledger
from raydpp.selection.messages import Contenders
from raydpp.selection.oracles.bounds import Exact


class Arrivals:
    """n items, numbered as they came; each comes once.

    Attributes:
        order: (n,) ids, as objects.
        worth: (n,) float64: what each is worth whatever was picked before.
        origin: The shard of each, and its row there.

    Args:
        sources: The names of the ledger's groups.
    """

    def __init__(self, sources: Sequence[str]) -> None:
        self._rows: UnitRows | None = None
        self._come: list[UnitRows] = []  # since rows were last asked for
        self.order = np.empty(0, dtype=object)
        self.worth = np.empty(0)
        self.origin: list[tuple[int, int]] = []
        self._index: dict[tuple[int, int], int] = {}
        self._ids: set[str] = set()
        self._groups = {source: i for i, source in enumerate(sources)}

    @property
    def rows(self) -> UnitRows | None:
        """(n, D), as the shards store them; None before the first."""
        if self._come:  # put behind the others together: each time all are copied
            first, *more = self._come if self._rows is None else [self._rows, *self._come]
            self._rows, self._come = first.with_rows(*more), []
        return self._rows

    def own(self, rows: UnitRows, ledger: Ledger) -> None:
        """Take in what is owned and in no shard: it cannot be picked."""
        ledger.extend(len(rows))
        self.origin += [(-1, -1)] * len(rows)
        self._append(rows, [f"owned {i}" for i in range(len(rows))], np.zeros(len(rows)))

    def admit(self, shard: int, sent: Contenders, ledger: Ledger) -> np.ndarray:
        """Take in what has never come before; returns the numbers of all that the shard has sent: (c,) int64.

        Raises:
            UserError: An id that another shard has sent too.
        """
        fresh = [j for j, place in enumerate(sent.new) if (shard, int(sent.rows[place])) not in self._index]
        if fresh:
            for key in ((shard, int(row)) for row in sent.rows[sent.new[fresh]]):
                self._index[key] = len(self.origin)
                self.origin.append(key)
            names = [sent.ids[j] for j in fresh]
            if twice := self._ids.intersection(names):
                raise UserError(f"the id {min(twice)} is in two partitions: ids must be distinct")
            self._ids.update(names)
            groups = np.array([self._groups.get(sent.sources[j], 0) for j in fresh], dtype=np.int64)
            ledger.admit(groups, sent.costs[fresh])
            self._append(UnitRows(sent.features[fresh]), names, sent.worth[fresh])
        return np.array([self._index[shard, row] for row in sent.rows.tolist()], dtype=np.int64)

    def _append(self, rows: UnitRows, ids: list[str], worth: np.ndarray) -> None:
        self._come.append(rows)
        self.order = np.concatenate([self.order, np.array(ids, dtype=object)])
        self.worth = np.concatenate([self.worth, worth])

    def stored(self, index: np.ndarray) -> np.ndarray:
        """The features of some, (k,) -> (k, D), as they are stored."""
        return np.empty((0, 1)) if (rows := self.rows) is None else rows.stored(index)

    def picks(self, index: Iterable[int], shards: int) -> dict[int, Exact]:
        """Picks, (k,), by the shard that they are from."""
        own: dict[int, list[int]] = {shard: [] for shard in range(shards)}
        for shard, row in (self.origin[i] for i in index):
            own[shard].append(row)
        return {
            shard: Exact(np.array(rows, dtype=np.int64), np.zeros(len(rows)), list(range(len(rows))))
            for shard, rows in own.items()
        }
