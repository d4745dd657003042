"""A matrix with rows of different lengths, stored in column panels: memory for what has been written only."""

from __future__ import annotations

import torch
from torch import Tensor


class Panels:
    """(N, M) with each row written from the left, a panel at a time, and each panel of it once.

    A panel of ``width`` columns holds the rows that have come so far and no others, in the order of their coming.

    Args:
        rows: N.
        dtype: The type of the numbers.
        device: Where they are kept.
        width: Of a panel, in columns.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, width: int = 256) -> None:
        self.width = width
        self._rows = rows
        self._data: list[Tensor] = []  # (capacity, width) each
        self._slots: list[Tensor] = []  # (N,) int32 each: where a row is
        self._counts: list[int] = []
        self._empty = torch.empty(0, width, dtype=dtype, device=device)

    def read(self, rows: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """The panel that begins with column ``start``, of rows that have come to it: (n,) -> (n, width)."""
        panel = start // self.width
        return torch.index_select(self._data[panel], 0, self._slots[panel][rows], out=out)

    def write(self, rows: Tensor, start: int, block: Tensor) -> None:
        """Put (n, width) into the panel that begins with column ``start``, of rows that have not come to it before."""
        panel = start // self.width
        while panel >= len(self._data):
            self._data.append(self._empty)
            self._slots.append(torch.empty(self._rows, dtype=torch.int32, device=rows.device))
            self._counts.append(0)
        begin, end = self._counts[panel], self._counts[panel] + len(rows)
        self._data[panel] = with_room(self._data[panel], end, self._rows)
        self._data[panel][begin:end] = block
        self._slots[panel][rows] = torch.arange(begin, end, dtype=torch.int32, device=rows.device)
        self._counts[panel] = end


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
