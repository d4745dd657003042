"""The scale of a kernel, and of quality beside it, from a sample of the features."""

from __future__ import annotations

import numpy as np
import torch

from raydpp.dpp.budget import Budget
from raydpp.dpp.features import Features, Items, unit_rows
from raydpp.dpp.greedy import greedy
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective, robust_scale

PAIRS_OF = 1_000
"""The rows whose pairs tell the median distance: half a million of them."""

_COPY = 1e-6  # squared distance

MOST_PICKS = 500
"""The most picks that ``residual_spread`` makes."""


def median_gamma(features: Features) -> float:
    """The gamma of an rbf kernel at which the similarity of two rows at the median distance is exp(-2) = 0.14.

    The median heuristic (Gretton et al. 2012, "A kernel two-sample test", section 8): the length scale goes by the
    median distance between two rows, here of ``PAIRS_OF`` from all over (n, D), so that features of any spread are told
    apart alike. The factor is the one of 1/2, 1, 2, 4 at which greedy selections of three tables lose least by the
    kernels of the others (``tests/benchmarks/gamma.py``). Copies do not count; of nothing else it is 1. Two digits.
    """
    rows = unit_rows(features[np.linspace(0, len(features) - 1, min(len(features), PAIRS_OF)).astype(np.int64)])
    squares = 2.0 - 2.0 * (rows @ rows.T).numpy(force=True)[np.triu_indices(len(rows), 1)]
    squares = squares[squares > _COPY]
    return float(f"{2.0 / np.median(squares):.2g}") if len(squares) else 1.0


def residual_spread(features: Features, size: int, kernel: Kernel) -> float:
    """By how much diversity tells examples apart at the budget: the spread of log residuals, in nats.

    Of what greedy leaves of (n, D) rows after ``size`` picks, at most ``MOST_PICKS`` and half of the rows, by the
    robust deviation of quality (``objective.robust_scale``), to three digits. 1 where they do not differ: any unit
    serves then.
    """
    rows = unit_rows(features)  # (n, D)
    count = max(1, min(size, len(rows) // 2, MOST_PICKS))
    picks = greedy(Items(features), Budget(count), Objective(kernel)).indices  # (m,)
    left = np.setdiff1d(np.arange(len(rows)), picks)
    factor = torch.linalg.cholesky(kernel.matrix(rows[picks]))  # (m, m)
    known = torch.linalg.solve_triangular(factor, kernel.cross(rows[picks], rows[left]), upper=False)  # (m, n - m)
    residuals = (kernel.variance - known.square().sum(0)).numpy(force=True)
    residuals = residuals[residuals > kernel.floor]  # copies of picks are not there to be picked
    return float(f"{robust_scale(np.log(residuals))[1]:.3g}") or 1.0
