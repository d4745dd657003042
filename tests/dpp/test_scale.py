from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial.distance import pdist
from scipy.stats import median_abs_deviation

from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.scale import MOST_PICKS, PAIRS_OF, median_gamma, residual_spread


def sphere(rows: int, dimension: int, seed: int = 0, near: float = 0.0) -> np.ndarray:
    """Unit rows, which lie the nearer to one another the larger ``near`` is."""
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    points[:, 0] += near * np.sqrt(dimension)
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("near", [0.0, 1.0, 5.0])
def test_gamma_is_two_over_the_median_squared_distance(near: float) -> None:
    rows = sphere(80, 12, near=near)
    assert median_gamma(rows) == pytest.approx(2 / np.median(pdist(rows, "sqeuclidean")), rel=0.05)
    assert median_gamma(rows.astype(np.float16)) == pytest.approx(median_gamma(rows), rel=0.05)
    assert median_gamma(np.rint(rows * 40).astype(np.int8)) == pytest.approx(median_gamma(rows), rel=0.1)


def test_gamma_has_two_digits_and_comes_from_all_over_the_rows() -> None:
    rows = np.concatenate([sphere(PAIRS_OF, 5), sphere(4 * PAIRS_OF, 5, near=9)])
    gamma = median_gamma(rows)
    assert gamma == float(f"{gamma:.2g}") == pytest.approx(median_gamma(rows[::-1]), rel=0.05)
    assert gamma > 5 * median_gamma(rows[:PAIRS_OF])
    assert median_gamma(rows[:1]) == 1.0


def test_copies_do_not_count() -> None:
    rows = sphere(9, 5)
    assert median_gamma(np.repeat(rows, 5, axis=0)) == median_gamma(rows)
    assert median_gamma(np.repeat(rows[:1], 4, axis=0)) == 1.0


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.3), Kernel("rbf", 3.0), Kernel("cosine")])
@pytest.mark.parametrize("size", [1, 7, 400])
def test_the_spread_is_that_of_the_log_variances_left(kernel: Kernel, size: int) -> None:
    rows = sphere(60, 6, near=0.5)
    rows = np.concatenate([rows, rows[:5]])  # copies have no variance left, and do not count
    count = min(size, len(rows) // 2)
    picks = greedy_map(rows, count, kernel=kernel.name, gamma=kernel.gamma, ridge=kernel.ridge).indices
    cosines = rows @ rows.T
    full = np.exp(2 * kernel.gamma * (cosines - 1)) if kernel.name == "rbf" else cosines.copy()
    np.fill_diagonal(full, kernel.variance)
    left = [row for row in range(len(rows)) if row not in picks]
    across = full[np.ix_(picks, np.array(left))]
    residuals = np.diag(full)[left] - (across * np.linalg.solve(full[np.ix_(picks, picks)], across)).sum(0)
    logs = np.log(residuals[residuals > 1e-9])
    assert residual_spread(rows, size, kernel) == pytest.approx(median_abs_deviation(logs, scale="normal"), rel=6e-3)


def test_with_the_spread_as_unit_a_weight_means_the_same_at_any_gamma() -> None:
    rows, quality = sphere(400, 12, near=0.7), np.random.default_rng(5).standard_normal(400)

    def reached(gamma: float, unit: float) -> float:
        picks = greedy_map(rows, 40, gamma=gamma, quality=quality, quality_weight=0.5, quality_unit=unit).indices
        return float(quality[picks].mean() / np.sort(quality)[-40:].mean())

    gammas = (0.1, 0.5, 2.0)
    by_spread = [reached(gamma, residual_spread(rows, 40, Kernel("rbf", gamma))) for gamma in gammas]
    by_nats = [reached(gamma, 1.0) for gamma in gammas]
    assert 0.5 < min(by_spread) < max(by_spread) < 0.75
    assert min(by_nats) > 0.9  # whatever the weight's half of it, diversity does not count


def test_the_spread_is_one_where_nothing_is_told_apart() -> None:
    assert residual_spread(np.eye(12), 4, Kernel()) == 1.0


def test_no_more_picks_are_made_than_tell() -> None:
    rows = sphere(3 * MOST_PICKS, 4)
    assert residual_spread(rows, 10**9, Kernel()) == residual_spread(rows, MOST_PICKS, Kernel())
