"""Baselines to compare greedy MAP with: the same interface, the same output."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch

from raydpp.dpp import BaselineName, KernelName, Progress
from raydpp.dpp.budget import Budget, BudgetState, Quotas, in_order
from raydpp.dpp.features import Features, Ids, Items, Numbers, UnitRows, rows_of
from raydpp.dpp.greedy import reporting
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.dpp.objective import check_scores
from raydpp.errors import UserError, checked_seed

SAME = 1e-6
"""Unit rows nearer to each other than this are copies to k-center."""

MOST_COVERED = 20_000
"""Facility location holds the similarities of so many rows with one another, round-robin as many numbers: 1.6 GB of
float32."""

_BLOCK = 1024  # rows compared together
_POOL = 64  # candidates brought up to date together


def baseline(
    method: BaselineName,
    features: Features,
    size: int | float | None = None,
    *,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    quality: Numbers | None = None,
    lengths: Numbers | None = None,
    ids: Ids | None = None,
    exclude: Ids | None = None,
    tokens: float | None = None,
    costs: Sequence[float] | np.ndarray | None = None,
    sources: Sequence[str] | np.ndarray | None = None,
    minimum: Quotas | None = None,
    maximum: Quotas | None = None,
    threshold: float = 0.95,
    targets: Features | Sequence[Features] | None = None,
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
            ``k-means``, the medoids of ``size`` clusters, the largest cluster's first; ``facility-location``, greedy
            for the sum over all rows of the cosine with the nearest pick, or 0 (Lin & Bilmes 2011, "A class of
            submodular functions for document summarization"), of at most 20,000 rows; ``dedup``, semantic
            de-duplication (Abbas et al. 2023, arXiv 2303.09540): rows in a random order (the best first if there is
            quality), but those as near to a pick as ``threshold``; ``round-robin``, for each row of ``targets`` in turn
            the nearest row that is not picked yet, or where there are several tasks, for each task in turn that which
            is nearest to any of its rows (RDS+, Ivison et al. 2025, arXiv 2503.01807, and its public code); of at most
            400 million cosines, one for each turn and row.
        features: (N, D) rows of unit norm.
        size: How many.
        lengths: (N,) for ``length``.
        threshold: Cosine similarity, for ``dedup``.
        targets: (T, D) rows of unit norm, for ``round-robin``, or a list of them, one for each task. Turns go in their
            order.
        seed: Of what is random.

    Raises:
        UserError: What ``greedy_map`` refuses, an unknown method, or one without what it needs.
    """
    budget = Budget(size, tokens, minimum or {}, maximum or {})
    paid = None if costs is None or tokens is None else np.asarray(costs, dtype=np.float64)
    labels = None if sources is None else np.asarray(sources, dtype=np.str_)
    excluded = rows_of(exclude, ids, len(features), "exclude")
    items = Items(features, ids, costs=paid, sources=labels, excluded=excluded)
    similarity = Kernel(kernel, gamma, ridge)
    return pick(method, items, budget, similarity, quality, lengths, threshold, targets, seed, device, progress)


