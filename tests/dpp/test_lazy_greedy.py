"""Every oracle gives the picks of the textbook one: what a search finds does not depend on how gains are computed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.budget import Budget, BudgetState
from raydpp.dpp.features import Items, UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import (
    LazyGreedy,
    LocalGreedy,
    Proposal,
    Selection,
    best_rows,
    condition,
    largest,
    refine_ahead,
    why_nothing_is_left,
)
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles import cholesky, factor, feature_space
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import make_oracle
from raydpp.dpp.oracles.cholesky import CholeskyOracle
from raydpp.dpp.oracles.feature_space import FeatureSpaceOracle
from raydpp.dpp.oracles.textbook import TextbookOracle
from raydpp.dpp.oracles.working_set import WorkingSet
from raydpp.dpp.speculation import RestBound

REAL = Path(__file__).parents[3] / "shared/features/minilm_32k.parquet"


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@contextmanager
def small() -> Iterator[None]:
    """Panels, pools and working sets so small that little data goes through all of their turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor, "WIDTH", 8)
        patch.setattr(cholesky, "WIDTH", 8)
        patch.setattr(cholesky, "TILE", 3)
        patch.setattr(feature_space, "_COPIED", 0.8)
        for oracle in (CholeskyOracle, FeatureSpaceOracle):
            patch.setattr(oracle, "working_set_size", 5)
            patch.setattr(oracle, "min_candidates", 2)
            patch.setattr(oracle, "lookahead", 3)
            patch.setattr(oracle, "speculation_size", 9)
        yield


def found(oracle: Any, kernel: Kernel, size: int, **options: Any) -> tuple[list[int], list[float], str | None]:
    n = len(oracle.bounds)
    order = options.get("order", np.arange(n))
    objective, owned = Objective(kernel, options.get("weight", 0.0)), options.get("owned", np.empty(0, dtype=np.int64))
    state = Budget(size).state(Items(np.empty((n, 1)), excluded=owned))
    search = LocalGreedy(oracle, objective, order, options.get("modular", np.zeros(n)), state)
    search.condition_on(owned)
    stopped = search.run()
    return search.picks.indices, search.picks.log_gains, stopped


def everyone(rows: UnitRows, kernel: Kernel, size: int) -> dict[str, Any]:
    oracles: dict[str, Any] = {
        "float32": CholeskyOracle(rows, kernel, size),
        "float64": CholeskyOracle(rows, kernel, size, torch.float64),
    }
    if kernel.name == "cosine" and (kernel.ridge or 0) >= feature_space.MIN_RIDGE:
        oracles["feature space"] = FeatureSpaceOracle(rows, kernel, size)
    return oracles


