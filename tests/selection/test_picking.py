from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from raydpp.selection.budget import Budget
from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.ledger import Ledger
from raydpp.selection.objective import Objective
from raydpp.selection.oracles.cholesky_pool import CholeskyPool
from raydpp.selection.oracles.front import DenseFront
from raydpp.selection.picking import Picks, Selection, condition, why_nothing_is_left

KERNEL = Kernel("rbf")


class Below:
    """Nothing outside the front goes before an item that scores above ``level``."""

    def __init__(self, level: float = -np.inf) -> None:
        self.level = level
        self.heard: list[int] = []
        self.asked: list[tuple[float, float, Any, float]] = []

    def below(self, best: float, reach: float, order: Any, margin: float) -> bool:
        self.asked.append((best, reach, order, margin))
        return best > self.level

    def picked(self, index: int) -> None:
        self.heard.append(index)


def diagonal(*residuals: float) -> DenseFront:
    """Items that have nothing to do with one another: residuals stay as they are."""
    return DenseFront(np.arange(10, 10 + len(residuals)), np.diag(residuals))


def ledger(size: int = 3, **budget: Any) -> Ledger:
    return Budget(size, **budget).ledger(20)


def test_a_selection_is_its_picks_and_their_gains() -> None:
    found = Selection.of([4, 1], [-0.5, -1.0], "why", "textbook")
    assert found.indices.dtype == np.int64
    assert (found.indices.tolist(), found.log_det, found.stopped, found.oracle) == ([4, 1], -1.5, "why", "textbook")
    assert Selection.of([], []).log_det == 0.0


def test_picks_are_made_inside_while_the_best_goes_before_everything_outside() -> None:
    picks, outside, account = Picks(5), Below(math.log(0.45)), ledger(4)
    heard: list[tuple[int, float]] = []
    front = diagonal(0.3, 0.9, 0.5, 0.4)
    ended = picks.inside(
        front, Objective(KERNEL), np.arange(20), outside, account, progress=lambda *told: heard.append(told)
    )
    assert ended is None
    assert picks.indices == [11, 12] == outside.heard
    assert picks.log_gains == [math.log(0.9), math.log(0.5)]
    assert heard == [(1, math.log(0.9)), (2, math.log(0.5))]
    assert front.picked == [1, 2]
    assert account.left == 2
    assert not account.eligible[[11, 12]].any()
    assert outside.asked[-1] == (math.log(0.4), pytest.approx(math.log(0.4), abs=1e-8), 13, 0.0)
    assert picks.anew


def test_of_items_that_tie_the_one_whose_order_is_smallest_is_picked() -> None:
    front = diagonal(0.5, 0.5 + 1e-11, 0.5 - 1e-11, 0.4)
    order: np.ndarray = np.arange(20)
    order[[10, 11, 12, 13]] = [13, 12, 11, 10]
    picks, outside = Picks(5), Below()
    picks.inside(front, Objective(KERNEL), order, outside, ledger(1))
    assert picks.indices == [12]
    best, reach, first, _ = outside.asked[0]
    assert (best, first) == (math.log(0.5 + 1e-11), 11)
    assert reach == pytest.approx(math.log(0.5 - 1e-11) + 1e-9, abs=1e-13)
    names = np.array([f"{99 - value}" for value in range(20)], dtype=object)
    named = Picks(5)
    named.inside(diagonal(0.5, 0.5, 0.5, 0.4), Objective(KERNEL), names, Below(), ledger(1))
    assert named.indices == [12]


def test_what_may_not_be_picked_is_passed_over_and_no_reason_to_end() -> None:
    picks = Picks(5)
    account = ledger(4, exclude=[11])
    assert picks.inside(diagonal(0.3, 0.9, 1e-12), Objective(KERNEL), np.arange(20), Below(), account) is None
    assert picks.indices == [10]  # the last is at the floor
    nothing = DenseFront(np.empty(0, dtype=np.int64), np.empty((0, 0)))
    assert picks.inside(nothing, Objective(KERNEL), np.arange(20), Below(), account) is None


