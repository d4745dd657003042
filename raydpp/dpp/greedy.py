"""Greedy MAP inference of a determinantal point process: the engine's function, and the one for notebooks."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from raydpp.dpp import KernelName, OracleName, Progress
from raydpp.dpp.budget import Budget, Quotas, in_order
from raydpp.dpp.features import Features, Ids, Items, Numbers, UnitRows, rows_of
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import LocalGreedy, Selection
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.choice import choose_oracle, make_oracle

log = logging.getLogger(__name__)


def greedy_map(
    features: Features,
    size: int | float | None = None,
    *,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    quality: Numbers | None = None,
    quality_weight: float = 0.0,
    quality_unit: float = 1.0,
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

    Each pick is the item that adds most to ``(1 - w) log det K_S + w sum_{i in S} u s_i`` (Chen et al. 2018,
    arXiv 1709.05135, sections 3 and 5; for instruction data Wang et al. 2024, arXiv 2402.02318). Greedy is nested:
    every prefix of a selection is the selection for a smaller budget (not with per-source minima, which keep
    places free). Ties, that is differences below rounding (``objective.TIE_RELATIVE``, ``TIE_ABSOLUTE``), fall to
    the smallest id, so the picks depend neither on row order nor on the oracle.

    When all that is left is at or below the numerical floor (``kernels.RESIDUAL_FLOOR``), exact copies of picks or
    a kernel whose rank is used up, the run ends early; ``stopped`` says at which pick and why. With w = 1 diversity
    does not count: it is the top by quality.

    Ctrl-C ends the run and returns the picks so far; a second one is an ordinary KeyboardInterrupt.

    Args:
        features: (N, D) rows of unit norm, of float16, float32 or float64; or of int8 and any norm.
        size: M, how many items: a whole number, a fraction of N below 1, or None if ``tokens`` or ``min_log_gain``
            bounds the run.
        kernel: ``rbf`` or ``cosine``.
        gamma: The rbf's inverse squared length scale, > 0.
        ridge: Added to the kernel's diagonal; None is 0 for ``rbf``, 0.1 for ``cosine``.
        quality: (N,) finite scores s, larger is better, best on the scale of ``objective.standardise``.
        quality_weight: w in [0, 1]; needs ``quality`` unless it is 0.
        quality_unit: What a score of 1 is worth, in nats; of ``scale.residual_spread`` w means the same by any
            kernel.
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
        maximum: At most so many, in the same form.
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
    objective = Objective(Kernel(kernel, gamma, ridge), quality_weight, quality_unit)
    budget = Budget(size, tokens, minimum or {}, maximum or {}, min_log_gain)
    paid = None if costs is None or tokens is None else np.asarray(costs, dtype=np.float64)
    labels = None if sources is None else np.asarray(sources, dtype=np.str_)
    excluded = rows_of(exclude, ids, len(features), "exclude")
    items = Items(features, ids, costs=paid, sources=labels, excluded=excluded)
    items = replace(items, modular=objective.modular(len(items), quality, paid))
    return greedy(items, budget, objective, owned=owned, oracle=oracle, device=device, progress=progress)


def greedy(
    items: Items,
    budget: Budget,
    objective: Objective,
    *,
    owned: Ids | Features | None = None,
    oracle: OracleName = "auto",
    device: torch.device | str | None = None,
    progress: Progress | bool | None = None,
) -> Selection:
    """Greedy MAP over items; ``greedy_map`` says what it does and what it refuses."""
    kernel, n = objective.kernel, len(items)
    rows, owned_rows = _with_owned(items, owned, device)  # (N + O, D), (O,)
    state = budget.state(replace(items, excluded=np.concatenate([items.excluded, owned_rows[owned_rows < n]])))
    extra = len(rows) - n
    state.add_items(np.zeros(extra, dtype=np.int64), np.full(extra, np.inf), eligible=False)
    order = np.concatenate([items.order, np.arange(n, n + extra)])
    modular = np.concatenate([items.modular, np.zeros(extra)])
    most = state.at_most
    with reporting(progress, most) as report:
        if objective.quality_weight == 1.0:
            picks = in_order(state, np.lexsort((order, -modular)), report)
            return Selection.of(picks, ordered_log_gains(rows, picks, kernel, owned_rows), oracle="by quality")
        given = most + len(owned_rows)
        if budget.size is not None:
            kernel.check_budget(given, rows.dimension)
        name = choose_oracle(oracle, kernel, len(rows), rows.dimension, given)
        log.debug("greedy MAP: %s oracle, at most %d of %d items", name, most, n)
        search = LocalGreedy(make_oracle(name, rows, kernel, given), objective, order, modular, state)
        gains = search.picks.log_gains
        try:
            search.condition_on(owned_rows)
            stopped = search.run(report)
        except KeyboardInterrupt:
            if not gains:
                raise
            stopped = f"interrupted after {len(gains)} picks, which are the selection for that budget"
    return Selection.of(search.picks.indices[: len(gains)], gains, stopped, name)


def _with_owned(
    items: Items, owned: Ids | Features | None, device: torch.device | str | None
) -> tuple[UnitRows, np.ndarray]:
    """The items' features with what is owned behind them, unless it is among them, and where that is: (O,) int64."""
    rows = items.unit_rows(device)
    if owned is None or len(owned) == 0:
        return rows, np.empty(0, dtype=np.int64)
    if isinstance(owned, np.ndarray | Tensor) and owned.ndim == 2:
        more = UnitRows(owned, device=rows.device)
        return rows.with_rows(more), np.arange(len(rows), len(rows) + len(more))
    return rows, rows_of(owned, items.ids, len(rows), "owned")


@contextlib.contextmanager
def reporting(progress: Progress | bool | None, total: int) -> Iterator[Progress | None]:
    """What to call after each pick: the function given, one that moves a bar, or nothing."""
    if not isinstance(progress, bool) or not progress:
        yield progress or None
        return
    with tqdm(total=total, desc="greedy MAP", unit=" picks", dynamic_ncols=True) as bar:

        def report(_count: int, gain: float) -> None:
            bar.set_postfix(log_gain=f"{gain:.3f}", refresh=False)
            bar.update()

        yield report
