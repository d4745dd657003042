from __future__ import annotations

import numpy as np
import pytest

from raydpp.diversity.redundancy import prune_rank, redundancy
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.errors import UserError


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    points[:, 0] += 1.5
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def dense(one: np.ndarray, other: np.ndarray, kernel: Kernel) -> np.ndarray:
    cosines = one @ other.T
    return np.exp(2 * kernel.gamma * (cosines - 1)) if kernel.name == "rbf" else cosines


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.7), Kernel("rbf", 4.0), Kernel("cosine")])
@pytest.mark.parametrize("rows", [5, 1500])  # less and more than a block
def test_what_is_explained_is_the_variance_less_the_conditional_one(kernel: Kernel, rows: int) -> None:
    x, picks = sphere(rows, 8), sphere(20, 8, seed=1)
    found = redundancy(x, picks, kernel)
    inner = dense(picks, picks, kernel)
    np.fill_diagonal(inner, kernel.variance)
    across = dense(x, picks, kernel)
    expected = np.einsum("ij,ji->i", across, np.linalg.solve(inner, across.T)) / kernel.variance
    np.testing.assert_allclose(found.explained, expected, atol=1e-9)
    np.testing.assert_array_equal(found.nearest, (x @ picks.T).argmax(1))
    np.testing.assert_allclose(found.cosine, (x @ picks.T).max(1), atol=1e-12)


def test_copies_are_explained_whole_and_copies_among_the_picks_break_nothing() -> None:
    x = sphere(30, 6)
    picks = x[[3, 4, 3, 5, 5]]
    found = redundancy(x, picks, Kernel())
    once = redundancy(x, x[[3, 4, 5]], Kernel())
    np.testing.assert_allclose(found.explained, once.explained, atol=1e-9)
    np.testing.assert_allclose(found.explained[[3, 4, 5]], 1)
    assert found.nearest[[3, 4, 5]].tolist() == [0, 1, 3]  # the first of equal ones
    assert (found.explained[:3] < 1).all()
    assert ((found.explained >= 0) & (found.explained <= 1)).all()


def test_rows_of_whole_numbers_stand_for_their_directions() -> None:
    x = np.rint(sphere(40, 16) * 50).astype(np.int8)
    unit = x / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    whole, rounded = redundancy(unit, unit[:6], Kernel()), redundancy(x, x[:6], Kernel())
    np.testing.assert_allclose(rounded.explained, whole.explained, atol=1e-9)
    with pytest.raises(UserError, match=r"of zeros \(ids b\)"):
        redundancy(np.array([[1, 0], [0, 0]], np.int8), x[:1, :2], Kernel(), ids=["a", "b"])


def test_the_next_pick_is_the_one_that_is_explained_least() -> None:
    x = sphere(50, 6)
    picks = greedy_map(x, 11).indices
    found = redundancy(x, x[picks[:10]], Kernel())
    left = np.setdiff1d(np.arange(50), picks[:10])
    assert left[found.explained[left].argmin()] == picks[10]


def test_from_the_pruning_rank_on_all_are_below_a_share_of_the_variance() -> None:
    gains = np.log([1.0, 0.6, 0.3, 0.25, 0.05])
    assert [prune_rank(gains, Kernel(), share) for share in (0.7, 0.3, 0.26, 0.1, 0.01)] == [2, 4, 4, 5, None]
    assert prune_rank(gains, Kernel("cosine", ridge=0.1), 0.58) == 2  # 0.6 of 1.1
    assert prune_rank(np.empty(0), Kernel(), 0.5) is None
    assert prune_rank(np.log([0.9, 0.1, 0.8, 0.2, 0.1]), Kernel(), 0.5) == 4  # in another order than that of gains
    assert prune_rank(np.log([0.2, 0.1]), Kernel(), 0.5) == 1
