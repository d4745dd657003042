"""Baselines to compare greedy MAP with: the same interface, the same output."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.budget import Budget, BudgetState, Quotas, in_order
from raydpp.dpp.features import Features, Ids, UnitRows, check_scores, id_order, rows_of
from raydpp.dpp.greedy import reporting
from raydpp.dpp.kernels import Kernel, KernelName
from raydpp.dpp.lazy_greedy import Progress, Selection
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.errors import UserError

BaselineName = Literal["random", "quality", "length", "k-center", "k-means", "dedup"]

SAME = 1e-6
"""Unit rows nearer to each other than this are copies to k-center."""

_BLOCK = 1024  # rows compared together


@dataclass(frozen=True, eq=False)
class _Task:
    rows: UnitRows
    order: np.ndarray  # (N,) the rank of each id
    state: BudgetState
    scores: np.ndarray | None  # (N,)
    threshold: float
    random: np.random.Generator
    seed: int
    report: Progress | None


def baseline(
    method: BaselineName,
    features: Features,
    size: int | float | None = None,
    *,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    quality: Sequence[float] | np.ndarray | Tensor | None = None,
    lengths: Sequence[float] | np.ndarray | Tensor | None = None,
    ids: Ids | None = None,
    exclude: Ids | None = None,
    tokens: float | None = None,
    costs: Sequence[float] | np.ndarray | None = None,
    sources: Sequence[str] | np.ndarray | None = None,
    minimum: Quotas | None = None,
    maximum: Quotas | None = None,
    threshold: float = 0.95,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | bool = False,
) -> Selection:
    """Select a subset by a baseline. Arguments that are not explained are those of ``greedy.greedy_map``.

    The kernel has no part in the picks, only in their log gains: m picks cost m x m numbers. What is random
    goes by the order of ids, not of rows.

    Args:
        method: ``random``, uniform; ``quality``, the best first; ``length``, the longest first; ``k-center``, the
            row farthest from all picks (Gonzalez 1985; as a core-set, Sener & Savarese 2018, arXiv 1708.00489);
            ``k-means``, the medoids of ``size`` clusters, the largest cluster's first; ``dedup``, semantic
            de-duplication (Abbas et al. 2023, arXiv 2303.09540): rows in a random order (the best first if there is
            quality), but those as near to a pick as ``threshold``.
        features: (N, D) rows of unit norm.
        size: How many.
        lengths: (N,) for ``length``.
        threshold: Cosine similarity, for ``dedup``.
        seed: Of what is random.

    Raises:
        UserError: What ``greedy_map`` refuses, an unknown method, or one without what it needs.
    """
    if method not in get_args(BaselineName):
        raise UserError(f"there is no baseline {method!r}: use one of {', '.join(get_args(BaselineName))}")
    if size is None and tokens is None:
        raise UserError("no budget: give a size or a number of tokens")
    if not -1.0 < threshold <= 1.0:
        raise UserError(f"the threshold is {threshold}: it is a cosine similarity, above -1 and at most 1")
    similarity = Kernel(kernel, gamma, ridge)
    rows = UnitRows(features, ids, device)
    n = len(rows)
    state = Budget(size, tokens, costs, sources, minimum, maximum, rows_of(exclude, ids, n, "exclude")).state(n)
    scores = check_scores(quality, 1.0, n) if method == "quality" or quality is not None else None
    if method == "length":
        if lengths is None:
            raise UserError("the baseline by length needs lengths: give one number for each row")
        scores = check_scores(lengths, 1.0, n)
    if method == "k-means" and (tokens is not None or minimum or maximum):
        raise UserError("k-means makes as many clusters as picks: it needs a size, and knows neither tokens nor quotas")
    with reporting(progress, state.at_most) as report:
        task = _Task(
            rows, id_order(ids, n), state, scores, threshold, np.random.default_rng(seed), seed, report
        )  # fmt: skip
        picks, stopped = _METHODS[method](task)
    return Selection.of(picks, ordered_log_gains(rows, picks, similarity), stopped, method)


def _random(task: _Task) -> tuple[list[int], str | None]:
    by_id = np.argsort(task.order)
    return in_order(task.state, by_id[task.random.permutation(len(by_id))], task.report), None


def _best(task: _Task) -> tuple[list[int], str | None]:
    assert task.scores is not None
    return in_order(task.state, np.lexsort((task.order, -task.scores)), task.report), None


def _k_center(task: _Task) -> tuple[list[int], str | None]:
    features = task.rows.take()  # (N, D)
    nearest = torch.full((len(features),), 2.0, dtype=torch.float64, device=features.device)  # 1 - cos, to any pick
    picks: list[int] = []
    while not task.state.full:
        gaps = np.where(task.state.eligible, nearest.numpy(force=True), -np.inf)  # (N,)
        farthest = gaps.max()
        if farthest == -np.inf:
            return picks, _stopped(picks, task.state, task.state.why_nothing())
        if farthest <= SAME**2 / 2:  # ||x - y||^2 = 2 (1 - cos)
            return picks, _stopped(picks, task.state, "all that is left are copies of picks")
        tied = np.flatnonzero(gaps >= farthest - 1e-12)
        pick = int(tied[task.order[tied].argmin()])
        task.state.take(pick)
        picks.append(pick)
        torch.minimum(nearest, 1.0 - features @ features[pick], out=nearest)
        if task.report is not None:
            task.report(len(picks), math.nan)
    return picks, None


def _k_means(task: _Task) -> tuple[list[int], str | None]:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    by_id = np.argsort(task.order)
    open_rows = by_id[task.state.eligible[by_id]]
    size = task.state.at_most
    features = task.rows.take(torch.from_numpy(open_rows), torch.float32).numpy(force=True)  # (n, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: said below
        means = KMeans(size, init="random", n_init=1, max_iter=25, random_state=task.seed).fit(features)
    away = ((features - means.cluster_centers_[means.labels_]) ** 2).sum(axis=1)  # (n,)
    nearest = np.lexsort((np.arange(len(away)), away, means.labels_))
    labels, first = np.unique(means.labels_[nearest], return_index=True)
    largest = np.lexsort((labels, -np.bincount(means.labels_)[labels]))
    medoids = open_rows[nearest[first[largest]]]
    picks = in_order(task.state, medoids, task.report)
    if len(picks) < size:
        return picks, _stopped(picks, task.state, "the rows make no more clusters: the rest are copies")
    return picks, None


def _dedup(task: _Task) -> tuple[list[int], str | None]:
    by_id = np.argsort(task.order)
    order = by_id[task.random.permutation(len(by_id))]
    if task.scores is not None:
        order = np.lexsort((task.order, -task.scores))
    kept = torch.empty(0, task.rows.dimension, dtype=torch.float64, device=task.rows.device)  # (k, D)
    picks: list[int] = []
    for start in range(0, len(order), _BLOCK):
        block = order[start : start + _BLOCK]
        features = task.rows.take(torch.from_numpy(block).to(task.rows.device))  # (b, D)
        near = torch.zeros(len(block), dtype=torch.bool, device=features.device)
        for some in kept.split(8 * _BLOCK):
            near |= (features @ some.T >= task.threshold).any(dim=1)
        among = (features @ features.T >= task.threshold).numpy(force=True)  # (b, b)
        blocked = near.numpy(force=True).copy()
        taken = []
        for place, row in enumerate(block.tolist()):
            if task.state.full:
                return picks, None
            if task.state.eligible[row] and not blocked[place]:
                blocked |= among[place]
                taken.append(place)
                task.state.take(row)
                picks.append(row)
                if task.report is not None:
                    task.report(len(picks), math.nan)
        kept = torch.cat([kept, features[taken]])
    if task.state.full:
        return picks, None
    return picks, _stopped(picks, task.state, f"all that is left is as near as {task.threshold:g} to a pick")


def _stopped(picks: list[int], state: BudgetState, why: str) -> str:
    return f"stopped at pick {len(picks) + 1} of {len(picks) + state.left}: {why}"


_METHODS: dict[str, Callable[[_Task], tuple[list[int], str | None]]] = {
    "random": _random,
    "quality": _best,
    "length": _best,
    "k-center": _k_center,
    "k-means": _k_means,
    "dedup": _dedup,
}
