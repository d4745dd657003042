from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from raydpp.dpp.features import Items, UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import OracleName
from raydpp.dpp.sharded import shard as module
from raydpp.dpp.sharded.messages import Candidates, RoundUpdate
from raydpp.dpp.sharded.shard import Shard

KERNELS: list[tuple[Kernel, OracleName]] = [
    (Kernel("rbf"), "cholesky"),
    (Kernel("cosine"), "cholesky"),
    (Kernel("cosine"), "feature-space"),
]


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


X = sphere(90, 7)
IDS = [f"{name:02d}" for name in np.random.default_rng(1).permutation(90)]
ELSEWHERE = sphere(30, 7, 5)


def update_of(number: int, sent: int, features: np.ndarray, **other: Any) -> RoundUpdate:
    decrease, count = other.pop("expected_decrease", 1.0), other.pop("count", 6)
    return RoundUpdate(number, sent, features, other.pop("last_score", None), decrease, count, **other)


def residuals(kernel: Kernel, picks: np.ndarray, x: np.ndarray = X) -> np.ndarray:
    """Of all rows given picks that are none of them."""
    a, b = UnitRows(x).take(), UnitRows(picks).take()
    cross = kernel.cross(a, b).numpy()
    return kernel.variance - (cross.T * np.linalg.solve(kernel.matrix(b).numpy(), cross.T)).sum(axis=0)


def answer(shard: Shard, update: RoundUpdate, own: Exact | None = None) -> Candidates:
    found = shard.advance(update, own or Exact.empty())
    assert found is not None
    return found


@pytest.mark.parametrize(("kernel", "oracle"), KERNELS)
def test_it_sends_its_best_and_what_it_says_of_the_rest_is_true(kernel: Kernel, oracle: OracleName) -> None:
    shard = Shard(Items(X, IDS), Objective(kernel), oracle, 40)
    for number in range(6):
        picks = ELSEWHERE[: 5 * number]
        given = residuals(kernel, picks) if number else np.full(90, kernel.variance)
        exact = Objective(kernel).scores(given, np.zeros(90))[0]
        score = {"last_score": float(exact.max()), "expected_decrease": 0.5}
        found = answer(shard, update_of(number, max(0, 5 * number - 5), picks[-5:], **score))
        assert shard.picks == 5 * number
        assert 0 < len(found.rows) <= 6
        back = np.setdiff1d(np.arange(90), found.rows)
        assert exact[back].max() <= found.rest.best
        if number:
            assert exact[found.rows].max() == exact.max()
            assert (exact[found.rows] >= found.rest.best - 1e-4).all()
        assert (np.diff(found.rest.tie_bound) <= 0).all()
        for high in np.linspace(exact.min() - 0.1, exact.max() + 0.1, 40):
            for name in ("00", "20", "50", "99"):
                if any(exact[row] >= high and IDS[row] < name for row in back):
                    assert found.rest.may_precede(name, float(high))
        assert not found.rest.may_precede("00", -9.0)
        assert found.largest_residual >= given.max()
        assert number or found.largest_residual == kernel.variance


def test_of_what_ties_it_sends_the_smallest_ids_and_names_the_next() -> None:
    found = answer(Shard(Items(X, IDS), Objective(Kernel()), "cholesky", 5), update_of(0, 0, X[:0]))
    names = sorted(IDS[row] for row in found.rows)
    assert names[:5] == ["00", "01", "02", "03", "04"]
    assert found.rest.may_precede("99", 0.0)
    assert not found.rest.may_precede("05", 0.0)
    assert found.rest.best == 0.0


def test_few_items_of_the_rest_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SUMMARY_SIZE", 3)
    shard = Shard(Items(X, IDS), Objective(Kernel()), "cholesky", 40)
    exact = residuals(Kernel(), ELSEWHERE[:10])
    found = answer(shard, update_of(0, 0, ELSEWHERE[:10], last_score=0.0, expected_decrease=9.0))
    order = np.argsort(-exact)
    assert set(found.rows.tolist()) == set(order[:6].tolist())
    assert len(found.rest.tie_bound) == len(found.rest.first) == 3
    np.testing.assert_allclose(found.rest.tie_bound, np.log(exact[order[6:9]]), atol=1e-4)
    assert found.rest.first == [min(IDS[row] for row in order[6:stop]) for stop in (7, 8, 9)]
    assert found.rest.other == min(IDS[row] for row in order[9:])


