from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.oracles import cholesky_pool, factor
from raydpp.selection.oracles.cholesky_pool import CholeskyPool


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def residuals(matrix: np.ndarray, picks: list[int]) -> np.ndarray:
    inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks])
    found = np.diag(matrix) - (matrix[picks] * inner).sum(axis=0)
    found[picks] = 0.0
    return found


@pytest.mark.parametrize("width", [256, 4])
def test_bounds_hold_and_those_of_the_pool_are_near(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "WIDTH", width)
    monkeypatch.setattr(cholesky_pool, "WIDTH", width)
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
            oracle.refine(wanted, np.zeros(len(wanted)))
            assert not oracle.stale[wanted].any()
            np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=near)
            scout = oracle.scout(wanted[3:9])
            assert scout is not None
            np.testing.assert_allclose(scout.residuals, expected[wanted[3:9]], atol=near)
        assert (oracle.bounds[picks] == 0).all()


def test_an_item_sleeps_once_its_bound_is_low_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "WIDTH", 4)
    monkeypatch.setattr(cholesky_pool, "WIDTH", 4)
    rows, kernel = UnitRows(sphere(300, 5)), Kernel("rbf", 0.7)
    oracle, picks = CholeskyPool(rows, kernel, 20), np.arange(12)
    front = oracle.open(picks)
    for place in range(12):
        front.pick(place)
    oracle.close(front)
    items = np.arange(12, 300)
    first = residuals(kernel.matrix(rows.take()).numpy(), list(range(4)))[items]
    lowest = np.full(len(items), np.median(first))
    oracle.refine(items, lowest)
    asleep = items[first < lowest - 1e-5]
    assert len(asleep) > 100
    assert oracle.stale[asleep].all()
    np.testing.assert_allclose(oracle.bounds[asleep], first[first < lowest - 1e-5], atol=3e-6)
    expected = residuals(kernel.matrix(rows.take()).numpy(), picks.tolist())
    awake = np.flatnonzero(expected >= lowest[0] + 1e-5)
    assert not oracle.stale[awake].any()
    np.testing.assert_allclose(oracle.bounds[awake], expected[awake], atol=3e-6)
    assert oracle.scout(np.sort(np.append(awake, asleep[:1]))) is None
    oracle.refine(items, np.zeros(len(items)))  # those that slept go on where they were
    np.testing.assert_allclose(oracle.bounds[items], expected[items], atol=3e-6)
