"""A matrix with rows of different lengths, stored in column panels: memory for what has been written only."""

from __future__ import annotations

import torch
from torch import Tensor


class Panels:
    """(N, M) with each row written from the left, a stretch at a time.

    A panel of ``width`` columns holds the rows that have come so far and no others, in the order of their coming.

    Args:
        rows: N.
        dtype: The type of the numbers.
        device: Where they are kept.
        width: Of a panel, in columns.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, width: int = 512) -> None:
        self.width = width
        self._rows = rows
        self._data: list[Tensor] = []  # (capacity, width) each
        self._slots: list[Tensor] = []  # (N,) int32 each: where a row is; -1 if it has not come so far
        self._counts: list[int] = []
        self._empty = torch.empty(0, width, dtype=dtype, device=device)

    def read(self, rows: Tensor, start: int, stop: int) -> Tensor:
        """Columns ``start`` to ``stop`` of some rows, inside one panel: (n,) -> (n, stop - start)."""
        panel = start // self.width
        offset = panel * self.width
        slots = self._slots[panel][rows]
        return self._data[panel].index_select(0, slots)[:, start - offset : stop - offset]

    def write(self, rows: Tensor, start: int, block: Tensor) -> None:
        """Put (n, k) into columns ``start`` on of some rows, in all panels that these columns fall into."""
        stop = start + block.shape[1]
        for panel in range(start // self.width, -(-stop // self.width)):
            offset = panel * self.width
            left, right = max(start, offset), min(stop, offset + self.width)
            slots = self._admit(panel, rows)
            self._data[panel][slots, left - offset : right - offset] = block[:, left - start : right - start]

    def _admit(self, panel: int, rows: Tensor) -> Tensor:
        """The slots of rows in a panel, given to those that have none: (n,) int64."""
        while panel >= len(self._data):
            self._data.append(self._empty)
            self._slots.append(torch.full((self._rows,), -1, dtype=torch.int32, device=rows.device))
            self._counts.append(0)
        slots = self._slots[panel]
        new = rows[slots[rows] < 0]
        if len(new):
            start = self._counts[panel]
            self._counts[panel] = start + len(new)
            slots[new] = torch.arange(start, start + len(new), dtype=torch.int32, device=rows.device)
            self._data[panel] = with_room(self._data[panel], start + len(new), self._rows)
        return slots[rows].long()


def with_room(block: Tensor, count: int, most: int) -> Tensor:
    """A block with its rows and room for ``count`` or more, ``most`` at the end; new rows hold anything.

    On the CPU it gets all room at once, as the system gives memory to what is written only and copies cost more
    than they save; elsewhere it grows by a quarter.
    """
    if count <= len(block):
        return block
    rows = most if block.device.type == "cpu" else min(most, max(1024, count + count // 4))
    grown = block.new_empty(rows, block.shape[1])
    grown[: len(block)] = block
    return grown
