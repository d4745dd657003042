from __future__ import annotations

import numpy as np
import torch

from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles.cholesky_pool import CholeskyPool


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def residuals(matrix: np.ndarray, picks: list[int]) -> np.ndarray:
    inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
    found = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
    found[picks] = 0.0
    return found


def test_bounds_hold_and_those_of_the_pool_are_near() -> None:
    rows, kernel = UnitRows(sphere(60, 9)), Kernel("rbf", 0.7)
    matrix = kernel.matrix(rows.take()).numpy()
    for storage, near in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
        oracle = CholeskyPool(rows, kernel, 30, storage)
        picks: list[int] = []
        for turn in range(6):
            items = np.array([turn, turn + 10, turn + 20, turn + 30])
            front = oracle.open(items)
            np.testing.assert_allclose(
                front.residuals, residuals(matrix, picks)[items] if picks else matrix.diagonal()[items], atol=1e-12
            )
            for place in (2, 0):
                front.pick(place)
                picks.append(int(items[place]))
            oracle.close(front)
            expected = residuals(matrix, picks)
            assert (oracle.bounds >= expected - 1e-12).all()
            wanted = np.setdiff1d(np.arange(turn, 60, 2), picks)
            oracle.refresh(wanted)
            assert not oracle.stale[wanted].any()
            np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=near)
        assert (oracle.bounds[picks] == 0).all()


def test_the_pool_shrinks_as_picks_are_made() -> None:
    oracle = CholeskyPool(UnitRows(sphere(5000, 9)), Kernel(), 800)
    assert oracle.pool_size == 5000
    for start in range(0, 3 * oracle.front_size, oracle.front_size):
        front = oracle.open(np.arange(start, start + oracle.front_size))
        for place in range(oracle.front_size):
            front.pick(place)
        oracle.close(front)
    assert 4 * oracle.front_size <= oracle.pool_size < 5000
