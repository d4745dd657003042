from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.feature_space import FeatureSpaceOracle, Posterior


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("whole", [False, True])
def test_bounds_hold_and_those_of_the_pool_are_near(ridge: float, whole: bool) -> None:
    rows, kernel = UnitRows(sphere(60, 9).astype(np.float32)), Kernel("cosine", ridge=ridge)
    matrix = kernel.matrix(rows.take()).numpy()
    oracle = FeatureSpaceOracle(rows, kernel, 40)
    picks: list[int] = []
    for turn in range(8):  # more picks than dimensions
        working_set = oracle.solve(np.array([turn, turn + 10, turn + 20, turn + 30]))
        for place in (2, 0):
            working_set.pick(place)
            picks.append(int(working_set.rows[place]))
        oracle.commit(working_set)
        inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
        expected = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
        expected[picks] = 0.0
        assert (oracle.bounds >= expected - 1e-12).all()
        wanted = np.setdiff1d(np.arange(60) if whole else np.arange(turn, 60, 3), picks)
        oracle.refine(wanted, np.zeros(len(wanted)))
        assert not oracle.stale[wanted].any()
        np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=2e-5)
        assert (oracle.bounds[picks] == 0).all()
        approximated = oracle.approximate(wanted[1:9])
        assert approximated is not None
        np.testing.assert_allclose(approximated.residuals, expected[wanted[1:9]], atol=2e-5)
        exact = oracle.solve(wanted[:5])
        np.testing.assert_allclose(exact.residuals, expected[wanted[:5]], atol=1e-11)


def test_items_that_missed_some_picks_or_very_many_are_brought_up_to_date_alike() -> None:
    rows, kernel = UnitRows(sphere(200, 8)), Kernel("cosine", ridge=0.1)
    matrix = kernel.matrix(rows.take()).numpy()
    oracle = FeatureSpaceOracle(rows, kernel, 40)
    picks: list[int] = []
    for turn, wanted in enumerate([range(100, 140), range(120, 125), range(130, 180), [150, 199], range(120, 200)]):
        working_set = oracle.solve(np.arange(5 * turn, 5 * turn + 5))
        for place in range(turn + 1):
            working_set.pick(place)
            picks.append(5 * turn + place)
        oracle.commit(working_set)
        items = np.array(wanted)
        oracle.refine(items, np.zeros(len(items)))
        inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
        expected = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
        assert (oracle.bounds[~np.isin(np.arange(200), picks)] >= np.delete(expected, picks) - 1e-12).all()
        np.testing.assert_allclose(oracle.bounds[items], expected[items], atol=2e-5)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
def test_picks_made_elsewhere_are_followed(ridge: float) -> None:
    x = sphere(80, 6)
    rows, others, kernel = UnitRows(x[:60]), UnitRows(x[60:]).take(), Kernel("cosine", ridge=ridge)
    matrix = kernel.matrix(UnitRows(x).take()).numpy()
    oracle = FeatureSpaceOracle(rows, kernel, 40)
    picks: list[int] = []
    for turn in range(6):
        mine = [turn, turn + 20]  # of the rows here; the others are of another place
        picks += [*mine, 60 + 3 * turn, 61 + 3 * turn, 62 + 3 * turn]
        expected = matrix.diagonal() - (
            matrix[picks] * np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
        ).sum(axis=0)
        expected[picks] = 0.0
        sent = np.array([turn, 40 + turn, turn + 20, 50 + turn])
        appended = torch.cat([rows.take(torch.tensor(mine)), others[3 * turn : 3 * turn + 3]])
        oracle.append(appended, Exact(sent, expected[sent], [0, 2]))
        assert oracle.error < 1e-5  # a pick is no measure of it: its copy's residual is not 0
        np.testing.assert_array_equal(oracle.bounds[sent], expected[sent])
        assert not oracle.stale[sent].any()
        assert (oracle.bounds >= expected[:60] - 1e-12).all()
        wanted = np.setdiff1d(np.arange(turn % 3, 60, 2), picks)
        oracle.refine(wanted, np.zeros(len(wanted)))
        np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=2e-5)
    oracle.append(others[:0], Exact.empty())
    np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=2e-5)
    assert not oracle.stale[wanted].any()


