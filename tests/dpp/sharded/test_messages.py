from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.sharded.messages import RestSummary

HELD = RestSummary(-1.0, np.array([-0.9, -1.5, -1.5, -4.0]), ["m", "f", "f", "c"], "d")


def test_an_item_held_back_comes_first_if_it_reaches_so_high_and_its_id_is_smaller() -> None:
    assert not HELD.before("z", -0.8)
    assert HELD.before("n", -0.9)
    assert not HELD.before("m", -1.2)
    assert HELD.before("g", -1.5)
    assert not HELD.before("f", -2.0)


def test_of_those_below_the_stairs_only_the_smallest_id_is_known() -> None:
    assert not HELD.before("c", -9.0)
    assert HELD.before("cc", -4.0)
    last = RestSummary(-1.0, np.array([-1.0, -2.0]), ["m", "m"], "d")
    assert not last.before("e", -1.9)
    assert last.before("e", -2.0)  # it may reach as high as the last of the stairs does
    assert not last.before("d", -3.0)
    assert not RestSummary(-1.0, np.array([-1.0]), ["m"], None).before("e", -3.0)


def test_nothing_held_back_comes_before_nothing() -> None:
    assert not RestSummary(-np.inf, np.empty(0), [], None).before("z", -np.inf)


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(-9, 9), st.sampled_from("abcdefgh")), max_size=12),
    stairs=st.integers(1, 5),
    tie_bound=st.integers(-10, 10),
    order=st.sampled_from("abcdefgh"),
)
def test_what_it_says_is_never_less_than_the_truth(
    items: list[tuple[int, str]], stairs: int, tie_bound: int, order: str
) -> None:
    ranked = sorted(items, key=lambda item: -item[0])
    top, rest = ranked[:stairs], ranked[stairs:]
    first = [min(name for _, name in top[: i + 1]) for i in range(len(top))]
    smallest = min((name for _, name in rest), default=None)
    held = RestSummary(0.0, np.array([high for high, _ in top], dtype=float), first, smallest)
    truth = any(high >= tie_bound and name < order for high, name in items)
    said = held.before(order, float(tie_bound))
    assert said or not truth
    if all(high < tie_bound for high, _ in rest) and (not top or top[-1][0] < tie_bound):
        assert said == truth
