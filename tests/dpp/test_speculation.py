from __future__ import annotations

import numpy as np
import pytest

from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.working_set import WorkingSet
from raydpp.dpp.speculation import LocalRest, Speculation, speculate


def covariance(seed: int, items: int = 40) -> np.ndarray:
    root = np.random.default_rng(seed).standard_normal((items, 60))
    return root @ root.T / 80


def speculated(matrix: np.ndarray, error: float, outside: float = -np.inf, most: int = 10) -> Speculation:
    objective = Objective(Kernel())
    rows = np.arange(100, 100 + len(matrix))
    eligible = np.ones(len(matrix), dtype=bool)
    eligible[3] = False
    return speculate(WorkingSet(rows, matrix), error, objective, np.zeros(len(rows)), eligible, outside, 1e-3, most)


@pytest.mark.parametrize("seed", range(20))
def test_exact_picks_come_from_the_items_found_and_bounds_hold(seed: int) -> None:
    exact, error = covariance(seed), 1e-3
    noise = np.random.default_rng([seed, 1]).uniform(-error, error, len(exact))
    found = speculated(exact + np.diag(noise), 2 * error)
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
        count = found.made(done, count)
    assert count > 0


def test_it_ends_where_something_outside_may_be_better() -> None:
    matrix = covariance(0)
    whole = speculated(matrix, 0.0)
    assert len(whole.picks) == 10
    working_set = WorkingSet(np.arange(40), matrix)
    for pick in whole.picks[:4]:
        working_set.pick(pick - 100)
    outside = float(np.log(working_set.residuals[whole.picks[4] - 100]))
    assert speculated(matrix, 0.0, outside).picks == whole.picks[:4]
    assert len(speculated(matrix, 0.0, 99.0).rows) == 0


def test_what_was_made_of_a_speculation_is_its_longest_part() -> None:
    found = Speculation(np.arange(5), [4, 2, 0], np.zeros(4))
    assert found.made({2}, 0) == 0
    assert found.made({2, 4}, 0) == 2
    assert found.made({2, 4, 0, 1}, 2) == 3


SCORES = np.array([-1.0, -2.0, -3.0, -2.5])
TIE_BOUND = SCORES + 1e-9
ORDER = np.array([3, 1, 0, 2])


def test_a_pick_is_certified_if_it_is_better_than_all_outside_or_ties_and_comes_first() -> None:
    rest = LocalRest(SCORES, TIE_BOUND, ORDER, np.array([0, 3]))
    assert rest.highest == TIE_BOUND[1]
    assert rest.certifies(-1.5, -1.5 + 1e-9, 3)
    assert not rest.certifies(-2.1, -2.1 + 1e-9, 0)
    assert rest.certifies(-2.0, -2.0 + 1e-9, 0)  # a tie with item 1, whose order is 1
    assert not rest.certifies(-2.0, -2.0 + 1e-9, 2)
    assert rest.certifies(-2.0 - 5e-10, -2.0 + 5e-10, 0)  # within rounding


def test_with_nothing_outside_everything_is_certified() -> None:
    assert LocalRest(SCORES, TIE_BOUND, ORDER, np.arange(4)).certifies(-50.0, -50.0, 9)


def test_what_speculation_left_out_counts_until_the_picks_that_lower_it_are_made() -> None:
    rest = LocalRest(SCORES, TIE_BOUND, ORDER, np.arange(4))
    rest.speculation = Speculation(np.array([0, 3]), [0, 3], np.array([-1.2, -2.4, -2.6]))
    assert rest.certifies(-1.0, -1.0, 3)
    assert not rest.certifies(-1.2, -1.2, 3)
    rest.picked(3)  # out of turn
    assert not rest.certifies(-1.2, -1.2, 3)
    rest.picked(0)
    assert rest.certifies(-2.5, -2.5, 3)
    assert not rest.certifies(-2.6, -2.6, 3)
