from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles import cholesky, factor
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.cholesky import CholeskyOracle


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
    monkeypatch.setattr(cholesky, "WIDTH", width)
    rows, kernel = UnitRows(sphere(60, 9)), Kernel("rbf", 0.7)
    matrix = kernel.matrix(rows.take()).numpy()
    for storage, near in ((torch.float32, 3e-6), (torch.float64, 1e-12)):
        oracle = CholeskyOracle(rows, kernel, 30, storage)
        picks: list[int] = []
        for turn in range(6):
            items = np.array([turn, turn + 10, turn + 20, turn + 30])
            working_set = oracle.solve(items)
            np.testing.assert_allclose(
                working_set.residuals,
                residuals(matrix, picks)[items] if picks else matrix.diagonal()[items],
                atol=1e-12,
            )
            for place in (2, 0):
                working_set.pick(place)
                picks.append(int(items[place]))
            oracle.commit(working_set)
            expected = residuals(matrix, picks)
            assert (oracle.bounds >= expected - 1e-12).all()
            wanted = np.setdiff1d(np.arange(turn, 60, 2), picks)
            oracle.refine(wanted, np.zeros(len(wanted)))
            assert not oracle.stale[wanted].any()
            np.testing.assert_allclose(oracle.bounds[wanted], expected[wanted], atol=near)
            approximated = oracle.approximate(wanted[3:9])
            assert approximated is not None
            np.testing.assert_allclose(approximated.residuals, expected[wanted[3:9]], atol=near)
        assert (oracle.bounds[picks] == 0).all()


def test_an_item_stays_stale_once_its_bound_is_low_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "WIDTH", 4)
    monkeypatch.setattr(cholesky, "WIDTH", 4)
    rows, kernel = UnitRows(sphere(300, 5)), Kernel("rbf", 0.7)
    oracle, picks = CholeskyOracle(rows, kernel, 20), np.arange(12)
    working_set = oracle.solve(picks)
    for place in range(12):
        working_set.pick(place)
    oracle.commit(working_set)
    items = np.arange(12, 300)
    first = residuals(kernel.matrix(rows.take()).numpy(), list(range(4)))[items]
    lowest = np.full(len(items), np.median(first))
    oracle.refine(items, lowest)
    low = items[first < lowest - 1e-5]
    assert len(low) > 100
    assert oracle.stale[low].all()
    np.testing.assert_allclose(oracle.bounds[low], first[first < lowest - 1e-5], atol=3e-6)
    expected = residuals(kernel.matrix(rows.take()).numpy(), picks.tolist())
    high = np.flatnonzero(expected >= lowest[0] + 1e-5)
    assert not oracle.stale[high].any()
    np.testing.assert_allclose(oracle.bounds[high], expected[high], atol=3e-6)
    assert oracle.approximate(np.sort(np.append(high, low[:1]))) is None
    oracle.refine(items, np.zeros(len(items)))  # those left stale go on where they were
    np.testing.assert_allclose(oracle.bounds[items], expected[items], atol=3e-6)


@pytest.mark.parametrize("ridge", [0.0, 0.3])
@pytest.mark.parametrize("width", [256, 4])
def test_picks_made_elsewhere_are_followed(ridge: float, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(factor, "WIDTH", width)
    monkeypatch.setattr(cholesky, "WIDTH", width)
    x = sphere(80, 6)
    rows, others, kernel = UnitRows(x[:60]), UnitRows(x[60:]).take(), Kernel("rbf", 0.7, ridge)
    matrix = kernel.matrix(UnitRows(x).take()).numpy()
    oracle = CholeskyOracle(rows, kernel, 40)
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
    rows, others, kernel = UnitRows(sphere(60, 6)), UnitRows(sphere(2, 6, 1)).take(), Kernel()
    oracle = CholeskyOracle(rows, kernel, 9)
    oracle.append(others[:1], Exact.empty())
    oracle.refine(np.arange(60), np.zeros(60))
    oracle.append(others[1:], Exact.empty())  # the pool follows
    assert not oracle.stale.any()
    off = Exact(np.array([3, 4]), oracle.bounds[[3, 4]] + [0.0, 2e-3], [])
    oracle.append(others[:0], off)
    assert oracle.error == pytest.approx(8e-3, rel=1e-2)


def test_it_restarts_in_float64_where_what_is_left_elsewhere_is_small_and_not_where_only_picks_are() -> None:
    rows, other = UnitRows(sphere(60, 6)), UnitRows(sphere(2, 6, 1)).take()
    for picked, storage in (([0, 1], torch.float32), ([0], torch.float64)):
        oracle = CholeskyOracle(rows, Kernel(), 9)
        oracle.append(other[:1], Exact.empty())
        oracle.refine(np.arange(60), np.zeros(60))
        oracle.append(other[1:], Exact(np.array([3, 4]), np.array([0.0, 1e-5]), picked))
        assert oracle.dtype == storage