def test_what_comes_with_a_candidate_comes_once() -> None:
    modular, costs = np.linspace(0, 1e-3, 90), np.linspace(1, 9, 90)
    sources = np.array(["a", "b", "c"] * 30)
    x = X.astype(np.float16)
    shard = Shard(Items(x, IDS, modular, costs, sources), Objective(Kernel()), "cholesky", 40)
    first = answer(shard, update_of(0, 0, X[:0]))
    assert first.new.tolist() == list(range(6))
    assert first.features.dtype == np.float16
    np.testing.assert_array_equal(first.features, x[first.rows])
    assert first.ids == [IDS[row] for row in first.rows]
    np.testing.assert_array_equal(first.modular, modular[first.rows])
    np.testing.assert_array_equal(first.costs, costs[first.rows])
    assert first.sources == sources[first.rows].tolist()
    again = answer(shard, update_of(0, 0, X[:0]))  # what the coordinator does not have is sent again
    assert again.new.tolist() == list(range(6))
    own = Exact(first.rows, np.full(6, 0.99), [])
    second = answer(shard, update_of(1, 0, ELSEWHERE[:1], last_score=0.0), own)
    fresh = np.flatnonzero(~np.isin(second.rows, first.rows))
    assert second.new.tolist() == fresh.tolist()
    assert second.ids == [IDS[row] for row in second.rows[fresh]]
    plain = answer(Shard(Items(x, IDS), Objective(Kernel()), "cholesky", 40), update_of(0, 0, X[:0]))
    assert (plain.modular.tolist(), plain.sources) == ([0.0] * 6, [""] * 6)
    assert np.isinf(plain.costs).all()


@pytest.mark.parametrize(("kernel", "oracle"), KERNELS)
def test_its_own_picks_are_never_sent_again_and_its_other_candidates_are_exact(
    kernel: Kernel, oracle: OracleName
) -> None:
    shard = Shard(Items(X, IDS), Objective(kernel), oracle, 40)
    first = answer(shard, update_of(0, 0, X[:0]))
    given = residuals(kernel, X[first.rows[[4, 1]]])[first.rows]
    given[[4, 1]] = 0.0
    own = Exact(first.rows, given, [4, 1])
    second = answer(shard, update_of(1, 0, X[first.rows[[4, 1]]], last_score=0.1, expected_decrease=9.0, count=90), own)
    assert sorted([*second.rows.tolist(), *first.rows[[4, 1]].tolist()]) == list(range(90))
    assert second.rest.best == -np.inf
    assert shard.available == {"": 88}


@pytest.mark.parametrize(("kernel", "oracle"), KERNELS)
def test_the_same_update_twice_is_followed_once(kernel: Kernel, oracle: OracleName) -> None:
    shard, once = (Shard(Items(X, IDS), Objective(kernel), oracle, 40) for _ in range(2))
    for number in range(4):
        update = update_of(
            number,
            max(0, 5 * number - 5),
            ELSEWHERE[max(0, 5 * number - 5) : 5 * number],
            last_score=0.0,
            expected_decrease=0.7,
        )
        expected, _, again = answer(once, update), answer(shard, update), answer(shard, replace(update))
        assert shard.picks == 5 * number
        np.testing.assert_array_equal(again.rows, expected.rows)
        np.testing.assert_array_equal(again.features, expected.features)
        assert again.rest.best == expected.rest.best
        assert again.rest.first == expected.rest.first


@pytest.mark.parametrize(("kernel", "oracle"), KERNELS)
def test_a_restarted_one_says_so_and_follows_the_whole_history(kernel: Kernel, oracle: OracleName) -> None:
    shard = Shard(Items(X, IDS), Objective(kernel), oracle, 60)
    update = update_of(7, 20, ELSEWHERE[20:25], last_score=0.0, expected_decrease=9.0)
    assert shard.advance(update, Exact.empty()) is None
    assert shard.advance(update, Exact.empty()) is None
    assert shard.picks == 0
    picked = np.array([8, 3])
    features = np.concatenate([ELSEWHERE[:25], X[picked]])
    own = Exact(picked, np.zeros(2), [0, 1])
    found = answer(shard, replace(update, sent=0, features=features, count=90), own)
    assert shard.picks == 27
    assert sorted(found.rows.tolist()) == np.setdiff1d(np.arange(90), picked).tolist()
    assert len(found.new) == 88
    assert answer(shard, update_of(8, 27, X[:0], last_score=0.0)).rest.best > -np.inf
    assert shard.advance(update_of(9, 26, ELSEWHERE[25:26]), Exact.empty()) is None


