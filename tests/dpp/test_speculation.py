from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.working_set import WorkingSet
from raydpp.dpp.sharded.messages import RestSummary, ShardRest
from raydpp.dpp.speculation import LocalRest, Speculation, speculate


def covariance(seed: int, items: int = 40) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((items, 60))
    return root @ root.T / 80


def rehearsed(matrix: np.ndarray, error: float, outside: float = -np.inf, most: int = 10) -> Speculation:
    objective = Objective(Kernel())
    rows = np.arange(100, 100 + len(matrix))
    eligible = np.ones(len(matrix), dtype=bool)
    eligible[3] = False
    return speculate(WorkingSet(rows, matrix), error, objective, eligible, outside, 1e-3, most)


@pytest.mark.parametrize("seed", range(20))
def test_exact_picks_come_from_what_is_wanted_and_bounds_hold(seed: int) -> None:
    exact, error = covariance(seed), 1e-3
    noise = np.random.default_rng([seed, 1]).uniform(-error, error, len(exact))
    found = rehearsed(exact + np.diag(noise), 2 * error)
    assert 3 + 100 not in found.rows
    assert set(found.picks) <= set(found.rows.tolist())
    working_set, done, count = WorkingSet(np.arange(100, 140), exact), set[int](), 0
    working_set.residuals[3] = 0.0
    others = ~np.isin(working_set.rows, found.rows)
    for _ in range(len(found.picks)):
        assert np.log(working_set.residuals[others].max()) <= found.highest[count]
        j = int(working_set.residuals.argmax())
        if np.log(working_set.residuals[j]) <= found.highest[count]:
            break
        assert working_set.rows[j] in found.rows
        working_set.pick(j)
        done.add(int(working_set.rows[j]))
        count = found.after(done, count)
    assert count > 0


def test_it_ends_where_something_outside_may_be_better() -> None:
    matrix = covariance(0)
    whole = rehearsed(matrix, 0.0)
    assert len(whole.picks) == 10
    working_set = WorkingSet(np.arange(40), matrix)
    for pick in whole.picks[:4]:
        working_set.pick(pick - 100)
    outside = float(np.log(working_set.residuals[whole.picks[4] - 100]))
    assert rehearsed(matrix, 0.0, outside).picks == whole.picks[:4]
    assert len(rehearsed(matrix, 0.0, 99.0).rows) == 0


def test_what_has_been_done_of_a_rehearsal_is_its_longest_part() -> None:
    found = Speculation(np.arange(5), [4, 2, 0], np.zeros(4))
    assert found.after({2}, 0) == 0
    assert found.after({2, 4}, 0) == 2
    assert found.after({2, 4, 0, 1}, 2) == 3


SCORES = np.array([-1.0, -2.0, -3.0, -2.5])
REACH = SCORES + 1e-9
ORDER = np.array([3, 1, 0, 2])


def test_a_pick_is_better_than_all_that_is_outside_or_ties_and_comes_first() -> None:
    outside = LocalRest(SCORES, REACH, ORDER, np.array([0, 3]))
    assert outside.highest == REACH[1]
    assert outside.certifies(-1.5, -1.5 + 1e-9, 3)
    assert not outside.certifies(-2.1, -2.1 + 1e-9, 0)
    assert outside.certifies(-2.0, -2.0 + 1e-9, 0)  # a tie with item 1, whose order is 1
    assert not outside.certifies(-2.0, -2.0 + 1e-9, 2)
    assert outside.certifies(-2.0 - 5e-10, -2.0 + 5e-10, 0)  # within rounding


def test_nothing_outside_is_below_everything() -> None:
    assert LocalRest(SCORES, REACH, ORDER, np.arange(4)).certifies(-50.0, -50.0, 9)


def test_what_the_rehearsal_left_out_counts_until_the_picks_that_lower_it_are_made() -> None:
    outside = LocalRest(SCORES, REACH, ORDER, np.arange(4))
    outside.speculation = Speculation(np.array([0, 3]), [0, 3], np.array([-1.2, -2.4, -2.6]))
    assert outside.certifies(-1.0, -1.0, 3)
    assert not outside.certifies(-1.2, -1.2, 3)
    outside.picked(3)  # out of turn
    assert not outside.certifies(-1.2, -1.2, 3)
    outside.picked(0)
    assert outside.certifies(-2.5, -2.5, 3)
    assert not outside.certifies(-2.6, -2.6, 3)


HELD = [
    RestSummary(-2.0, np.array([-2.0 + 1e-9, -3.0 + 1e-9]), ["m", "c"], "a"),
    RestSummary(-2.5, np.array([-2.5 + 1e-9]), ["k"], None),
    RestSummary(-np.inf, np.empty(0), [], None),
]


def test_a_pick_is_better_than_all_that_shards_hold_back_or_ties_and_comes_first() -> None:
    outside = ShardRest(HELD)
    assert outside.certifies(-1.5, -1.5 + 1e-9, "z")
    assert not outside.certifies(-2.1, -2.1 + 1e-9, "a")
    assert outside.certifies(-2.0, -2.0 + 1e-9, "b")
    assert not outside.certifies(-2.0, -2.0 + 1e-9, "n")
    assert outside.certifies(-2.0 - 5e-10, -2.0 + 5e-10, "b")  # within rounding
    assert not outside.certifies(
        -2.0 + 5e-10, -2.0 - 5e-10, "b"
    )  # it ties with the working set's best and not with all
    outside.picked(3)
    assert not outside.certifies(-2.1, -2.1 + 1e-9, "a")


def test_nothing_held_back_is_below_everything() -> None:
    assert ShardRest(HELD[2:]).certifies(-50.0, -50.0, "z")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    items=st.lists(st.tuples(st.integers(-6, 0), st.integers(0, 2)), min_size=1, max_size=12),
    best=st.integers(-7, 1),
    seed=st.integers(0, 99),
)
def test_what_shards_say_of_what_they_hold_back_tells_as_much_as_all_of_it(
    items: list[tuple[int, int]], best: int, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(items) + 1)
    scores = np.array([score for score, _ in items], dtype=float)
    whole = LocalRest(np.append(scores, best), np.append(scores, best) + 0.25, order, np.array([len(items)]))
    held = []
    for shard in range(3):
        mine = sorted((i for i, (_, at) in enumerate(items) if at == shard), key=lambda i: -scores[i])
        names = [f"{order[i]:02d}" for i in mine]
        first = [min(names[: k + 1]) for k in range(len(names))]
        held.append(RestSummary(max(scores[mine], default=-np.inf), scores[mine] + 0.25, first, None))
    for high in (float(best), best + 0.2):
        assert ShardRest(held).certifies(high, high + 0.25, f"{order[-1]:02d}") == whole.certifies(
            high, high + 0.25, int(order[-1])
        )