def test_quality_counts_in_the_choice_and_not_in_the_gain() -> None:
    offsets = np.zeros(20)
    offsets[10] = 2.0
    picks = Picks(5, diversity=0.5)
    picks.inside(diagonal(0.3, 0.9), Objective(KERNEL, 0.5, offsets), np.arange(20), Below(), ledger(1))
    assert (picks.indices, picks.log_gains) == ([10], [math.log(0.3)])
    assert picks.top == pytest.approx(0.5 * math.log(0.3) + 2.0)


def test_it_ends_before_a_pick_that_adds_less_than_asked() -> None:
    picks = Picks(5)
    ended = picks.inside(diagonal(0.9, 0.5), Objective(KERNEL), np.arange(20), Below(), ledger(), math.log(0.6))
    assert picks.indices == [10]
    assert ended == "stopped at pick 2: the next example adds -0.6931 nats, less than -0.510826"


def test_how_far_to_look_ahead_goes_by_how_the_last_scores_fell() -> None:
    picks = Picks(3)
    assert (picks.top, picks.fall, picks.anew) == (None, 0.0, False)
    assert picks.drop == pytest.approx(0.01)  # nothing has been picked
    scores = [0.9, 0.8, 0.7, 0.6, 0.5]
    picks.patience = 8.0
    picks.inside(diagonal(*scores), Objective(KERNEL), np.arange(20), Below(), ledger(5))
    assert picks.patience == 1.0
    assert picks.top == pytest.approx(math.log(0.5))
    fall = math.log(0.8 / 0.5) / 3  # of the last three
    assert picks.fall == pytest.approx(fall)
    assert picks.drop == pytest.approx(3 * fall)
    picks.patience = 4.0
    assert picks.drop == pytest.approx(12 * fall)


def test_after_ties_it_looks_ahead_as_at_the_start() -> None:
    picks = Picks(3)
    picks.inside(diagonal(0.5, 0.5, 0.5), Objective(KERNEL), np.arange(20), Below(), ledger(3))
    assert picks.fall == 0.0
    assert picks.drop == pytest.approx(0.01)


def test_the_margin_is_what_the_tolerance_allows_in_the_objective() -> None:
    assert Picks(3).margin == 0.0
    picks = Picks(3, 0.2, 0.5)
    assert picks.margin == pytest.approx(-0.5 * math.log(0.8))
    outside = Below()
    picks.inside(diagonal(0.5), Objective(KERNEL, 0.5), np.arange(20), outside, ledger())
    assert outside.asked[0][3] == picks.margin


@pytest.mark.parametrize("width", [2, 50])
def test_what_is_owned_is_conditioned_on_in_order_and_copies_change_nothing(width: int) -> None:
    x = np.random.default_rng(0).standard_normal((8, 4))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    x[[5, 7]] = x[[2, 3]]
    rows = UnitRows(x)
    oracle = CholeskyPool(rows, KERNEL, 8)
    made = condition(oracle, np.array([3, 2, 5, 7, 0]), KERNEL.floor, width)
    assert made.tolist() == [3, 2, 0]
    assert made.dtype == np.int64
    matrix = KERNEL.matrix(rows.take()).numpy()
    inner = np.linalg.solve(matrix[np.ix_(made, made)], matrix[made])
    expected = np.diag(matrix) - (matrix[made] * inner).sum(axis=0)
    np.testing.assert_allclose(oracle.open(np.array([1, 4, 6])).residuals, expected[[1, 4, 6]], atol=1e-12)
    assert condition(oracle, np.empty(0, dtype=np.int64), KERNEL.floor, width).tolist() == []


def test_why_nothing_is_left_is_said_in_words() -> None:
    account = ledger(5)
    account.take(0)
    words = why_nothing_is_left(account, 1, 3e-12, 1e-10)
    assert words.startswith("stopped at pick 2 of 5: nothing that is left adds to the picks")
    assert "(largest conditional variance 3.0e-12, floor 1.0e-10)" in words
    assert why_nothing_is_left(account, 1, -1.0, 1e-10) == "stopped at pick 2 of 5: no item is left"