def agree(x: np.ndarray, kernel: Kernel, size: int, **options: Any) -> None:
    rows, owned = UnitRows(x), options.get("owned", ())
    most = size + len(owned)
    expected = found(TextbookOracle(rows, kernel, most), kernel, size, **options)
    for name, oracle in everyone(rows, kernel, most).items():
        picks, gains, stopped = found(oracle, kernel, size, **options)
        assert picks == expected[0], name
        residuals = np.exp(expected[1])
        rounding = 1e-6 + 1e-15 / np.minimum.accumulate(residuals) / residuals  # what small pivots make of 1e-16
        assert (np.abs(np.subtract(gains, expected[1])) <= rounding).all(), name
        assert (stopped is None) == (expected[2] is None), name


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Kernel, int, dict[str, Any]]:
    """Features with copies, near copies and rows that tie; a kernel; a size; weights, an order, a set owned."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    dimension = draw(st.sampled_from([2, 3, 8, 24]))
    x = draw(st.sampled_from([sphere, _axes]))(draw(st.integers(2, 60)), dimension, seed)
    near = x[random.integers(0, len(x), draw(st.integers(0, 12)))]
    near = near + draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2])) * random.standard_normal(near.shape)
    x = np.concatenate([x, near / np.linalg.norm(near, axis=1, keepdims=True)])
    x = np.concatenate([x, x[random.integers(0, len(x), draw(st.integers(0, 12)))]])
    x = np.concatenate([x, np.repeat(x[:1], draw(st.sampled_from([0, 0, 20])), axis=0)])
    kernel = draw(
        st.sampled_from(
            [
                *(Kernel("rbf", gamma) for gamma in (0.05, 0.3, 1.0, 4.0, 20.0)),
                *(Kernel("rbf", 1.0, ridge) for ridge in (1e-3, 0.3)),
                *(Kernel("cosine", ridge=ridge) for ridge in (1e-3, 0.1, 1.0)),
            ]
        )
    )
    options: dict[str, Any] = {"order": random.permutation(len(x))}
    if draw(st.booleans()):
        options["weight"] = draw(st.sampled_from([0.1, 0.5, 0.95]))
        options["modular"] = options["weight"] * random.integers(0, 3, len(x)).astype(float)
    if draw(st.booleans()):
        options["owned"] = random.permutation(len(x))[: draw(st.integers(1, max(1, len(x) // 3)))]
    rest = len(x) - len(options.get("owned", ()))
    return x, kernel, draw(st.integers(1, rest)), options


def _axes(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Unit vectors of the axes: whole classes of rows tie at every pick."""
    return np.eye(dimension)[np.random.default_rng(seed).integers(0, dimension, rows)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_every_oracle_makes_the_textbooks_picks(problem: tuple[np.ndarray, Kernel, int, dict[str, Any]]) -> None:
    x, kernel, size, options = problem
    agree(x, kernel, size, **options)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_so_do_those_that_see_little_at_a_time(problem: tuple[np.ndarray, Kernel, int, dict[str, Any]]) -> None:
    x, kernel, size, options = problem
    with small():
        agree(x, kernel, size, **options)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.2), Kernel("rbf", 2.0), Kernel("cosine")])
def test_so_do_pools_and_panels_of_the_usual_size(kernel: Kernel) -> None:
    x = sphere(3000, 48, 1)
    x[2000:2300] = x[:300]
    agree(x, kernel, 1100, order=np.random.default_rng(0).permutation(3000))


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("cosine")])
def test_more_copies_of_a_row_than_a_working_set_holds_are_one_row_or_many(kernel: Kernel) -> None:
    x = np.concatenate([np.repeat(sphere(1, 8, 1), 1300, axis=0), sphere(40, 8)])
    agree(x, kernel, 60, order=np.random.default_rng(0).permutation(len(x)))


def test_rows_are_stored_as_float64_once_float32_tells_too_little_apart() -> None:
    rows, kernel = UnitRows(sphere(800, 3)), Kernel("rbf", 0.05)
    oracle = CholeskyOracle(rows, kernel, 60)
    assert oracle.dtype == torch.float32
    picks = found(oracle, kernel, 60)
    assert oracle.dtype == torch.float64
    assert picks[0] == found(TextbookOracle(rows, kernel, 60), kernel, 60)[0]


def test_float32_stays_where_it_suffices_and_is_not_far_off() -> None:
    rows, kernel = UnitRows(sphere(3000, 48, 1)), Kernel("rbf")
    oracle = CholeskyOracle(rows, kernel, 500)
    found(oracle, kernel, 500)
    assert oracle.dtype == torch.float32
    exact = TextbookOracle(rows, kernel, 500)
    picks = found(exact, kernel, 500)[0]
    residuals = exact.residuals
    assert (oracle.bounds >= residuals - 1e-12).all()  # stale or not, bounds are bounds
    fresh = ~oracle.stale
    fresh[picks] = False
    assert fresh.sum() > 100
    np.testing.assert_allclose(oracle.bounds[fresh], residuals[fresh], atol=3e-6)


@pytest.mark.parametrize("name", ["cholesky", "feature-space"])
def test_few_rows_are_brought_up_to_date(name: Any) -> None:
    """Lazy: away from the first picks, most bounds are left as they are at most rounds."""
    rows, kernel = UnitRows(sphere(3000, 24, 1)), Kernel("cosine")
    with small():
        oracle: Any = make_oracle(name, rows, kernel, 200)
        brought: list[int] = []
        refine = oracle.refine

        def counted(wanted: np.ndarray, lowest: np.ndarray) -> None:
            brought.append(len(wanted))
            refine(wanted, lowest)

        oracle.refine = counted
        state = Budget(200).state(Items(rows.take()))
        search = LocalGreedy(oracle, Objective(kernel), np.arange(3000), np.zeros(3000), state)
        search.run()
        assert 0 < sum(brought) < 0.5 * 3000 * search.rounds