def pick(
    method: BaselineName,
    items: Items,
    budget: Budget,
    kernel: Kernel,
    quality: Numbers | None = None,
    lengths: Numbers | None = None,
    threshold: float = 0.95,
    targets: Features | Sequence[Features] | None = None,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: Progress | bool = False,
) -> Selection:
    """Select a subset of items by a baseline; ``baseline`` says what it does and what it refuses."""
    if method not in get_args(BaselineName):
        raise UserError(f"there is no baseline {method!r}: use one of {', '.join(get_args(BaselineName))}")
    if budget.size is None and budget.tokens is None:
        raise UserError("no budget: give a size or a number of tokens")
    checked_seed("the seed", seed)
    if not -1.0 < threshold <= 1.0:
        raise UserError(f"the threshold is {threshold}: it is a cosine similarity, above -1 and at most 1")
    if method == "k-means" and (budget.tokens is not None or budget.minimum or budget.maximum):
        raise UserError("k-means makes as many clusters as picks: it needs a size, and knows neither tokens nor quotas")
    if method == "length" and lengths is None:
        raise UserError("the baseline by length needs lengths: give one number for each row")
    if method == "round-robin" and (targets is None or not len(targets)):
        raise UserError("round-robin takes turns over the rows of a target: give targets")
    counted = lengths if method == "length" else quality
    scores = None if counted is None and method != "quality" else check_scores(counted, 1.0, len(items))
    rows, state = items.unit_rows(device), budget.state(items)
    with reporting(progress, state.at_most) as report:
        task = _Task(rows, items.order, state, scores, threshold, targets, seed)
        picks = in_order(state, _METHODS[method](task), report)
    ended = task.why is not None and not state.full
    stopped = f"stopped at pick {len(picks) + 1} of {len(picks) + state.left}: {task.why}" if ended else None
    return Selection.of(picks, ordered_log_gains(rows, picks, kernel), stopped, method)


@dataclass(eq=False)
class _Task:
    rows: UnitRows
    order: np.ndarray  # (N,) the rank of each id
    state: BudgetState
    scores: np.ndarray | None  # (N,)
    threshold: float
    targets: Features | Sequence[Features] | None  # (T, D) each
    seed: int
    why: str | None = None  # there are no more picks


def _random(task: _Task) -> np.ndarray:
    by_id = np.argsort(task.order)
    return by_id[np.random.default_rng(task.seed).permutation(len(by_id))]


def _best(task: _Task) -> np.ndarray:
    assert task.scores is not None
    return np.lexsort((task.order, -task.scores))


def _k_center(task: _Task) -> Iterator[int]:
    features = task.rows.take()  # (N, D)
    nearest = torch.full((len(features),), 2.0, dtype=torch.float64, device=features.device)  # 1 - cos, to any pick
    while not task.state.full:
        gaps = np.where(task.state.eligible, nearest.numpy(force=True), -np.inf)  # (N,)
        farthest = gaps.max()
        if farthest == -np.inf:
            task.why = task.state.why_nothing()
            return
        if farthest <= SAME**2 / 2:  # ||x - y||^2 = 2 (1 - cos)
            task.why = "all that is left are copies of picks"
            return
        tied = np.flatnonzero(gaps >= farthest - 1e-12)
        pick = int(tied[task.order[tied].argmin()])
        torch.minimum(nearest, 1.0 - features @ features[pick], out=nearest)
        yield pick


def _k_means(task: _Task) -> np.ndarray:
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    by_id = np.argsort(task.order)
    allowed = by_id[task.state.eligible[by_id]]
    size = task.state.at_most
    features = task.rows.take(torch.from_numpy(allowed), torch.float32).numpy(force=True)  # (n, D)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters: said below
        means = KMeans(size, init="random", n_init=1, max_iter=25, random_state=task.seed).fit(features)
    away = ((features - means.cluster_centers_[means.labels_]) ** 2).sum(axis=1)  # (n,)
    nearest = np.lexsort((np.arange(len(away)), away, means.labels_))
    labels, first = np.unique(means.labels_[nearest], return_index=True)
    if len(labels) < size:
        task.why = "the rows make no more clusters: the rest are copies"
    largest = np.lexsort((labels, -np.bincount(means.labels_)[labels]))
    return allowed[nearest[first[largest]]]  # the medoids


