"""Ids and quality scores, checked: what decides between items apart from their features."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from raydpp.errors import UserError
from raydpp.selection.features import Ids


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


def check_scores(quality: Sequence[float] | np.ndarray | Tensor | None, weight: float, rows: int) -> np.ndarray | None:
    """The quality scores as (N,) float64, or None if they do not count."""
    if quality is None:
        if weight > 0:
            raise UserError(
                f"a quality weight of {weight} needs quality scores: give one a row, or set the weight to 0"
            )
        return None
    scores = np.array(quality.numpy(force=True) if isinstance(quality, Tensor) else quality, dtype=np.float64)
    if scores.shape != (rows,):
        raise UserError(f"quality has shape {scores.shape}: give one score for each of {rows} rows")
    if not np.isfinite(scores).all():
        bad = np.flatnonzero(~np.isfinite(scores)).tolist()
        raise UserError(f"{len(bad)} quality scores are NaN or infinite (rows {bad[:5]}): give finite ones")
    return scores if weight > 0 else None


def _names(ids: Any) -> list[Any]:
    return ids.tolist() if isinstance(ids, np.ndarray) else list(ids)