@pytest.mark.skipif(not REAL.exists(), reason="the sentence embeddings are not here")
@pytest.mark.parametrize("kernel", [*(Kernel("rbf", gamma) for gamma in (0.2, 1.0, 3.0)), Kernel("cosine")], ids=str)
def test_every_oracle_makes_the_textbooks_picks_on_real_features(kernel: Kernel) -> None:
    column = pq.read_table(REAL, columns=["embedding"])["embedding"].combine_chunks()
    x = column.flatten().to_numpy().reshape(len(column), -1)  # (N, D) float16
    x = x[np.random.default_rng(0).permutation(len(x))[:8000]]
    agree(x, kernel, 600)


KERNEL = Kernel("rbf")
REFINING = [(False, False, 60, False), (True, False, 5, True), (False, True, 31, True), (False, True, 30, False)]


class Above(RestBound):
    """Certifies what scores above a level."""

    def __init__(self, level: float = -np.inf) -> None:
        super().__init__(level, level)
        self.seen: list[int] = []
        self.asked: list[tuple[float, float, Any]] = []

    def certifies(self, best: float, tie_bound: float, order: Any) -> bool:
        self.asked.append((best, tie_bound, order))
        return super().certifies(best, -np.inf, order)

    def may_precede(self, order: Any, score: float) -> bool:
        return False

    def picked(self, index: int) -> None:
        self.seen.append(index)


class Once(LazyGreedy):
    """A search over one working set, of 20 items; then nothing more is above the floor."""

    def __init__(self, working_set: WorkingSet, state: BudgetState, rest: RestBound | None = None, **options: Any):
        super().__init__(Objective(KERNEL, options.get("weight", 0.0)), state, options.get("lookahead", 5))
        order, modular = options.get("order", np.arange(20)), options.get("modular", np.zeros(20))
        rows = working_set.rows
        self.proposals: list[Proposal | float] = [
            0.0,
            Proposal(working_set, order[rows], modular[rows], rest or Above()),
        ]
        self.committed: list[list[int]] = []

    def propose(self) -> Proposal | float:
        return self.proposals.pop()

    def commit(self, working_set: Any) -> None:
        self.committed.append(working_set.picked)


def diagonal(*residuals: float) -> WorkingSet:
    """Items that have nothing to do with one another: residuals stay as they are."""
    return WorkingSet(np.arange(10, 10 + len(residuals)), np.diag(residuals))


def account(size: int = 3, excluded: Sequence[int] = (), min_log_gain: float | None = None) -> BudgetState:
    items = Items(np.eye(20), excluded=np.array(excluded, dtype=np.int64))
    return Budget(size, min_log_gain=min_log_gain).state(items)


def test_a_selection_is_its_picks_and_their_gains() -> None:
    found = Selection.of([4, 1], [-0.5, -1.0], "why", "textbook")
    assert found.indices.dtype == np.int64
    assert (found.indices.tolist(), found.log_det, found.stopped, found.oracle) == ([4, 1], -1.5, "why", "textbook")
    assert Selection.of([], []).log_det == 0.0


def test_picks_are_made_inside_while_the_best_is_certified_and_then_committed() -> None:
    rest, state, working_set = Above(math.log(0.45)), account(4), diagonal(0.3, 0.9, 0.5, 0.4)
    search = Once(working_set, state, rest)
    seen: list[tuple[int, float]] = []
    ended = search.run(lambda *pick: seen.append(pick))
    assert ended is not None
    assert ended.startswith("stopped at pick 3 of 4: numerically rank-deficient")
    assert search.picks.indices == [11, 12] == rest.seen
    assert search.picks.log_gains == [math.log(0.9), math.log(0.5)]
    assert seen == [(1, math.log(0.9)), (2, math.log(0.5))]
    assert working_set.picked == [1, 2]
    assert search.committed == [[1, 2]]
    assert search.rounds == 1
    assert state.left == 2
    assert not state.eligible[[11, 12]].any()
    assert rest.asked[-1] == (math.log(0.4), pytest.approx(math.log(0.4), abs=1e-8), 13)
    assert search.picks.changed