def _facility_location(task: _Task) -> Iterator[int]:
    count, state = len(task.order), task.state
    if count > MOST_COVERED:
        raise UserError(
            f"facility location holds {count:,} x {count:,} numbers: give at most {MOST_COVERED:,} rows, or another"
            " method"
        )
    features = task.rows.take(dtype=torch.float32)  # (N, D)
    similarity = (features @ features.T).clamp_(min=0)  # (N, N)
    similarity.masked_fill_(similarity > 1 - SAME, 1.0)  # copies are as near as the row itself
    covered = torch.zeros(count, device=features.device)  # (N,): of each row, with the nearest pick

    def gains(rows: np.ndarray) -> np.ndarray:
        index = torch.from_numpy(rows).to(features.device)
        more = similarity.index_select(0, index).sub_(covered).clamp_(min=0)  # (n, N)
        return more.sum(1, dtype=torch.float64).numpy(force=True)

    bounds = np.concatenate([gains(rows) for rows in np.split(np.arange(count), range(_BLOCK, count, _BLOCK))])
    while not state.full:
        # Gains only fall (Minoux 1978): those that were exact once bound what they are now.
        bounds[~state.eligible] = -np.inf
        stale = state.eligible.copy()
        if not stale.any():
            task.why = state.why_nothing()
            return
        best = -np.inf
        while (rows := np.flatnonzero(stale & (bounds >= best - SAME))).size:
            rows = rows[np.argsort(-bounds[rows], kind="stable")[:_POOL]]
            bounds[rows], stale[rows] = gains(rows), False
            best = max(best, bounds[rows].max())
        if best <= SAME * count:
            task.why = "all that is left are copies of picks"
            return
        tied = np.flatnonzero(~stale & (bounds >= best - SAME))
        pick = int(tied[task.order[tied].argmin()])
        torch.maximum(covered, similarity[pick], out=covered)
        yield pick


def _dedup(task: _Task) -> Iterator[int]:
    order = _random(task) if task.scores is None else _best(task)
    kept = torch.empty(0, task.rows.dimension, dtype=torch.float64, device=task.rows.device)  # (k, D)
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
            if task.state.eligible[row] and not blocked[place]:
                blocked |= among[place]
                taken.append(place)
                yield row
        kept = torch.cat([kept, features[taken]])
    task.why = f"all that is left is as near as {task.threshold:g} to a pick"


def _round_robin(task: _Task) -> Iterator[int]:
    assert task.targets is not None
    given = [task.targets] if isinstance(task.targets, Features) else task.targets
    tasks = [UnitRows(one, device=task.rows.device).take(dtype=torch.float32) for one in given]  # (t, D) each
    for one in tasks:
        if one.shape[1] != task.rows.dimension:
            raise UserError(
                f"the targets have {one.shape[1]} dimensions and the rows {task.rows.dimension}: they must be features"
                " of the same kind"
            )
    # One task's rows take turns; of several tasks, each takes one, by the nearest of its rows.
    sizes = [1] * len(tasks[0]) if len(tasks) == 1 else [len(one) for one in tasks]  # (turns,)
    count = len(task.order)
    if len(sizes) * count > MOST_COVERED**2:
        raise UserError(
            f"round-robin holds {len(sizes):,} x {count:,} numbers, at most {MOST_COVERED**2:,}: give fewer targets, or"
            " another method"
        )
    targets, cosines = torch.cat(tasks), np.empty((len(sizes), count), np.float32)  # (T, D), (turns, N)
    for start in range(0, count, _BLOCK):
        some = slice(start, start + _BLOCK)
        near = targets @ task.rows.take(some, torch.float32).T  # (T, b)
        cosines[:, some] = torch.stack([turn.amax(0) for turn in near.split(sizes)]).numpy(force=True)
    # RDS+'s code lets a turn pass where its nearest row is picked already; here it takes the next nearest.
    for turn in itertools.cycle(cosines):
        if not task.state.eligible.any():
            task.why = task.state.why_nothing()
            return
        nearest = np.where(task.state.eligible, turn, -np.inf)  # (N,)
        tied = np.flatnonzero(nearest >= nearest.max() - SAME)
        yield int(tied[task.order[tied].argmin()])


_METHODS: dict[str, Callable[[_Task], Iterable[int]]] = {
    "random": _random,
    "quality": _best,
    "length": _best,
    "k-center": _k_center,
    "k-means": _k_means,
    "facility-location": _facility_location,
    "dedup": _dedup,
    "round-robin": _round_robin,
}
