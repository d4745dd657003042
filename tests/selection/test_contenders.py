from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.selection.contenders import best_rows, largest


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.integers(-5, 5), max_size=12), count=st.integers(0, 15))
def test_the_largest_are_found(values: list[int], count: int) -> None:
    array = np.array(values, dtype=float)
    found = largest(array, count)
    assert len(set(found.tolist())) == len(found) == min(count, len(values))
    assert sorted(array[found].tolist()) == sorted(values)[len(values) - len(found) :]


SCORES = np.array([0.0, -1.0, -3.0, -1.0 - 1e-10, -2.0, -1.0 + 1e-10])
REACH = SCORES + 1e-9
ORDER = np.array([0, 5, 1, 2, 3, 4])


def test_the_best_come_with_what_ties_and_then_the_next_best() -> None:
    stale = np.array([True, False, False, False, False, False])
    contenders = np.arange(1, 6)
    assert sorted(best_rows(contenders, SCORES, REACH, stale, ORDER, 4).tolist()) == [1, 3, 4, 5]
    assert sorted(best_rows(contenders, SCORES, REACH, stale, ORDER, 3).tolist()) == [1, 3, 5]
    assert sorted(best_rows(contenders, SCORES, REACH, stale, ORDER, 9).tolist()) == [1, 2, 3, 4, 5]


def test_of_more_ties_than_fit_those_come_that_are_first_and_the_best() -> None:
    stale = np.zeros(6, dtype=bool)
    stale[0] = True
    contenders = np.arange(1, 6)
    assert best_rows(contenders, SCORES, REACH, stale, ORDER, 2).tolist() == [3, 5]
    assert best_rows(contenders, SCORES, REACH, stale, np.array([0, 1, 5, 2, 3, 4]), 2).tolist() == [1, 5]


def test_what_ties_comes_though_it_is_no_contender_itself() -> None:
    stale = np.zeros(6, dtype=bool)
    stale[[0, 5]] = True
    assert sorted(best_rows(np.array([1]), SCORES, REACH, stale, ORDER, 4).tolist()) == [1, 3]
