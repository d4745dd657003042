from __future__ import annotations

import numpy as np
import pytest

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.textbook import TextbookOracle


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.7), Kernel("rbf", ridge=0.2), Kernel("cosine")])
def test_residuals_are_schur_complements(kernel: Kernel) -> None:
    rows = UnitRows(sphere(20, 6))
    matrix = kernel.matrix(rows.take()).numpy()
    oracle = TextbookOracle(rows, kernel, 5)
    assert (oracle.residuals == kernel.variance).all()
    picks: list[int] = []
    for pick in (3, 17, 0, 9, 11):
        oracle.pick(pick)
        picks.append(pick)
        inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
        expected = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
        expected[picks] = 0.0
        np.testing.assert_allclose(oracle.residuals, expected, atol=1e-12)
    assert not oracle.stale.any()


def test_a_pick_at_the_floor_adds_no_direction() -> None:
    x = sphere(6, 4)
    oracle = TextbookOracle(UnitRows(np.concatenate([x, x[:1]])), Kernel(), 3)
    oracle.pick(0)
    before = oracle.residuals.copy()
    oracle.pick(6)
    np.testing.assert_array_equal(oracle.residuals, before)
    assert oracle.residuals[6] <= Kernel().floor
