"""The items that a search picks from: checked once; features are normalised as they are taken, never copied whole."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydpp.errors import UserError

Features = np.ndarray | Tensor
Ids = Sequence[str] | Sequence[int] | np.ndarray
Numbers = Sequence[float] | np.ndarray | Tensor

NORM_TOLERANCE = 2e-3
"""How far from 1 a stored norm may be: rounding to float16 moves each entry, so the norm too, by at most
2^-11 = 5e-4."""

_BLOCK = 1024  # rows looked at together


@dataclass(frozen=True, eq=False)
class Items:
    """N items to pick from. Features are checked by ``unit_rows``, ids by ``order``, the rest here."""

    features: Features  # (N, D) rows of unit norm, of float16, float32 or float64, or of int8 and any norm
    ids: Ids | None = None  # N distinct strings or integers, for ties and messages; the row index if None
    modular: np.ndarray = None  # type: ignore[assignment]  # (N,) the modular terms; None becomes zeros
    costs: np.ndarray | None = None  # (N,) above 0; None where costs do not count
    sources: np.ndarray | None = None  # (N,) a label for each; None where there are no quotas
    excluded: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))  # (k,) rows never to be picked

    def __post_init__(self) -> None:
        n = len(self)
        if self.modular is None:
            object.__setattr__(self, "modular", np.zeros(n))
        if self.costs is not None:
            if self.costs.shape != (n,):
                raise UserError(f"there are {self.costs.size} costs for {n} items: give one for each")
            if len(bad := np.flatnonzero(~(np.isfinite(self.costs) & (self.costs > 0)))):
                raise UserError(f"{len(bad)} costs are not numbers above 0 (rows {bad[:5].tolist()})")
        if self.sources is not None and len(self.sources) != n:
            raise UserError(f"there are {len(self.sources)} sources for {n} items: give one label for each")

    def __len__(self) -> int:
        return len(self.features)

    @property
    def order(self) -> np.ndarray:
        """(N,) int64, distinct: of items that tie, the one with the smallest is picked."""
        return id_order(self.ids, len(self))

    def unit_rows(self, device: torch.device | str | None = None) -> UnitRows:
        """The features: (N, D)."""
        return UnitRows(self.features, self.ids, device)


class UnitRows:
    """(N, D) rows of unit norm up to their storage's rounding, left in that storage and not copied (but to a device).

    Rows that are not finite, all zeros, or off norm 1 by more than ``NORM_TOLERANCE`` are refused by id. Rows of int8
    are whole numbers of any norm, and stand for what they are divided by it.
    """

    def __init__(self, features: Features, ids: Ids | None = None, device: torch.device | str | None = None) -> None:
        self._stored = _as_tensor(features, device)  # (N, D)
        if self._stored.ndim != 2 or 0 in self._stored.shape:
            raise UserError(f"the features have shape {tuple(self._stored.shape)}: they must be N rows of D numbers")
        if ids is not None and len(ids) != len(self):
            raise UserError(f"there are {len(ids)} ids for {len(self)} rows: give one id for each row")
        whole = not self._stored.is_floating_point()
        self._norms = torch.empty(len(self), dtype=torch.float64, device=self.device)  # (N,)
        for block, norms in zip(self._stored.split(_BLOCK), self._norms.split(_BLOCK), strict=True):
            numbers = block.float() if whole else block
            torch.linalg.vector_norm(numbers, dim=1, dtype=torch.float64, out=norms)
        _refuse_faults(self._norms, ids, any_norm=whole)

    def __len__(self) -> int:
        return len(self._stored)

    @property
    def dimension(self) -> int:
        return self._stored.shape[1]

    @property
    def device(self) -> torch.device:
        return self._stored.device

    def take(self, index: Tensor | slice = slice(None), dtype: torch.dtype = torch.float64) -> Tensor:
        """Some of the rows, normalised in this type, as a new tensor: (n,) indices -> (n, D)."""
        norms = self._norms[index, None].to(dtype)
        if isinstance(index, slice):
            return self._stored[index].to(dtype) / norms
        return self._stored.index_select(0, index).to(dtype).div_(norms)

    def stored(self, index: np.ndarray) -> np.ndarray:
        """Some of the rows, (n,), as they are stored: (n, D)."""
        return self._stored[torch.from_numpy(index).to(self.device)].numpy(force=True)

    def stored_as(self, like: Tensor) -> UnitRows:
        """The same rows of another floating point type, and where another tensor is."""
        if like.is_floating_point() != self._stored.is_floating_point():
            raise UserError("of the rows owned and the candidates only some are whole numbers: give all in one type")
        return UnitRows(self._stored.to(like))

    def part(self, index: Tensor) -> UnitRows:
        """Some of the rows, (n,), as a table of their own (a copy in their storage)."""
        part = copy.copy(self)
        part._stored, part._norms = self._stored[index], self._norms[index]
        return part

    def square_sums(self, directions: Tensor, index: Tensor | None = None) -> np.ndarray:
        """The squared length of rows' projections, <x, d_1>^2 + ... + <x, d_k>^2: (D, k), (n,) -> (n,) float64."""
        width = -(-directions.shape[1] // 16) * 16  # what BLAS is fast at
        padded = torch.nn.functional.pad(directions, (0, width - directions.shape[1]))
        norms = self._norms if index is None else self._norms[index]
        lengths = torch.empty(len(norms), dtype=padded.dtype, device=self.device)  # (n,)
        blocks = (self._stored if index is None else index).split(_BLOCK)
        for some, out in zip(blocks, lengths.split(_BLOCK), strict=True):
            block = some if index is None else self._stored.index_select(0, some)
            torch.linalg.vector_norm(block.to(padded.dtype) @ padded, dim=1, out=out)
        return (lengths.double() / norms).square_().numpy(force=True)

    def with_rows(self, *others: UnitRows) -> UnitRows:
        """These rows and others of the same dimension behind them, stored as these are (a copy of all)."""
        for more in others:
            if more.dimension != self.dimension:
                raise UserError(
                    f"the rows owned have {more.dimension} dimensions and the candidates {self.dimension}:"
                    " they must be features of the same kind"
                )
        everyone = [self, *(more.stored_as(self._stored) for more in others)]
        together = copy.copy(self)
        together._stored = torch.cat([rows._stored for rows in everyone])
        together._norms = torch.cat([rows._norms for rows in everyone])
        return together


def unit_rows(features: Features, ids: Ids | None = None, device: torch.device | str | None = None) -> Tensor:
    """All rows checked and normalised: (N, D) -> (N, D) float64 with norms 1."""
    return UnitRows(features, ids, device).take()


def _as_tensor(features: Features, device: torch.device | str | None) -> Tensor:
    if isinstance(features, Tensor):
        rows = features.detach().to(device=device)
        return rows if rows.is_floating_point() or rows.dtype == torch.int8 else rows.double()
    try:
        array = np.asarray(features)
        if array.dtype == object:  # a column of rows: of pandas, of Arrow
            array = np.stack([np.asarray(row) for row in array])
        array = np.ascontiguousarray(array)  # torch has no negative strides
        if array.dtype not in (np.int8, np.float16, np.float32, np.float64):
            array = array.astype(np.float64)
        with warnings.catch_warnings():  # torch warns that a read-only array must not be written to: it is not
            warnings.filterwarnings("ignore", message="The given NumPy array is not writ")
            return torch.as_tensor(array).to(device)
    except (TypeError, ValueError) as error:
        raise UserError(f"the features are not an (N, D) array of numbers: {error}") from error


def _refuse_faults(norms: Tensor, ids: Ids | None, any_norm: bool) -> None:
    finite = norms.isfinite()
    faults = {
        "with NaN or infinite entries": ~finite,
        "of zeros": norms == 0,
        "without unit norm": finite & (norms != 0) & ((norms - 1.0).abs() > NORM_TOLERANCE) & (not any_norm),
    }
    found = []
    for fault, mask in faults.items():
        bad = mask.nonzero()[:, 0].tolist()
        if bad:
            named = ", ".join(str(i if ids is None else ids[i]) for i in bad[:5])
            found.append(f"{len(bad)} of {len(norms)} rows {fault} (ids {named}{', ...' if len(bad) > 5 else ''})")
    if found:
        raise UserError(f"features cannot be used: {'; '.join(found)}. Drop these rows or divide by their norms")


def id_order(ids: Ids | None, rows: int) -> np.ndarray:
    """The rank of each row's id among all ids: (N,) int64. Strings sort by code point; None: row index."""
    if ids is None:
        return np.arange(rows)
    names = _names(ids)
    try:
        ranked = sorted(range(rows), key=lambda row: names[row])
    except TypeError as error:
        raise UserError(f"ids must be all strings or all integers: {error}") from error
    for one, other in itertools.pairwise(ranked):
        if names[one] == names[other]:
            raise UserError(f"rows {one} and {other} have the same id {names[one]}: ids must be distinct")
    order = np.empty(rows, dtype=np.int64)
    order[ranked] = np.arange(rows)
    return order


def rows_of(wanted: Any, ids: Ids | None, rows: int, name: str) -> np.ndarray:
    """Where ids are: (k,) int64; an id that no row has is refused. Without ids they are row indices."""
    if wanted is None:
        return np.empty(0, dtype=np.int64)
    place = {name: row for row, name in enumerate(range(rows) if ids is None else _names(ids))}
    found = [place.get(one, -1) for one in _names(wanted)]
    if missing := [one for one, row in zip(_names(wanted), found, strict=True) if row < 0]:
        raise UserError(
            f"{len(missing)} of the ids in {name} are no rows' (the first: {missing[0]}): leave them out, or give"
            " their features"
        )
    return np.array(found, dtype=np.int64)


def _names(ids: Any) -> list[Any]:
    listed = getattr(ids, "to_pylist", getattr(ids, "tolist", None))  # of Arrow; of NumPy, torch and pandas
    return list(ids) if listed is None else listed()