def test_what_costs_too_much_or_is_of_a_source_that_is_blocked_is_left_out_for_good() -> None:
    costs, sources = np.arange(1.0, 91.0), np.array(["a", "b", "c"] * 30)
    items = Items(X, IDS, costs=costs, sources=sources, excluded=np.array([0, 5]))
    shard = Shard(items, Objective(Kernel()), "cholesky", 40)
    assert shard.available == {"a": 29, "b": 30, "c": 29}
    everyone = answer(shard, update_of(0, 0, X[:0], count=90))
    assert sorted(everyone.rows.tolist()) == [row for row in range(90) if row not in (0, 5)]
    some = answer(shard, update_of(1, 0, X[:0], count=90, tokens=30.0, blocked=frozenset("b")))
    assert sorted(some.rows.tolist()) == [row for row in range(30) if row % 3 != 1 and row not in (0, 5)]
    none = answer(shard, update_of(2, 0, X[:0], count=90, tokens=0.5))
    assert (len(none.rows), none.rest.best, none.largest_residual) == (0, -np.inf, -1.0)


def test_the_modular_term_counts() -> None:
    modular = np.zeros(90)
    modular[[17, 60]] = 1.0
    found = answer(
        Shard(Items(X, IDS, modular), Objective(Kernel(), 0.5), "cholesky", 5), update_of(0, 0, X[:0], count=2)
    )
    assert sorted(found.rows.tolist()) == [17, 60]
    assert found.rest.best == 0.0


def test_few_items_are_brought_up_to_date() -> None:
    """Those that cannot be picked soon wait, and wait again."""
    x = sphere(2000, 12, 3)
    shard = Shard(Items(x, [f"{i:04d}" for i in range(2000)]), Objective(Kernel("cosine")), "cholesky", 40)
    brought: list[int] = []
    refine = shard._oracle.refine
    shard._oracle.refine = lambda rows, lowest: (brought.append(len(rows)), refine(rows, lowest))[1]  # type: ignore
    picks = sphere(30, 12, 9)
    for number in range(30):
        exact = residuals(Kernel("cosine"), picks[: number + 1], x)
        answer(
            shard,
            update_of(
                number,
                number,
                picks[number : number + 1],
                last_score=float(np.log(exact.max())),
                expected_decrease=0.02,
            ),
        )
    assert 2000 <= sum(brought) < 0.3 * 30 * 2000
    assert shard._oracle.error < 1e-4


@pytest.mark.parametrize(("kernel", "oracle"), KERNELS)
def test_picks_of_its_own_do_not_disturb_its_bounds(kernel: Kernel, oracle: OracleName) -> None:
    """With a ridge a pick's copy has a residual, which the pick itself has not."""
    shard = Shard(Items(X, IDS), Objective(kernel), oracle, 40)
    found, picks = answer(shard, update_of(0, 0, X[:0])), np.empty(0, dtype=np.int64)
    for number in range(1, 9):
        picks = np.append(picks, found.rows[0])
        given = residuals(kernel, X[picks])
        given[picks] = 0.0
        own = Exact(found.rows, given[found.rows], [0])
        update = update_of(
            number, number - 1, X[picks[-1:]], last_score=float(np.log(given.max())), expected_decrease=1.0
        )
        found = answer(shard, update, own)
    assert shard._oracle.error < 1e-5


@pytest.mark.parametrize(("kernel", "oracle"), KERNELS)
def test_what_is_left_above_a_level_is_counted(kernel: Kernel, oracle: OracleName) -> None:
    items = Items(X, IDS, excluded=np.array([4, 8]))
    exact = np.log(np.delete(residuals(kernel, ELSEWHERE), [4, 8]))
    level = float(np.sort(exact)[-10:-8].mean())
    best, count = Shard(items, Objective(kernel), oracle, 30).left_above(ELSEWHERE, level)
    assert best == pytest.approx(exact.max(), abs=1e-4)
    assert best >= exact.max() - 1e-12
    assert count == 9


def test_items_are_found_by_id_as_candidates_are() -> None:
    shard = Shard(Items(X, IDS), Objective(Kernel()), "cholesky", 40)
    found = shard.find([IDS[30], "elsewhere", IDS[2]])
    assert found.rows.tolist() == [30, 2]
    assert found.ids == [IDS[30], IDS[2]]
    np.testing.assert_array_equal(found.features, X[[30, 2]])
    assert found.rest.best == -np.inf
    nothing = shard.find([])
    assert (len(nothing.rows), nothing.features.shape, nothing.features.dtype) == (0, (0, 7), np.float64)


def test_features_may_be_a_tensor() -> None:
    assert Shard(Items(torch.from_numpy(X), IDS), Objective(Kernel()), "cholesky", 4).available == {"": 90}
