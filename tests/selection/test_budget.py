from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from raydpp.errors import UserError
from raydpp.selection.budget import Budget, check_costs, count_of
from raydpp.selection.ledger import in_order


def test_a_budget_is_a_count_or_a_fraction() -> None:
    assert count_of(7, 100) == 7
    assert count_of(0.1, 100) == 10
    assert count_of(0.001, 100) == 1
    assert count_of(12.0, 100) == 12
    assert count_of(np.int64(3), 100) == 3  # type: ignore[arg-type]
    assert count_of(None, 100) == 100
    for size, words in (
        (0, "at least 1"),
        (-3, "at least 1"),
        (1.5, "whole number"),
        (float("nan"), "whole number"),
        (101, "larger than the pool of 100"),
        (True, "not True"),
        ("7", "not '7'"),
    ):
        with pytest.raises(UserError, match=words):
            count_of(size, 100)  # type: ignore[arg-type]


def test_a_minimum_is_of_what_there_is_and_the_star_is_everyone_else() -> None:
    sources = list("aaabbbbcc")
    ledger = Budget(6, sources=sources, minimum={"c": 5, "*": 1}, maximum={"a": 1, "*": 0.5}).ledger(9)
    picks = in_order(ledger, np.arange(9))
    assert sorted(np.array(sources)[picks].tolist()) == list("abbbcc")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"tokens": 10}, "needs the costs"),
        ({"tokens": 0, "costs": [1] * 4}, "above 0"),
        ({"tokens": 10, "costs": [1] * 3}, "3 costs for 4"),
        ({"tokens": 10, "costs": [1, 0, 2, np.nan]}, r"2 costs are not numbers above 0 \(rows \[1, 3\]\)"),
        ({"size": 2, "minimum": {"a": 1}}, "needs the sources"),
        ({"size": 2, "maximum": {"a": 1}, "sources": ["a"]}, "1 sources for 4"),
        ({"size": 2, "maximum": {"z": 1}, "sources": list("aabb")}, "no such source: there are a, b"),
        ({"size": 2, "maximum": {"a": -1}, "sources": list("aabb")}, "whole number or a fraction"),
        ({"size": 2, "maximum": {"a": 1.5}, "sources": list("aabb")}, "whole number or a fraction"),
        ({"size": 2, "minimum": {"a": 2}, "maximum": {"a": 1}, "sources": list("aabb")}, "above its maximum"),
        ({"size": 2, "minimum": {"*": 2}, "sources": list("aabb")}, "add up to 4, more than the budget of 2"),
        ({"minimum": {"a": 1}, "sources": list("aabb")}, "needs a budget in items"),
        ({"tokens": 3, "costs": [1] * 4, "maximum": {"a": 0.5}, "sources": list("aabb")}, "is a fraction"),
        ({"size": 2, "exclude": [0, 1, 2, 3]}, "every item is owned or excluded"),
    ],
)
def test_a_mistake_is_refused_in_words(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Budget(**arguments).ledger(4)


def test_an_opening_has_no_items_and_the_limits_of_all() -> None:
    budget = Budget(0.5, minimum={"c": 5, "*": 1}, maximum={"a": 1, "*": 0.5})
    ledger = budget.opening(12, {"a": 3, "b": 4, "c": 2})
    assert (len(ledger.eligible), ledger.left, ledger.terms[0]) == (0, 6, None)
    sources = np.array(list("aaabbbbcc"))
    ledger.admit(np.unique(sources, return_inverse=True)[1], np.full(9, np.inf))
    assert sorted(sources[in_order(ledger, np.arange(9))].tolist()) == list("abbbcc")
    spent = Budget(tokens=7.0).opening(12, {"": 12})
    spent.admit(np.zeros(4, dtype=np.int64), np.array([3.0, 5.0, 4.0, 1.0]))
    assert in_order(spent, np.arange(4)) == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 13}, "a budget of 13 is larger than the pool of 12"),
        ({"tokens": 0.0}, "a budget of 0.0 tokens: give a number above 0"),
        ({"tokens": float("nan")}, "a budget of nan tokens"),
        ({"size": 2, "maximum": {"z": 1}}, "no such source: there are a, b"),
        ({"size": 2, "minimum": {"a": 2}, "maximum": {"a": 1}}, "above its maximum"),
        ({"size": 2, "minimum": {"*": 2}}, "add up to 4, more than the budget of 2"),
        ({"minimum": {"a": 1}}, "needs a budget in items"),
    ],
)
def test_a_mistake_is_refused_at_the_opening_too(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Budget(**arguments).opening(12, {"a": 6, "b": 6})


def test_costs_are_numbers_above_0_one_an_item() -> None:
    assert check_costs([1, 2], 2).tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match="2 costs for 3 items"):
        check_costs([1, 2], 3)
    with pytest.raises(UserError, match=r"2 costs are not numbers above 0 \(rows \[0, 2\]\)"):
        check_costs(np.array([0.0, 1.0, np.inf]), 3)