def test_of_items_that_tie_the_one_whose_order_is_smallest_is_picked() -> None:
    working_set = diagonal(0.5, 0.5 + 1e-11, 0.5 - 1e-11, 0.4)
    order: np.ndarray = np.arange(20)
    order[[10, 11, 12, 13]] = [13, 12, 11, 10]
    rest = Above()
    search = Once(working_set, account(1), rest, order=order)
    assert search.run() is None
    assert search.picks.indices == [12]
    best, tie_bound, first = rest.asked[0]
    assert (best, first) == (math.log(0.5 + 1e-11), 11)
    assert tie_bound == pytest.approx(math.log(0.5 - 1e-11) + 1e-9, abs=1e-13)
    names = np.array([f"{99 - value}" for value in range(20)], dtype=object)
    named = Once(diagonal(0.5, 0.5, 0.5, 0.4), account(1), order=names)
    named.run()
    assert named.picks.indices == [12]


def test_what_may_not_be_picked_is_passed_over_and_no_reason_to_end() -> None:
    state = account(4, excluded=[11])
    search = Once(diagonal(0.3, 0.9, 1e-12), state)
    nothing = WorkingSet(np.empty(0, dtype=np.int64), np.empty((0, 0)))
    search.proposals.insert(1, Proposal(nothing, np.empty(0), np.empty(0), Above()))
    ended = search.run()
    assert search.picks.indices == [10]  # the last is at the floor
    assert search.rounds == 2
    assert ended is not None
    assert "rank-deficient" in ended


def test_quality_counts_in_the_choice_and_not_in_the_gain() -> None:
    modular = np.zeros(20)
    modular[10] = 2.0
    search = Once(diagonal(0.3, 0.9), account(1), weight=0.5, modular=modular)
    search.run()
    assert (search.picks.indices, search.picks.log_gains) == ([10], [math.log(0.3)])
    assert search.picks.last_score == pytest.approx(0.5 * math.log(0.3) + 2.0)


def test_it_ends_before_a_pick_that_adds_less_than_asked() -> None:
    search = Once(diagonal(0.9, 0.5), account(min_log_gain=math.log(0.6)))
    assert search.run() == "stopped at pick 2: the next example adds -0.6931 nats, less than -0.510826"
    assert search.picks.indices == [10]
    assert search.committed == [[0]]


def test_how_far_to_look_ahead_goes_by_how_the_last_scores_fell() -> None:
    search = Once(diagonal(0.9, 0.8, 0.7, 0.6, 0.5), account(5), lookahead=3)
    picks = search.picks
    assert (picks.last_score, picks.recent_decrease, picks.changed) == (None, 0.0, False)
    assert picks.expected_decrease == pytest.approx(0.01)  # nothing has been picked
    picks.backoff = 8.0
    search.run()
    assert picks.backoff == 1.0
    assert picks.last_score == pytest.approx(math.log(0.5))
    decrease = math.log(0.8 / 0.5) / 3  # of the last three
    assert picks.recent_decrease == pytest.approx(decrease)
    assert picks.expected_decrease == pytest.approx(3 * decrease)
    picks.backoff = 4.0
    assert picks.expected_decrease == pytest.approx(12 * decrease)


def test_after_ties_it_looks_ahead_as_at_the_start() -> None:
    search = Once(diagonal(0.5, 0.5, 0.5), account(3), lookahead=3)
    search.run()
    assert search.picks.recent_decrease == 0.0
    assert search.picks.expected_decrease == pytest.approx(0.01)


@pytest.mark.parametrize(("needed", "changed", "kept", "due"), REFINING)
def test_what_the_next_picks_may_reach_is_refined_if_it_is_needed_or_too_much_is_kept(
    needed: bool, changed: bool, kept: int, due: bool
) -> None:
    rows, objective = UnitRows(sphere(60, 6)), Objective(KERNEL, 0.5)
    oracle = CholeskyOracle(rows, KERNEL, 9)
    oracle.append(UnitRows(sphere(1, 6, 1)).take(), Exact.empty())
    oracle.refine(np.arange(kept), np.zeros(kept))
    oracle.append(UnitRows(sphere(1, 6, 2)).take(), Exact.empty())  # the pool follows
    scores = np.linspace(0.0, -2.0, 60)
    calls: list[tuple[np.ndarray, np.ndarray]] = []
    oracle.refine = lambda *call: calls.append(call)  # type: ignore[method-assign]
    modular = np.linspace(0.0, 0.1, 60)
    assert refine_ahead(oracle, objective, modular, scores, float(scores[9]), needed, changed) is due
    assert len(calls) == due
    if due:
        assert calls[0][0].tolist() == list(range(10))
        np.testing.assert_allclose(objective.scores(calls[0][1], modular[:10])[0], scores[9])


