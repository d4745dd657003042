"""Aimed selection: how similar each example is to those of a target, as a score that quality can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from raydpp.cluster import Here
from raydpp.errors import UserError
from raydpp.tables import GradientTable, Part, by_source, same_fingerprint, vectors

if TYPE_CHECKING:
    from torch import Tensor

TARGET = "target"
"""The name of the score."""


def check_targets(table: GradientTable, targets: Sequence[GradientTable]) -> None:
    """UserError where targets cannot be compared with the table, or it has a score of that name already."""
    same_fingerprint([table, *targets])
    if targets and table.has(TARGET):
        raise UserError(f"{table.name} has a column {TARGET!r}, which --target makes: name yours otherwise")


def score_by_target(
    tasks: Here, table: GradientTable, partitions: Sequence[Sequence[Part]], targets: Sequence[GradientTable]
) -> GradientTable:
    """The table with the score ``target``: of each example the largest cosine with the mean of a target's source.

    So LESS scores examples, by gradients (Xia et al. 2024, arXiv 2402.04333, section 4: the mean over a validation
    task, the maximum over tasks). Means are of unit rows, and each counts by its direction alone.
    """
    groups = [group for one in targets for group in (by_source(one) if one.has("source") else [one])]
    means = tasks.put(np.stack(tasks.get([tasks.submit(_mean, group) for group in groups])))  # (G, D)
    found = tasks.get([tasks.submit(_scores, table, parts, means) for parts in partitions])
    scores = pa.concat_tables(found).sort_by("id")
    if table.scored:
        scores = scores.join(tasks.get(table.scores), "id", join_type="inner").sort_by("id")
    return replace(table, scores=tasks.put(scores), scored=(*table.scored, TARGET))


def _mean(group: GradientTable) -> np.ndarray:
    """(D,) float64, of unit norm; a file at a time."""
    total = np.sum([_unit_rows(group, part)[1].sum(0).numpy() for part in group.parts], axis=0)
    length = float(np.linalg.norm(total))
    if not length:
        raise UserError(f"the features of the target {group.name} cancel out: it points nowhere")
    return np.asarray(total / length)


def _scores(table: GradientTable, parts: Sequence[Part], means: np.ndarray) -> pa.Table:
    import torch

    directions = torch.from_numpy(np.array(means))  # (G, D)
    found = []
    for part in parts:
        ids, rows = _unit_rows(table, part)
        found.append(pa.table({"id": ids, TARGET: (rows @ directions.T).amax(1).numpy()}))
    return pa.concat_tables(found)


def _unit_rows(table: GradientTable, part: Part) -> tuple[pa.ChunkedArray, Tensor]:
    """(n,) ids of a file, and (n, D) features in float64."""
    from raydpp.dpp.features import unit_rows

    rows = table.read([part])
    return rows["id"], unit_rows(vectors(rows[table.column]), device="cpu")
