"""Aimed selection: how similar each example is to those of a target, as a score that quality can be."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.cluster import Here
from raydpp.errors import UserError, few
from raydpp.runs import first_difference
from raydpp.tables import GradientTable, Part, by_source, partition_files, same_fingerprint, vector_array, vectors

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

TARGET = "target"
"""The name of the score."""

TargetScore = Literal["mean", "nearest", "conflict-aware"]


def check_targets(
    table: GradientTable, targets: Sequence[GradientTable], checkpoints: Sequence[GradientTable] = ()
) -> list[list[GradientTable]]:
    """The targets of the table, then those of the table at each other checkpoint.

    A target's gradients may be plain where the table's are Adam's (LESS, section 3): all else is the same. UserError
    where a target cannot be compared with a table, a table has none, or there is a score of that name already.
    """
    if targets and table.has(TARGET):
        raise UserError(f"{table.name} has a column {TARGET!r}, which --target makes: name yours otherwise")
    if not checkpoints:
        same_fingerprint([table, *targets], but=["optimizer"])
        return [list(targets)]
    if not targets:
        raise UserError("--checkpoints needs --target: targets that were extracted at the same checkpoints")
    tables = [table, *checkpoints]
    if plain := [one.name for one in (*tables, *targets) if one.fingerprint is None]:
        raise UserError(f"{plain[0]} does not say its checkpoint: with --checkpoints give folders of raydpp extract")
    same_fingerprint(tables, but=["optimizer", "adapter"])
    for one, other in itertools.combinations(tables, 2):
        if _difference(one, other) is None:
            raise UserError(f"{one.name} and {other.name} are of the same checkpoint: give --checkpoints the others")
    found: list[list[GradientTable]] = [[] for _ in tables]
    for target in targets:
        differences = [_difference(one, target) for one in tables]
        if None not in differences:
            said = ", ".join(f"from {one.name} in {field}" for one, field in zip(tables, differences, strict=True))
            raise UserError(
                f"the target {target.name} is of no checkpoint that there is a table of; it differs {said}. Extract it"
                " with the options of one of them"
            )
        found[differences.index(None)].append(target)
    for one, own in zip(tables, found, strict=True):
        if not own:
            raise UserError(f"no --target is of the checkpoint of {one.name}: extract the target with its --adapter")
    return found


def _difference(one: GradientTable, other: GradientTable) -> str | None:
    """In what the numbers of two tables differ, apart from the optimizer."""
    without = ({**(table.fingerprint or {}), "optimizer": None} for table in (one, other))
    difference = first_difference(*without)
    return difference and difference[0]


def score_by_target(
    tasks: Here,
    tables: Sequence[GradientTable],
    partitions: Sequence[Sequence[Part]],
    targets: Sequence[Sequence[GradientTable]],
    form: TargetScore = "mean",
) -> GradientTable:
    """The first table with the score ``target`` of each example, of one of these forms.

    ``mean``: the largest cosine with the mean of a target's source. So LESS scores examples, by gradients (Xia et al.
    2024, arXiv 2402.04333, section 4: the mean over a validation task, the maximum over tasks). Means are of unit rows,
    and each counts by its direction alone. ``nearest``: the largest cosine with any row of the targets. So RDS+ scores
    examples for a task (Ivison et al. 2025, arXiv 2503.01807). ``conflict-aware``: that of ``mean`` plus the smallest
    such cosine where it is negative, so that what helps one source and harms another counts less.

    Where there are tables of several checkpoints, with ``targets`` of each, the cosine with a source's mean is the mean
    of those at the checkpoints, weighed by their learning rates (LESS, Inf_Adam); it takes the memory of one number an
    example and source here. ``partitions`` are the first table's.

    UserError where a source of the targets, or an example of the first table, is missing at a checkpoint.
    """
    rates = [one.learning_rate for one in tables]
    if len(tables) > 1 and not all(rates):
        unknown = [one.name for one in tables if not one.learning_rate]
        log.info("select: all checkpoints count the same: the learning rate of %s is not known", few(unknown))
    weights = np.array(rates if all(rates) else [1.0] * len(tables))  # (K,)
    weights /= weights.sum()
    ids, total = None, np.zeros(0)  # (N, G)
    for table, groups, weight in zip(tables, _groups(tables, targets), weights, strict=True):
        directions = tasks.put(np.vstack(tasks.get([tasks.submit(_directions, group, form) for group in groups])))
        split = partitions if ids is None else partition_files(table.parts, len(partitions))
        reduced = form if len(tables) == 1 else None  # of one checkpoint a number an example is all that is needed
        some = [tasks.submit(_cosines, table, parts, directions, float(weight), reduced) for parts in split]
        found = pa.concat_tables(tasks.get(some)).sort_by("id")
        cosines = vectors(found["cosines"])
        if ids is None:
            ids, total = found["id"], cosines
            continue
        places = pc.index_in(ids, found["id"])
        if places.null_count:
            lost = ids.filter(pc.is_null(places))
            raise UserError(
                f"{len(lost):,} of the {len(ids):,} examples of {tables[0].name} are not in {table.name}, such as"
                f" {lost[0]}: extract the same conversations at every checkpoint"
            )
        total = total + cosines[places.to_numpy()]
    scores = pa.table({"id": ids, TARGET: _score(total, "mean" if len(tables) == 1 else form)})
    table = tables[0]
    if table.scored:
        scores = scores.join(tasks.get(table.scores), "id", join_type="inner").sort_by("id")
    return replace(table, scores=tasks.put(scores), scored=(*table.scored, TARGET))


def target_tasks(targets: Sequence[GradientTable]) -> list[np.ndarray]:
    """(t, D) unit rows of each source of the targets, in the order of ids, as are the sources by their first."""
    found = [_unit_rows(group, group.parts) for one in targets for group in _sources(one)]
    return [rows.numpy() for _, rows in sorted(found, key=lambda one: one[0][0].as_py())]


def _sources(target: GradientTable) -> list[GradientTable]:
    return by_source(target) if target.has("source") else [target]


def _groups(tables: Sequence[GradientTable], targets: Sequence[Sequence[GradientTable]]) -> list[list[GradientTable]]:
    """The sources of the targets of each table; of several tables the same ones, in the same order."""
    found = [[group for one in own for group in _sources(one)] for own in targets]
    if len(tables) == 1:
        return found
    everything = {group.name for groups in found for group in groups}
    for table, groups in zip(tables, found, strict=True):
        count = Counter(group.name for group in groups)
        for name in sorted(everything):
            if count[name] != 1:
                many = "no target" if not count[name] else f"{count[name]} targets"
                raise UserError(
                    f"the source {name!r} is in {many} of the checkpoint of {table.name}: each source of the targets"
                    " must be in one target of every checkpoint"
                )
    return [sorted(groups, key=lambda group: group.name) for groups in found]


def _directions(group: GradientTable, form: TargetScore) -> np.ndarray:
    """What examples are compared with, of unit norm: the (t, D) rows, or their mean, (D,), a file at a time."""
    if form == "nearest":
        return _unit_rows(group, group.parts)[1].numpy()
    total = np.sum([_unit_rows(group, [part])[1].sum(0).numpy() for part in group.parts], axis=0)
    length = float(np.linalg.norm(total))
    if not length:
        raise UserError(f"the features of the target {group.name} cancel out: it points nowhere")
    return np.asarray(total / length)


def _score(cosines: np.ndarray, form: TargetScore) -> np.ndarray:
    """(n, G) cosines with each direction -> (n,)."""
    best: np.ndarray = cosines.max(axis=1)
    return best + np.minimum(cosines.min(axis=1), 0) if form == "conflict-aware" else best


def _cosines(
    table: GradientTable, parts: Sequence[Part], directions: np.ndarray, weight: float, reduced: TargetScore | None
) -> pa.Table:
    """Ids and weighed cosines of some files' rows with each direction or, by a form of the score, one number each."""
    import torch

    aims = torch.from_numpy(np.array(directions)).T * weight  # (D, G)
    found = []
    for part in parts:
        ids, rows = _unit_rows(table, [part])
        cosines = (rows @ aims).numpy()  # (n, G)
        if reduced:
            cosines = _score(cosines, reduced)[:, None]
        found.append(pa.table({"id": ids, "cosines": vector_array(cosines, pa.float64())}))
    return pa.concat_tables(found)


def _unit_rows(table: GradientTable, parts: Sequence[Part]) -> tuple[pa.ChunkedArray, Tensor]:
    """(n,) ids of some files in order, and (n, D) features in float64."""
    from raydpp.dpp.features import unit_rows

    rows = table.read(parts)
    return rows["id"], unit_rows(vectors(rows[table.column]), device="cpu")