def test_a_difference_found_elsewhere_raises_the_error() -> None:
    rows, others, kernel = UnitRows(sphere(60, 6)), UnitRows(sphere(2, 6, 1)).take(), Kernel("cosine")
    oracle = FeatureSpaceOracle(rows, kernel, 40)
    oracle.append(others[:1], Exact.empty())
    oracle.refine(np.arange(60), np.zeros(60))
    oracle.append(others[1:], Exact.empty())  # the pool follows
    assert not oracle.stale.any()
    off = Exact(np.array([3, 4]), oracle.bounds[[3, 4]] + [0.0, 2e-3], [])
    oracle.append(others[:0], off)
    assert oracle.error == pytest.approx(8e-3, rel=1e-2)


def given(kernel: Kernel, items: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """The covariance of items, none of which is a pick."""
    cross = picks @ items.T
    return kernel.matrix(torch.from_numpy(items)).numpy() - cross.T @ np.linalg.solve(
        kernel.matrix(torch.from_numpy(picks)).numpy(), cross
    )


X, OTHERS = sphere(40, 6), sphere(25, 6, 3)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
def test_a_working_set_is_the_covariance_given_the_picks_of_working_sets_and_others(ridge: float) -> None:
    kernel = Kernel("cosine", ridge=ridge)
    posterior = Posterior(UnitRows(X), kernel)
    picks = np.empty((0, 6))
    for turn in range(4):
        working_set = posterior.solve(np.arange(5 * turn, 5 * turn + 5))
        for place in (3, 0):
            working_set.pick(place)
            picks = np.append(picks, X[[5 * turn + place]], axis=0)
        before = posterior.covariance.numpy().copy()
        drop = posterior.commit(working_set).numpy()
        assert drop.shape == (2, 6)
        np.testing.assert_allclose(before - drop.T @ drop, posterior.covariance.numpy(), atol=1e-14)
        before = posterior.covariance.numpy().copy()
        drop = posterior.append(torch.from_numpy(OTHERS[6 * turn : 6 * turn + 6])).numpy()
        np.testing.assert_allclose(before - drop.T @ drop, posterior.covariance.numpy(), atol=1e-14)
        picks = np.append(picks, OTHERS[6 * turn : 6 * turn + 6], axis=0)
        exact = given(kernel, X[30:35], picks)
        np.testing.assert_allclose(posterior.solve(np.arange(30, 35)).residuals, np.diag(exact), atol=1e-11)
    working_set = posterior.solve(np.arange(30, 35))
    working_set.pick(2)
    exact = given(kernel, X[30:35], picks)
    exact = exact - np.outer(exact[2], exact[2]) / exact[2, 2]
    np.testing.assert_allclose(np.delete(working_set.residuals, 2), np.delete(np.diag(exact), 2), atol=1e-11)


def test_nothing_picked_or_appended_changes_nothing() -> None:
    posterior = Posterior(UnitRows(X), Kernel("cosine"))
    assert posterior.commit(posterior.solve(np.arange(4))).shape == (0, 6)
    assert posterior.append(torch.empty(0, 6, dtype=torch.float64)).shape == (0, 6)
    assert posterior.commit(posterior.solve(np.arange(0))).shape == (0, 6)
    assert torch.equal(posterior.covariance, torch.eye(6, dtype=torch.float64))


def test_it_is_refactored_from_the_picks_themselves() -> None:
    posterior = Posterior(UnitRows(X), Kernel("cosine", ridge=0.5))
    posterior.append(torch.from_numpy(OTHERS))
    expected = np.linalg.inv(np.eye(6) + OTHERS.T @ OTHERS / 0.5)
    posterior.covariance += 1e-3  # of rounding, say
    inverse = posterior.refactor().numpy()
    np.testing.assert_allclose(posterior.covariance.numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(inverse.T @ inverse, expected, atol=1e-14)


def test_more_rows_may_come_behind() -> None:
    posterior = Posterior(UnitRows(X[:10]), Kernel("cosine"))
    posterior.append(torch.from_numpy(OTHERS))
    before = posterior.solve(np.array([3, 9])).residuals
    posterior.rows = UnitRows(X)
    after = posterior.solve(np.array([3, 9, 39])).residuals
    np.testing.assert_allclose(after[:2], before, atol=1e-15)
    np.testing.assert_allclose(after[2], given(Kernel("cosine"), X[39:], OTHERS)[0, 0], atol=1e-12)
