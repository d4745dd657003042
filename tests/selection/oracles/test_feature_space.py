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
        oracle.refresh(wanted)
        assert not oracle.stale[wanted].any()
        np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=2e-5)
        assert (oracle.bounds[picks] == 0).all()
        exact = oracle.open(wanted[:5])
        np.testing.assert_allclose(exact.residuals, expected[wanted[:5]], atol=1e-11)
