from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raydpp.errors import UserError
from raydpp.selection.arrivals import Arrivals
from raydpp.selection.budget import Budget
from raydpp.selection.features import UnitRows
from raydpp.selection.ledger import Ledger
from raydpp.selection.messages import Contenders, Held

AXES = np.eye(5, dtype=np.float32)


def sending(rows: list[int], new: list[int], **other: Any) -> Contenders:
    """Of a shard whose rows are the axes, named by letters."""
    some = [rows[place] for place in new]
    return Contenders(
        np.array(rows, dtype=np.int64),
        Held(-np.inf, np.empty(0), [], None),
        1.0,
        np.array(new, dtype=np.int64),
        AXES[some],
        [other.get("names", "abcde")[row] for row in some],
        other.get("worth", np.zeros(5))[some],
        other.get("costs", np.full(5, np.inf))[some],
        [other.get("sources", [""] * 5)[row] for row in some],
    )


def ledger(**budget: Any) -> Ledger:
    return Budget(4, **budget).opening(10, {"x": 5, "y": 5})


def test_an_item_comes_once_however_often_it_is_sent() -> None:
    arrivals, account = Arrivals(["x", "y"]), ledger()
    assert arrivals.admit(0, sending([3, 1], [0, 1]), account).tolist() == [0, 1]
    assert arrivals.admit(1, sending([1], [0], names="ABCDE"), account).tolist() == [2]
    again = arrivals.admit(0, sending([1, 0, 3], [1]), account)  # only what is new comes with its features
    assert again.tolist() == [1, 3, 0]
    whole = arrivals.admit(0, sending([0, 4, 3], [0, 1, 2]), account)  # a shard made anew knows not what it sent
    assert whole.tolist() == [3, 4, 0]
    assert arrivals.order.tolist() == ["d", "b", "B", "a", "e"]
    assert arrivals.origin == [(0, 3), (0, 1), (1, 1), (0, 0), (0, 4)]
    assert arrivals.rows is not None
    np.testing.assert_array_equal(arrivals.rows.take().numpy(), AXES[[3, 1, 1, 0, 4]])
    assert account.eligible.tolist() == [True] * 5


def test_an_id_of_two_shards_is_refused() -> None:
    arrivals, account = Arrivals([""]), ledger()
    arrivals.admit(0, sending([3, 1], [0, 1]), account)
    with pytest.raises(UserError, match="the id b is in two partitions"):
        arrivals.admit(1, sending([1], [0]), account)


def test_nothing_may_come() -> None:
    arrivals, account = Arrivals([""]), ledger()
    assert arrivals.admit(0, sending([], []), account).tolist() == []
    assert arrivals.rows is None
    assert len(arrivals.stored(np.empty(0, dtype=np.int64))) == 0


def test_the_ledger_hears_of_costs_and_sources() -> None:
    arrivals = Arrivals(["x", "y"])
    account = Budget(4, tokens=10.0, maximum={"y": 1}).opening(10, {"x": 5, "y": 5})
    costs, sources = np.array([1.0, 7.0, 2.0, 3.0, 4.0]), list("xyyxx")
    arrivals.admit(0, sending([0, 1], [0, 1], costs=costs, sources=sources), account)
    arrivals.admit(0, sending([0, 2, 4, 3], [1, 2, 3], costs=costs, sources=sources), account)
    account.take(1)  # 3 tokens are left, and nothing of y
    assert account.eligible.tolist() == [True, False, False, False, True]


def test_what_is_owned_is_stored_first_and_cannot_be_picked() -> None:
    arrivals, account = Arrivals([""]), ledger()
    arrivals.own(UnitRows(AXES[2:4]), account)
    found = arrivals.admit(0, sending([1], [0], worth=np.arange(5.0)), account)
    assert found.tolist() == [2]
    assert account.eligible.tolist() == [False, False, True]
    assert arrivals.worth.tolist() == [0.0, 0.0, 1.0]
    stored = arrivals.stored(np.array([2, 0]))
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, AXES[[1, 2]])


def test_picks_are_told_to_the_shards_that_they_are_from() -> None:
    arrivals, account = Arrivals([""]), ledger()
    arrivals.admit(0, sending([3, 1], [0, 1]), account)
    arrivals.admit(2, sending([1], [0], names="ABCDE"), account)
    told = arrivals.picks([1, 2, 0], 3)
    assert {shard: exact.rows.tolist() for shard, exact in told.items()} == {0: [1, 3], 1: [], 2: [1]}
    assert told[0].picked == [0, 1]
    assert told[0].residuals.tolist() == [0.0, 0.0]
    assert told[1].rows.dtype == np.int64


def test_owned_features_of_another_kind_are_refused() -> None:
    arrivals, account = Arrivals([""]), ledger()
    arrivals.own(UnitRows(np.eye(3)), account)
    arrivals.admit(0, sending([1], [0]), account)
    with pytest.raises(UserError, match="features of the same kind"):
        arrivals.stored(np.array([1]))
