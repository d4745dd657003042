from __future__ import annotations

import numpy as np
import pytest

from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles.feature_space import FeatureSpace


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("ridge", [1e-3, 0.1, 2.0])
@pytest.mark.parametrize("whole", [False, True])
def test_bounds_hold_and_those_of_the_pool_are_near(ridge: float, whole: bool) -> None:
    rows, kernel = UnitRows(sphere(60, 9).astype(np.float32)), Kernel("cosine", ridge=ridge)
    matrix = kernel.matrix(rows.take()).numpy()
    oracle = FeatureSpace(rows, kernel)
    picks: list[int] = []
    for turn in range(8):  # more picks than dimensions
        front = oracle.open(np.array([turn, turn + 10, turn + 20, turn + 30]))
        for place in (2, 0):
            front.pick(place)
            picks.append(int(front.rows[place]))
        oracle.close(front)
        inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
        expected = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
        expected[picks] = 0.0
        assert (oracle.bounds >= expected - 1e-12).all()
        wanted = np.setdiff1d(np.arange(60) if whole else np.arange(turn, 60, 3), picks)
        oracle.refine(wanted, np.zeros(len(wanted)))
        assert not oracle.stale[wanted].any()
        np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=2e-5)
        assert (oracle.bounds[picks] == 0).all()
        scout = oracle.scout(wanted[1:9])
        assert scout is not None
        np.testing.assert_allclose(scout.residuals, expected[wanted[1:9]], atol=2e-5)
        exact = oracle.open(wanted[:5])
        np.testing.assert_allclose(exact.residuals, expected[wanted[:5]], atol=1e-11)


def test_items_that_missed_some_picks_or_very_many_are_brought_up_to_date_alike() -> None:
    rows, kernel = UnitRows(sphere(200, 8)), Kernel("cosine", ridge=0.1)
    matrix = kernel.matrix(rows.take()).numpy()
    oracle = FeatureSpace(rows, kernel)
    picks: list[int] = []
    for turn, wanted in enumerate([range(100, 140), range(120, 125), range(130, 180), [150, 199], range(120, 200)]):
        front = oracle.open(np.arange(5 * turn, 5 * turn + 5))
        for place in range(turn + 1):
            front.pick(place)
            picks.append(5 * turn + place)
        oracle.close(front)
        items = np.array(wanted)
        oracle.refine(items, np.zeros(len(items)))
        inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
        expected = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
        assert (oracle.bounds[~np.isin(np.arange(200), picks)] >= np.delete(expected, picks) - 1e-12).all()
        np.testing.assert_allclose(oracle.bounds[items], expected[items], atol=2e-5)
