"""Greedy MAP inference of a determinantal point process: the function for notebooks, and for the jobs."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from raydpp.dpp import OracleName
from raydpp.dpp.budget import Budget, Quotas, in_order
from raydpp.dpp.features import Features, Ids, UnitRows, check_scores, id_order, rows_of
from raydpp.dpp.kernels import Kernel, KernelName
from raydpp.dpp.lazy_greedy import LocalGreedy, Progress, Selection
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.dpp.objective import Objective, modular_term
from raydpp.dpp.oracles.choice import choose_oracle, make_oracle
from raydpp.errors import UserError

log = logging.getLogger(__name__)


def greedy_map(
    features: Features,
    size: int | float | None = None,
    *,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    quality: Sequence[float] | np.ndarray | Tensor | None = None,
    quality_weight: float = 0.0,
    ids: Ids | None = None,
    owned: Ids | Features | None = None,
    exclude: Ids | None = None,
    tokens: float | None = None,
    costs: Sequence[float] | np.ndarray | None = None,
    sources: Sequence[str] | np.ndarray | None = None,
    minimum: Quotas | None = None,
    maximum: Quotas | None = None,
    min_log_gain: float | None = None,
    oracle: OracleName = "auto",
    device: torch.device | str | None = None,
    progress: Progress | bool = False,
) -> Selection:
    """Select a diverse (and good) subset: greedy MAP inference of a determinantal point process.

    Each pick is the item that adds most to ``(1 - w) log det K_S + w sum_{i in S} s_i`` (Chen et al. 2018,
    arXiv 1709.05135, sections 3 and 5; for instruction data Wang et al. 2024, arXiv 2402.02318). Greedy is nested:
    every prefix of a selection is the selection for a smaller budget (not with per-source minima, which keep
    places free). Ties, that is differences below rounding (``objective.TIE_RELATIVE``, ``TIE_ABSOLUTE``), fall to
    the smallest id, so the picks depend neither on row order nor on the oracle.

    When all that is left is at or below the numerical floor (``kernels.RESIDUAL_FLOOR``), exact copies of picks or
    a kernel whose rank is used up, the run ends early; ``stopped`` says at which pick and why. With w = 1 diversity
    does not count: it is the top by quality.

    Ctrl-C ends the run and returns the picks so far; a second one is an ordinary KeyboardInterrupt.

    Args:
        features: (N, D) rows of unit norm; float16, float32 or float64.
        size: M, how many items: a whole number, a fraction of N below 1, or None if ``tokens`` or ``min_log_gain``
            bounds the run.
        kernel: ``rbf`` or ``cosine``.
        gamma: The rbf's inverse squared length scale, > 0.
        ridge: Added to the kernel's diagonal; None is 0 for ``rbf``, 0.1 for ``cosine``.
        quality: (N,) finite scores s, larger is better, best on the scale of ``quality.standardise``.
        quality_weight: w in [0, 1]; needs ``quality`` unless it is 0.
        ids: N distinct strings or integers, for ties and messages; the row index if None.
        owned: What is there already and counts as picked before the first pick: ids of rows of ``features``
            (these are not picked again), or (O, D) features of other rows.
        exclude: Ids of rows never to be picked.
        tokens: The largest sum of ``costs``. An item's gain is then its residual per cost, and what no longer
            fits is passed over.
        costs: (N,) what each item costs, > 0.
        sources: (N,) a label for each item, for the quotas.
        minimum: For sources by name, at least so many items (a fraction below 1 is of ``size``); ``*`` stands for
            every other source.
        maximum: At most so many, likewise.
        min_log_gain: Stop before the first pick whose log gain, in nats, is below this.
        oracle: How gains are computed: ``textbook``, ``cholesky`` (any kernel), ``feature-space`` (cosine with a
            ridge); ``auto`` chooses by kernel and size. All give the same picks.
        device: Where to compute; needs float64.
        progress: True for a progress bar, or a function called after each pick with the number of picks and the
            pick's log gain.

    Raises:
        UserError: A budget out of range or above the kernel's rank, rows that are not finite and of unit
            norm, quality that is missing or not finite, an unknown or repeated id, or an option out of range.
    """
    similarity = Kernel(kernel, gamma, ridge)
    if size is None and tokens is None and min_log_gain is None:
        raise UserError("no budget: give a size, a number of tokens, or a smallest log gain to stop at")
    check_weight(quality_weight)
    rows = UnitRows(features, ids, device)  # (N, D)
    n = len(rows)
    scores = check_scores(quality, quality_weight, n)
    order = id_order(ids, n)
    rows, owned_rows = _with_owned(rows, owned, ids)  # (N + O, D)
    exclude_rows = np.concatenate([owned_rows[owned_rows < n], rows_of(exclude, ids, n, "exclude")])
    state = Budget(size, tokens, costs, sources, minimum, maximum, exclude_rows).state(n)
    counted = None if tokens is None else np.asarray(costs, dtype=np.float64)
    value = modular_term(n, quality_weight, scores, counted)  # (N,)
    extra = len(rows) - n
    state.extend(extra)
    order = np.concatenate([order, np.arange(n, n + extra)])
    value = np.concatenate([value, np.zeros(extra)])
    most = state.at_most
    with reporting(progress, most) as report:
        if quality_weight == 1.0:
            picks = in_order(state, np.lexsort((order, -value)), report)
            return Selection.of(picks, ordered_log_gains(rows, picks, similarity, owned_rows), oracle="by quality")
        if size is not None:
            similarity.check_budget(most + len(owned_rows), rows.dimension)
        name = choose_oracle(oracle, similarity, len(rows), rows.dimension, most + len(owned_rows))
        log.info("greedy MAP: %s oracle, at most %d of %d items", name, most, n)
        search = LocalGreedy(
            make_oracle(name, rows, similarity, most + len(owned_rows)),
            Objective(similarity, 1.0 - quality_weight, value if value.any() else None),
            order,
        )
        try:
            search.condition(owned_rows)
            stopped = search.run(state, -math.inf if min_log_gain is None else min_log_gain, report)
        except KeyboardInterrupt:
            if not search.log_gains:
                raise
            stopped = f"interrupted after {len(search.log_gains)} picks, which are the selection for that budget"
    gains = search.log_gains
    return Selection.of(search.indices[: len(gains)], gains, stopped, name)


def check_weight(weight: float) -> None:
    """Refuse a quality weight out of range."""
    if not 0.0 <= weight <= 1.0:
        raise UserError(f"the quality weight is {weight}: it must lie between 0 (diversity) and 1 (quality)")


def _with_owned(rows: UnitRows, owned: Ids | Features | None, ids: Ids | None) -> tuple[UnitRows, np.ndarray]:
    """The candidates with what is owned behind them, unless it is among them, and where that is: (O,) int64."""
    if owned is None or len(owned) == 0:
        return rows, np.empty(0, dtype=np.int64)
    if isinstance(owned, np.ndarray | Tensor) and owned.ndim == 2:
        more = UnitRows(owned, device=rows.device)
        return rows.with_rows(more), np.arange(len(rows), len(rows) + len(more))
    return rows, rows_of(owned, ids, len(rows), "owned")


@contextlib.contextmanager
def reporting(progress: Progress | bool, total: int) -> Iterator[Progress | None]:
    """What to call after each pick: the function given, one that moves a bar, or nothing."""
    if not isinstance(progress, bool):
        yield progress
        return
    if not progress:
        yield None
        return
    with tqdm(total=total, desc="greedy MAP", unit=" picks", dynamic_ncols=True) as bar:

        def report(_count: int, gain: float) -> None:
            bar.set_postfix(log_gain=f"{gain:.3f}", refresh=False)
            bar.update()

        yield report
