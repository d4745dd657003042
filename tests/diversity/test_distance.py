from __future__ import annotations

import json
import math

import numpy as np
import pytest

from raydpp.diversity.distance import (
    LogDetDistance,
    Subset,
    distance_from_curves,
    greedy_curve,
    log_det_curve,
    log_det_distance,
    projection_error,
    reference_curves,
)
from raydpp.dpp.features import unit_rows
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import RESIDUAL_FLOOR, Kernel, KernelName
from raydpp.errors import UserError

LOG_FLOOR = math.log(RESIDUAL_FLOOR)


def sphere(rows: int, dimension: int, seed: int = 100) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("rbf", 4.0), Kernel("cosine")])
def test_the_curve_is_the_log_det_of_every_prefix(kernel: Kernel) -> None:
    x = sphere(300, 24)  # more than two blocks
    curve = log_det_curve(x, kernel)
    matrix = kernel.matrix(unit_rows(x)).numpy()
    for size in (1, 2, 127, 128, 129, 300):
        assert curve[size - 1] == pytest.approx(np.linalg.slogdet(matrix[:size, :size])[1], abs=1e-8)


def test_a_copy_counts_as_the_floor_and_changes_nothing_after_it() -> None:
    x = sphere(400, 30)
    where = [1, 3, 200, 399]  # in the block of what it copies, and in a later one
    copied = np.insert(x, where, x[0], axis=0)
    is_copy = np.zeros(len(copied), bool)
    is_copy[np.array(where) + np.arange(4)] = True
    gains = np.diff(log_det_curve(copied, Kernel()), prepend=0.0)
    np.testing.assert_allclose(gains[is_copy], LOG_FLOOR)
    np.testing.assert_allclose(gains[~is_copy], np.diff(log_det_curve(x, Kernel()), prepend=0.0), atol=1e-9)


@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
def test_the_greedy_curve_is_the_curve_of_the_picks(kernel: KernelName) -> None:
    x = sphere(80, 10)
    chosen = greedy_map(x, 30, kernel=kernel)
    np.testing.assert_allclose(
        greedy_curve(chosen.log_gains, 30, Kernel(kernel)),
        log_det_curve(x[chosen.indices], Kernel(kernel)),
        atol=1e-9,
    )


def test_reference_points_are_unit_seeded_and_nested() -> None:
    kernel = Kernel()
    curves = reference_curves(40, 16, kernel, [3, 4])
    assert curves.shape == (2, 40)
    np.testing.assert_array_equal(curves, reference_curves(40, 16, kernel, [3, 4]))
    np.testing.assert_allclose(reference_curves(10, 16, kernel, [4])[0], curves[1, :10], atol=1e-12)
    assert abs(curves[0, -1] - curves[1, -1]) > 1e-6
    np.testing.assert_allclose(curves[0], log_det_curve(sphere(40, 16, seed=3), kernel))


def test_mean_and_std_are_over_all_pairs_of_a_draw_and_a_reference() -> None:
    draws = np.array([[0.0, -1.0], [0.0, -3.0]])
    references = np.array([[0.0, -0.5, -9.0], [0.0, -0.1, -9.0], [0.0, -0.3, -9.0]])
    result = distance_from_curves(draws, references, subset="uniform", kernel=Kernel())
    pairs = [(r - s) / 2 for r in (-0.5, -0.1, -0.3) for s in (-1.0, -3.0)]
    assert result.mean == pytest.approx(np.mean(pairs))
    assert result.std == pytest.approx(np.std(pairs))
    assert result.sizes.tolist() == [1, 2]
    assert result.means[0] == result.stds[0] == 0.0
    assert (result.size, result.subset, result.floored) == (2, "uniform", 0)


def test_what_the_halves_differ_by_is_the_distances_error() -> None:
    """Points in a space of many dimensions, seen through random projections to few of them."""
    random = np.random.default_rng(0)
    x = random.standard_normal((30, 300)) + 0.6 * random.standard_normal(300)
    kernel = Kernel("rbf", 0.5)
    exact = log_det_curve(unit_rows(x / np.linalg.norm(x, axis=1, keepdims=True)), kernel)[-1]
    moved, told = [], []
    for _ in range(60):
        y = x @ random.standard_normal((300, 512))
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        moved.append((log_det_curve(y, kernel)[-1] - exact) / 30)
        told.append(projection_error(y, kernel) or 0.0)
    assert np.mean(told) == pytest.approx(np.sqrt(np.mean(np.square(moved))), rel=0.5)
    assert projection_error(y[:1], kernel) is None
    assert projection_error(np.repeat(y[:1], 3, axis=0), kernel) is None  # copies: the matrix is singular
    assert projection_error(np.zeros((4001, 2)), kernel) is None


@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
def test_points_of_the_sphere_are_at_distance_0(kernel: KernelName) -> None:
    uniform = log_det_distance(sphere(1000, 32), 200, subset="uniform", kernel=kernel, draws=5)
    assert abs(uniform.mean) < 0.01
    assert 0 < uniform.std < 0.01
    greedy = log_det_distance(sphere(1000, 32), 200, kernel=kernel)
    assert greedy.mean < uniform.mean  # well-chosen points of many beat as many random ones


