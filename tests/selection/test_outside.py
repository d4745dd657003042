from __future__ import annotations

import numpy as np

from raydpp.selection.outside import Outside
from raydpp.selection.scouting import Rehearsal

SCORES = np.array([-1.0, -2.0, -3.0, -2.5])
REACH = SCORES + 1e-9
ORDER = np.array([3, 1, 0, 2])


def test_a_pick_is_better_than_all_that_is_outside_or_ties_and_comes_first() -> None:
    outside = Outside(SCORES, REACH, ORDER, np.array([0, 3]))
    assert outside.highest == REACH[1]
    assert outside.below(-1.5, -1.5 + 1e-9, 3, 0.0)
    assert not outside.below(-2.1, -2.1 + 1e-9, 0, 0.0)
    assert outside.below(-2.0, -2.0 + 1e-9, 0, 0.0)  # a tie with item 1, whose order is 1
    assert not outside.below(-2.0, -2.0 + 1e-9, 2, 0.0)
    assert outside.below(-2.0 - 5e-10, -2.0 + 5e-10, 0, 0.0)  # within rounding


def test_a_margin_is_what_a_pick_may_fall_short_by() -> None:
    outside = Outside(SCORES, REACH, ORDER, np.array([0, 3]))
    assert outside.below(-2.1, -2.1 + 1e-9, 3, 0.2)
    assert not outside.below(-2.3, -2.3 + 1e-9, 3, 0.2)


def test_nothing_outside_is_below_everything() -> None:
    assert Outside(SCORES, REACH, ORDER, np.arange(4)).below(-50.0, -50.0, 9, 0.0)


def test_what_the_rehearsal_left_out_counts_until_the_picks_that_lower_it_are_made() -> None:
    outside = Outside(SCORES, REACH, ORDER, np.arange(4))
    outside.rehearsal = Rehearsal(np.array([0, 3]), [0, 3], np.array([-1.2, -2.4, -2.6]))
    assert outside.below(-1.0, -1.0, 3, 0.0)
    assert not outside.below(-1.2, -1.2, 3, 0.0)
    outside.picked(3)  # out of turn
    assert not outside.below(-1.2, -1.2, 3, 0.0)
    outside.picked(0)
    assert outside.below(-2.5, -2.5, 3, 0.0)
    assert not outside.below(-2.6, -2.6, 3, 0.0)
