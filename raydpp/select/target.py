"""Aimed selection: how similar each example is to those of a target, as a score that quality can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa

from raydpp.cluster import Here
from raydpp.errors import UserError
from raydpp.tables import GradientTable, Part, by_source, same_fingerprint, vectors

if TYPE_CHECKING:
    from torch import Tensor

TARGET = "target"
"""The name of the score."""

TargetScore = Literal["mean", "nearest", "conflict-aware"]


def check_targets(table: GradientTable, targets: Sequence[GradientTable]) -> None:
    """UserError where targets cannot be compared with the table, or it has a score of that name already."""
    same_fingerprint([table, *targets])
    if targets and table.has(TARGET):
        raise UserError(f"{table.name} has a column {TARGET!r}, which --target makes: name yours otherwise")


def score_by_target(
    tasks: Here,
    table: GradientTable,
    partitions: Sequence[Sequence[Part]],
    targets: Sequence[GradientTable],
    form: TargetScore = "mean",
) -> GradientTable:
    """The table with the score ``target`` of each example, of one of these forms.

    ``mean``: the largest cosine with the mean of a target's source. So LESS scores examples, by gradients (Xia et al.
    2024, arXiv 2402.04333, section 4: the mean over a validation task, the maximum over tasks). Means are of unit rows,
    and each counts by its direction alone. ``nearest``: the largest cosine with any row of the targets. So RDS+ scores
    examples for a task (Ivison et al. 2025, arXiv 2503.01807). ``conflict-aware``: that of ``mean`` plus the smallest
    such cosine where it is negative, so that what helps one source and harms another counts less.
    """
    found = tasks.get([tasks.submit(_directions, group, form) for group in _groups(targets)])
    directions = tasks.put(np.vstack(found))  # (G, D), or (T, D) for the nearest
    found = tasks.get([tasks.submit(_scores, table, parts, directions, form) for parts in partitions])
    scores = pa.concat_tables(found).sort_by("id")
    if table.scored:
        scores = scores.join(tasks.get(table.scores), "id", join_type="inner").sort_by("id")
    return replace(table, scores=tasks.put(scores), scored=(*table.scored, TARGET))


def target_tasks(targets: Sequence[GradientTable]) -> list[np.ndarray]:
    """(t, D) unit rows of each source of the targets, in the order of ids, as are the sources by their first."""
    found = [_unit_rows(group, group.parts) for group in _groups(targets)]
    return [rows.numpy() for _, rows in sorted(found, key=lambda one: one[0][0].as_py())]


def _groups(targets: Sequence[GradientTable]) -> list[GradientTable]:
    return [group for one in targets for group in (by_source(one) if one.has("source") else [one])]


def _directions(group: GradientTable, form: TargetScore) -> np.ndarray:
    """What examples are compared with, of unit norm: the (t, D) rows, or their mean, (D,), a file at a time."""
    if form == "nearest":
        return _unit_rows(group, group.parts)[1].numpy()
    total = np.sum([_unit_rows(group, [part])[1].sum(0).numpy() for part in group.parts], axis=0)
    length = float(np.linalg.norm(total))
    if not length:
        raise UserError(f"the features of the target {group.name} cancel out: it points nowhere")
    return np.asarray(total / length)


def _scores(table: GradientTable, parts: Sequence[Part], directions: np.ndarray, form: TargetScore) -> pa.Table:
    import torch

    aims = torch.from_numpy(np.array(directions)).T  # (D, G)
    found = []
    for part in parts:
        ids, rows = _unit_rows(table, [part])
        cosines = rows @ aims  # (n, G)
        against = cosines.amin(1).clamp(max=0) if form == "conflict-aware" else 0
        found.append(pa.table({"id": ids, TARGET: (cosines.amax(1) + against).numpy()}))
    return pa.concat_tables(found)


def _unit_rows(table: GradientTable, parts: Sequence[Part]) -> tuple[pa.ChunkedArray, Tensor]:
    """(n,) ids of some files in order, and (n, D) features in float64."""
    from raydpp.dpp.features import unit_rows

    rows = table.read(parts)
    return rows["id"], unit_rows(vectors(rows[table.column]), device="cpu")
