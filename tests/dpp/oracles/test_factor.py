from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles import factor as module
from raydpp.dpp.oracles.factor import Factor, Panels, with_room


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.fixture(params=[512, 4])
def width(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(module, "WIDTH", request.param)
    return int(request.param)


def grown(kernel: Kernel, rows: UnitRows, solved: list[tuple[list[int], list[int]]]) -> tuple[Factor, list[int]]:
    factor, picks = Factor(rows, kernel, 20), []
    for items, places in solved:
        working_set = factor.solve(np.array(items))
        for place in places:
            working_set.pick(place)
            picks.append(items[place])
        factor.commit(working_set)
    return factor, picks


SETS = [([0, 5, 9, 11], [2, 0, 3]), ([5, 1, 2], [0]), ([1, 2, 3, 4, 12, 13], [1, 5, 0, 3, 2]), ([20, 21, 22], [0, 1])]


@pytest.mark.parametrize("kernel", [Kernel("rbf", 2.0), Kernel("cosine")])
def test_it_is_the_cholesky_factor_of_the_picks(kernel: Kernel, width: int) -> None:
    rows = UnitRows(sphere(30, 7))
    factor, picks = grown(kernel, rows, SETS)
    matrix = kernel.matrix(rows.take()).numpy()
    expected = np.linalg.cholesky(matrix[np.ix_(picks, picks)])
    t = len(picks)
    found = np.zeros((t, t))
    for start in range(0, t, width):
        stop = min(start + width, t)
        found[start:, start:stop] = factor.block(start, t, start, stop, torch.float64).numpy()
    np.testing.assert_allclose(np.tril(found), expected, atol=1e-12)
    assert torch.equal(factor.features, rows.take(torch.tensor(picks)))


def test_a_working_set_holds_exact_covariances_whether_its_items_were_in_the_last_one_or_not(width: int) -> None:
    rows, kernel = UnitRows(sphere(30, 7)), Kernel()
    factor, picks = grown(kernel, rows, SETS)
    matrix = kernel.matrix(rows.take()).numpy()
    items = np.array([22, 7, 28, 12, 6])
    known = matrix[picks][:, items]
    expected = matrix[np.ix_(items, items)] - known.T @ np.linalg.solve(matrix[np.ix_(picks, picks)], known)
    working_set = factor.solve(items)
    np.testing.assert_allclose(working_set.residuals, np.diag(expected).clip(0), atol=1e-12)
    working_set.pick(1)
    pivot = expected[1, 1]
    np.testing.assert_allclose(working_set.residuals[3], expected[3, 3] - expected[1, 3] ** 2 / pivot, atol=1e-12)


@pytest.mark.parametrize("rows", [2, 50])
def test_solve_is_the_same_for_few_rows_and_for_many(rows: int, width: int) -> None:
    factor, picks = grown(Kernel(), UnitRows(sphere(30, 7)), SETS)
    lower = np.linalg.cholesky(Kernel().matrix(factor.features).numpy())
    for start, stop in ((0, 4), (1, 3), (4, 8), (5, len(picks))):
        right = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, stop - start)))
        out = torch.empty_like(right)
        for _ in range(2):  # the second time a whole panel's inverse is there already
            factor.solve_block(start, right, out)
        np.testing.assert_allclose(out.numpy() @ lower[start:stop, start:stop].T, right.numpy(), atol=1e-12)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 2.0), Kernel("cosine")])
def test_picks_that_are_none_of_the_rows_are_appended_before_between_and_after_working_sets(
    kernel: Kernel, width: int
) -> None:
    x, others = sphere(30, 7), torch.from_numpy(sphere(19, 7, 4))
    rows = UnitRows(x)
    factor, picks = Factor(rows, kernel, 40), [others[:9]]
    factor.append(others[:9])
    for start, stop, places in ((9, 11, (3, 1)), (11, 19, (4, 2))):
        items = np.arange(start - 9, start - 4)  # some were in the last working set
        working_set = factor.solve(items)
        for place in places:
            working_set.pick(place)
            picks.append(rows.take(torch.tensor([items[place]])))
        factor.commit(working_set)
        factor.append(others[start:stop])
        picks.append(others[start:stop])
        factor.append(others[:0])
    everything = torch.cat(picks)
    assert torch.equal(factor.features, everything)
    expected = np.linalg.cholesky(kernel.matrix(everything).numpy())
    t = len(everything)
    found = np.zeros((t, t))
    for first in range(0, t, width):
        last = min(first + width, t)
        found[first:, first:last] = factor.block(first, t, first, last, torch.float64).numpy()
    np.testing.assert_allclose(np.tril(found), expected, atol=1e-12)
    cross = kernel.cross(everything, rows.take(torch.arange(2, 8))).numpy()
    exact = kernel.variance - (cross * np.linalg.solve(kernel.matrix(everything).numpy(), cross)).sum(axis=0)
    same = np.isin(np.arange(2, 8), [3, 4, 6])  # as picks are
    np.testing.assert_allclose(factor.solve(np.arange(2, 8)).residuals[~same], exact[~same], atol=1e-12)


def test_a_working_set_may_be_empty_and_more_rows_may_come_behind() -> None:
    x, kernel = sphere(30, 7), Kernel()
    factor = Factor(UnitRows(x[:10]), kernel, 20)
    working_set = factor.solve(np.array([2, 4]))
    working_set.pick(0)
    factor.commit(working_set)
    nothing = factor.solve(np.empty(0, dtype=np.int64))
    assert len(nothing.residuals) == 0
    factor.commit(nothing)
    factor.rows = UnitRows(x)
    inner = float(kernel.cross(torch.from_numpy(x[2:3]), torch.from_numpy(x[29:]))[0, 0])
    assert factor.solve(np.array([29])).residuals[0] == pytest.approx(1.0 - inner**2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), width=st.integers(1, 9))
def test_what_was_written_is_read_whatever_the_order(seed: int, width: int) -> None:
    random = torch.Generator().manual_seed(seed)
    matrix = torch.rand(20, 4 * width, generator=random)
    panels = Panels(20, torch.float32, torch.device("cpu"), width)
    depth = torch.zeros(20, dtype=torch.int64)
    for _ in range(12):
        start = int(depth[torch.randint(0, 20, (), generator=random)])
        if start == 4 * width:
            continue
        rows = (depth == start).nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=random)[: len(rows) // 2 + 1]]
        panels.write(rows, start, matrix[rows, start : start + width])
        depth[rows] += width
    for start in range(0, 4 * width, width):
        rows = (depth > start).nonzero()[:, 0].flip(0)
        if len(rows):
            assert torch.equal(panels.read(rows, start), matrix[rows, start : start + width])
            out = torch.empty(len(rows), 4 * width)
            panels.read(rows, start, out=out[:, start : start + width])
            assert torch.equal(out[:, start : start + width], matrix[rows, start : start + width])


def test_room_is_made_without_losing_rows() -> None:
    block = torch.arange(6.0).view(3, 2)
    assert with_room(block, 3, 100) is block
    grown = with_room(block, 4, 100)
    assert grown.shape == (100, 2)
    assert torch.equal(grown[:3], block)
    assert with_room(block.to("meta"), 4, 10_000).shape == (1024, 2)  # a device that commits memory grows
    assert with_room(block.to("meta"), 2000, 10_000).shape == (2500, 2)
