from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles.posterior import Posterior


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def given(kernel: Kernel, items: np.ndarray, picks: np.ndarray) -> np.ndarray:
    """The covariance of items, none of which is a pick."""
    cross = picks @ items.T
    return kernel.matrix(torch.from_numpy(items)).numpy() - cross.T @ np.linalg.solve(
        kernel.matrix(torch.from_numpy(picks)).numpy(), cross
    )


X, OTHERS = sphere(40, 6), sphere(25, 6, 3)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
def test_a_front_is_the_covariance_given_the_picks_of_fronts_and_others(ridge: float) -> None:
    kernel = Kernel("cosine", ridge=ridge)
    posterior = Posterior(UnitRows(X), kernel)
    picks = np.empty((0, 6))
    for turn in range(4):
        front = posterior.open(np.arange(5 * turn, 5 * turn + 5))
        for place in (3, 0):
            front.pick(place)
            picks = np.append(picks, X[[5 * turn + place]], axis=0)
        before = posterior.covariance.numpy().copy()
        drop = posterior.close(front).numpy()
        assert drop.shape == (2, 6)
        np.testing.assert_allclose(before - drop.T @ drop, posterior.covariance.numpy(), atol=1e-14)
        before = posterior.covariance.numpy().copy()
        drop = posterior.append(torch.from_numpy(OTHERS[6 * turn : 6 * turn + 6])).numpy()
        np.testing.assert_allclose(before - drop.T @ drop, posterior.covariance.numpy(), atol=1e-14)
        picks = np.append(picks, OTHERS[6 * turn : 6 * turn + 6], axis=0)
        exact = given(kernel, X[30:35], picks)
        np.testing.assert_allclose(posterior.open(np.arange(30, 35)).residuals, np.diag(exact), atol=1e-11)
    front = posterior.open(np.arange(30, 35))
    front.pick(2)
    exact = given(kernel, X[30:35], picks)
    exact = exact - np.outer(exact[2], exact[2]) / exact[2, 2]
    np.testing.assert_allclose(np.delete(front.residuals, 2), np.delete(np.diag(exact), 2), atol=1e-11)


def test_nothing_picked_or_appended_changes_nothing() -> None:
    posterior = Posterior(UnitRows(X), Kernel("cosine"))
    assert posterior.close(posterior.open(np.arange(4))).shape == (0, 6)
    assert posterior.append(torch.empty(0, 6, dtype=torch.float64)).shape == (0, 6)
    assert posterior.close(posterior.open(np.arange(0))).shape == (0, 6)
    assert torch.equal(posterior.covariance, torch.eye(6, dtype=torch.float64))


def test_it_is_factored_anew_from_the_picks_themselves() -> None:
    posterior = Posterior(UnitRows(X), Kernel("cosine", ridge=0.5))
    posterior.append(torch.from_numpy(OTHERS))
    expected = np.linalg.inv(np.eye(6) + OTHERS.T @ OTHERS / 0.5)
    posterior.covariance += 1e-3  # of rounding, say
    inverse = posterior.factor_anew().numpy()
    np.testing.assert_allclose(posterior.covariance.numpy(), expected, atol=1e-14)
    np.testing.assert_allclose(inverse.T @ inverse, expected, atol=1e-14)


def test_more_rows_may_come_behind() -> None:
    posterior = Posterior(UnitRows(X[:10]), Kernel("cosine"))
    posterior.append(torch.from_numpy(OTHERS))
    before = posterior.open(np.array([3, 9])).residuals
    posterior.rows = UnitRows(X)
    after = posterior.open(np.array([3, 9, 39])).residuals
    np.testing.assert_allclose(after[:2], before, atol=1e-15)
    np.testing.assert_allclose(after[2], given(Kernel("cosine"), X[39:], OTHERS)[0, 0], atol=1e-12)