@pytest.mark.parametrize("subset", ["greedy", "uniform"])
def test_the_more_clustered_the_set_the_larger_the_distance(subset: Subset) -> None:
    centres, noise = sphere(10, 32)[np.arange(300) % 10], sphere(300, 32, seed=1)
    distances = []
    for spread in (0.05, 0.5, 50.0):
        x = centres + spread * noise
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        distances.append(log_det_distance(x, 100, subset=subset).mean)
    assert distances[0] > distances[1] + 0.1 > distances[2] + 0.2


@pytest.mark.parametrize("subset", ["greedy", "uniform"])
def test_a_set_of_copies_has_a_finite_distance_and_says_how_many(subset: Subset) -> None:
    x = np.tile(sphere(20, 32), (3, 1))
    result = log_det_distance(x, 60, subset=subset)
    assert result.floored == 40
    expected = reference_curves(60, 32, Kernel(), range(5))[:, -1].mean() - 40 * LOG_FLOOR
    expected -= log_det_curve(sphere(20, 32), Kernel())[-1]
    assert result.mean == pytest.approx(expected / 60)
    json.dumps({"means": result.means.tolist(), "std": result.std}, allow_nan=False)
    if subset == "greedy":  # the room that the distinct rows span shows in the curve
        assert result.means[19] == pytest.approx(log_det_distance(sphere(20, 32), 20).mean)


def test_the_curve_holds_the_distance_of_every_smaller_size() -> None:
    x = sphere(50, 8)
    for subset in ("greedy", "uniform"):
        whole = log_det_distance(x, 30, subset=subset)
        part = log_det_distance(x, 12, subset=subset)
        assert whole.means[-1] == whole.mean
        assert whole.means[11] == pytest.approx(part.mean)
        assert whole.stds[11] == pytest.approx(part.std)


def test_draws_depend_on_the_seed_alone() -> None:
    x = sphere(100, 8)
    first = log_det_distance(x, 20, subset="uniform", seed=1)
    assert log_det_distance(x, 20, subset="uniform", seed=1).mean == first.mean
    assert log_det_distance(x, 20, subset="uniform", seed=2).mean != first.mean
    both = log_det_distance(x, 20, subset="uniform", seed=1, draws=2)
    assert both.mean != first.mean
    assert both.std > first.std


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 11}, "larger than the pool of 10"),
        ({"size": 11, "subset": "uniform"}, "larger than the pool of 10"),
        ({"size": 4, "kernel": "cosine", "ridge": 0.0}, "rank at most 3"),
        ({"size": 2, "subset": "random"}, "no subset 'random'"),
        ({"size": 2, "subset": "uniform", "draws": 0}, "0 draws"),
        ({"size": 2, "reference_seeds": ()}, "at least one reference seed"),
    ],
)
def test_a_mistake_is_refused(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        log_det_distance(sphere(10, 3), **arguments)


def test_rows_that_are_not_finite_are_refused_by_id() -> None:
    x = sphere(3, 3)
    x[1, 1] = np.nan
    with pytest.raises(UserError, match="ids b"):
        log_det_distance(x, 2, ids=["a", "b", "c"])


def test_small_gains_are_left_out_of_both_sums() -> None:
    x = np.concatenate([sphere(30, 6), sphere(30, 6)[:4]])  # four copies
    kernel = Kernel("rbf", 0.3)
    gains = np.diff(log_det_curve(x, kernel), prepend=0.0)
    reference = np.diff(reference_curves(34, 6, kernel, [0, 1]), axis=1, prepend=0.0)
    for least in (-2.0, -7.0):
        kept = [np.where(one < least, 0.0, one).sum() for one in (gains, *reference)]
        found = distance_from_curves(
            log_det_curve(x, kernel)[None],
            reference.cumsum(1),
            subset="uniform",
            kernel=kernel,
            drop_below=least,
        )
        assert found.mean == pytest.approx((np.mean(kept[1:]) - kept[0]) / 34)
        assert found.floored == 4
    whole = log_det_distance(x, 34, gamma=0.3)
    dropped = log_det_distance(x, 34, gamma=0.3, drop_below=-7.0)
    assert dropped.mean < whole.mean - 1  # the copies' floors are gone


def test_the_probability_that_one_is_more_diverse_goes_by_both_errors() -> None:
    curves, reference = -np.arange(1.0, 11)[None], np.zeros((1, 10))

    def measured(scale: float, error: float | None, sampling: float | None) -> LogDetDistance:
        return distance_from_curves(
            scale * curves, reference, subset="greedy", kernel=Kernel(), error=error, sampling=sampling
        )

    one, two = measured(1.0, 0.3, 0.4), measured(1.5, None, 1.2)
    assert (one.uncertainty, two.uncertainty) == pytest.approx((0.5, 1.2))
    assert (one.mean, two.mean) == pytest.approx((1.0, 1.5))
    draws = np.random.default_rng(0).standard_normal((2, 200_000))
    share = np.mean(1.0 + 0.5 * draws[0] < 1.5 + 1.2 * draws[1])
    assert one.probability_below(two) == pytest.approx(share, abs=0.005)
    assert two.probability_below(one) == pytest.approx(1 - one.probability_below(two))
    assert measured(1.0, None, None).probability_below(measured(2.0, None, None)) == 0.5