@pytest.mark.parametrize("width", [2, 50])
def test_what_is_owned_is_conditioned_on_in_order_and_copies_change_nothing(width: int) -> None:
    x = np.random.default_rng(0).standard_normal((8, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[5, 7]] = x[[2, 3]]
    rows = UnitRows(x)
    oracle = CholeskyOracle(rows, KERNEL, 8)
    made = condition(oracle, np.array([3, 2, 5, 7, 0]), KERNEL.floor, width)
    assert made.tolist() == [3, 2, 0]
    assert made.dtype == np.int64
    matrix = KERNEL.matrix(rows.take()).numpy()
    inner = np.linalg.solve(matrix[np.ix_(made, made)], matrix[made])
    expected = np.diag(matrix) - (matrix[made] * inner).sum(axis=0)
    np.testing.assert_allclose(oracle.solve(np.array([1, 4, 6])).residuals, expected[[1, 4, 6]], atol=1e-12)
    assert condition(oracle, np.empty(0, dtype=np.int64), KERNEL.floor, width).tolist() == []


def test_why_nothing_is_left_is_said() -> None:
    state = account(5)
    state.spend(0)
    words = why_nothing_is_left(state, 1, 3e-12, 1e-10)
    assert words is not None
    assert words.startswith(
        "stopped at pick 2 of 5: numerically rank-deficient, as nothing that is left adds to the picks"
    )
    assert "(largest conditional variance 3.0e-12, floor 1.0e-10)" in words
    assert why_nothing_is_left(state, 1, -1.0, 1e-10) == "stopped at pick 2 of 5: no item is left"
    state.tokens = 3.0  # nothing costs so little: the budget is used up
    assert why_nothing_is_left(state, 1, -1.0, 1e-10) is None


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-5, 5), max_size=12), count=st.integers(0, 15))
def test_the_largest_are_found(values: list[int], count: int) -> None:
    array = np.array(values, dtype=float)
    found = largest(array, count)
    assert len(set(found.tolist())) == len(found) == min(count, len(values))
    assert sorted(array[found].tolist()) == sorted(values)[len(values) - len(found) :]


SCORES = np.array([0.0, -1.0, -3.0, -1.0 - 1e-10, -2.0, -1.0 + 1e-10])
TIE_BOUND = SCORES + 1e-9
ORDER = np.array([0, 5, 1, 2, 3, 4])


def test_the_best_come_with_what_ties_and_then_the_next_best() -> None:
    stale = np.array([True, False, False, False, False, False])
    candidates = np.arange(1, 6)
    assert sorted(best_rows(candidates, SCORES, TIE_BOUND, stale, ORDER, 4).tolist()) == [1, 3, 4, 5]
    assert sorted(best_rows(candidates, SCORES, TIE_BOUND, stale, ORDER, 3).tolist()) == [1, 3, 5]
    assert sorted(best_rows(candidates, SCORES, TIE_BOUND, stale, ORDER, 9).tolist()) == [1, 2, 3, 4, 5]


def test_of_more_ties_than_fit_those_come_that_are_first_and_the_best() -> None:
    stale = np.zeros(6, dtype=bool)
    stale[0] = True
    candidates = np.arange(1, 6)
    assert best_rows(candidates, SCORES, TIE_BOUND, stale, ORDER, 2).tolist() == [3, 5]
    assert best_rows(candidates, SCORES, TIE_BOUND, stale, np.array([0, 1, 5, 2, 3, 4]), 2).tolist() == [1, 5]


def test_what_ties_comes_though_it_is_no_candidate_itself() -> None:
    stale = np.zeros(6, dtype=bool)
    stale[[0, 5]] = True
    assert sorted(best_rows(np.array([1]), SCORES, TIE_BOUND, stale, ORDER, 4).tolist()) == [1, 3]
