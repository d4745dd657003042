"""The Cholesky factor of the picks' kernel matrix in float64, and exact covariances given the picks."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.working_set import WorkingSet

WIDTH = 256
"""Columns of a panel: wide enough for matrix products at full speed, narrow enough that a triangle wastes little."""


class Factor:
    """L with L L^T = K_S for the picks S in order, grown working set by working set; t is the number of picks so far.

    Kept in column panels of which only the part below the diagonal block exists: some 4 M^2 bytes, M the size.
    """

    def __init__(self, rows: UnitRows, kernel: Kernel, size: int) -> None:
        self.rows = rows  # (N, D); more may come behind them
        self._kernel = kernel
        self._size = size
        self._count = 0
        self._panels: list[Tensor] = []  # panel p: (t - p WIDTH or more, WIDTH), rows from p WIDTH on
        self._features = torch.empty(0, rows.dimension, dtype=torch.float64, device=rows.device)
        self._inverses: dict[tuple[int, torch.dtype], Tensor] = {}  # of whole diagonal blocks
        self._known = np.empty(0, dtype=np.int64)  # (p,) the items of the last working set
        self._known_features = self._features  # (p, D)
        self._known_rows = self._features.new_empty(0, 0)  # (p, t) L^-1 k(S, i) of each

    @property
    def features(self) -> Tensor:
        """(t, D) float64: the picks' features."""
        return self._features[: self._count]

    def block(self, top: int, bottom: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Rows ``top`` to ``bottom`` of L, columns inside one panel, whose first is at most ``top``; maybe a view."""
        offset = start // WIDTH * WIDTH
        panel = self._panels[start // WIDTH]
        return panel[top - offset : bottom - offset, start - offset : stop - offset].to(dtype)

    def solve_block(self, start: int, right: Tensor, out: Tensor) -> None:
        """X with X L_b^T = ``right``, (n, k), into ``out``, for L's diagonal block b of k columns from ``start`` on.

        Where there are many rows the block is inverted, once for each whole panel: for bounds, not for what is exact.
        """
        stop = start + right.shape[1]
        whole = start % WIDTH == 0 and right.shape[1] == WIDTH
        inverse = self._inverses.get((start, right.dtype)) if whole else None
        if inverse is None:
            square = right.new_zeros(stop - start, stop - start)
            for left in range(start // WIDTH * WIDTH, stop, WIDTH):
                inside, end = max(left, start), min(left + WIDTH, stop)
                block = self.block(inside, stop, inside, end, right.dtype)
                square[inside - start :, inside - start : end - start] = block
            if not whole and len(right) < stop - start:
                out.copy_(torch.linalg.solve_triangular(square.T, right, upper=True, left=False))
                return
            unit = torch.eye(stop - start, dtype=right.dtype, device=right.device)
            inverse = torch.linalg.solve_triangular(square, unit, upper=False)
            if whole:
                self._inverses[start, right.dtype] = inverse
        torch.mm(right, inverse.T, out=out)

    def solve(self, rows: np.ndarray) -> WorkingSet:
        """Costs O(t^2) for each item, (p,), that was not in the last working set, in matrix products."""
        place = {row: i for i, row in enumerate(self._known.tolist())}
        places = [place.get(row, -1) for row in rows.tolist()]
        before = torch.tensor(places, dtype=torch.int64, device=self.rows.device)  # (p,)
        features = self.rows.take(torch.from_numpy(rows).to(self.rows.device))  # (p, D)
        solved = features.new_empty(len(rows), self._count)  # (p, t)
        old, new = before >= 0, before < 0
        solved[old] = self._known_rows[before[old]]
        if new.any():
            solved[new] = self._factor_rows(features[new])
        self._known, self._known_features, self._known_rows = rows, features, solved
        covariance = self._kernel.matrix(features).addmm_(solved, solved.T, alpha=-1.0)  # (p, p)
        return WorkingSet(rows, covariance.numpy(force=True))

    def commit(self, working_set: WorkingSet) -> Tensor:
        """Append the picks of the last working set solved; returns their features, (k, D) float64."""
        columns = torch.from_numpy(working_set.columns).to(self.rows.device)  # (p, k)
        self._known_rows = torch.cat([self._known_rows, columns], dim=1)
        picked = torch.tensor(working_set.picked, dtype=torch.int64, device=self.rows.device)
        features = self._known_features[picked]
        self._grow(features, self._known_rows[picked])
        return features

    def append(self, features: Tensor) -> Tensor:
        """Append picks that are none of the rows: (k, D) float64, each above the floor given those before it."""
        for some in features.split(WIDTH):
            solved = self._factor_rows(some)  # (k, t)
            corner = self._kernel.matrix(some).addmm_(solved, solved.T, alpha=-1.0)  # (k, k)
            self._grow(some, torch.cat([solved, torch.linalg.cholesky(corner)], dim=1))
        self._known, self._known_rows = self._known[:0], self._known_rows.new_empty(0, self._count)
        return features

    def _grow(self, features: Tensor, appended: Tensor) -> None:
        """Append k picks: their features, (k, D), and rows of L, (k, t + k), whatever is right of the diagonal."""
        start = self._count
        appended[:, start:].tril_()
        self._count += len(appended)
        self._features = with_room(self._features, self._count, self._size)
        self._features[start : self._count] = features
        for panel, offset in enumerate(range(0, self._count, WIDTH)):
            if panel == len(self._panels):
                self._panels.append(self._features.new_empty(0, WIDTH))
            grown = self._panels[panel] = with_room(self._panels[panel], self._count - offset, self._size - offset)
            first, stop = max(start, offset), min(offset + WIDTH, self._count)
            grown[first - offset : self._count - offset, : stop - offset] = appended[first - start :, offset:stop]

    def _factor_rows(self, features: Tensor) -> Tensor:
        """L^-1 k(S, i), panel by panel: (g, D) -> (g, t)."""
        x = self._kernel.cross(features, self.features)  # (g, t)
        for start in range(0, self._count, WIDTH):
            stop = min(start + WIDTH, self._count)
            factor = self.block(start, self._count, start, stop, torch.float64)  # (t - start, stop - start)
            head, rest = factor[: stop - start], factor[stop - start :]
            x[:, start:stop] = torch.linalg.solve_triangular(head, x[:, start:stop].T, upper=False).T
            x[:, stop:].addmm_(x[:, start:stop], rest.T, alpha=-1.0)
        return x


class Panels:
    """(N, M) with each row written from the left, a panel at a time, and each panel of it once.

    A panel of ``width`` columns holds the rows written so far and no others, in the order of writing.
    """

    def __init__(self, rows: int, dtype: torch.dtype, device: torch.device, width: int = 256) -> None:
        self.width = width
        self._rows = rows
        self._data: list[Tensor] = []  # (capacity, width) each
        self._slots: list[Tensor] = []  # (N,) int32 each: where a row is
        self._counts: list[int] = []
        self._empty = torch.empty(0, width, dtype=dtype, device=device)

    def read(self, rows: Tensor, start: int, out: Tensor | None = None) -> Tensor:
        """The panel that begins with column ``start``, of rows written to it: (n,) -> (n, width)."""
        panel = start // self.width
        return torch.index_select(self._data[panel], 0, self._slots[panel][rows], out=out)

    def write(self, rows: Tensor, start: int, block: Tensor) -> None:
        """Put (n, width) into the panel that begins with column ``start``, of rows not written to it before."""
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

    On the CPU it gets all room at once, as only what is written takes memory; elsewhere it grows by a quarter.
    """
    if count <= len(block):
        return block
    rows = most if block.device.type == "cpu" else min(most, max(1024, count + count // 4))
    grown = block.new_empty(rows, block.shape[1])
    grown[: len(block)] = block
    return grown
