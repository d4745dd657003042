from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.errors import UserError
from raydpp.selection.budget import Budget, Ledger, count_of, in_order


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


def take_all(ledger: Ledger, order: np.ndarray) -> list[int]:
    return in_order(ledger, order)


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), data=st.data())
def test_quotas_are_kept_whatever_the_order(seed: int, rows: int, data: st.DataObject) -> None:
    random = np.random.default_rng(seed)
    sources = random.choice(["a", "b", "c", "d"], rows)
    counts = {source: int((sources == source).sum()) for source in set(sources.tolist())}
    size = data.draw(st.integers(1, rows))
    maximum = {source: data.draw(st.integers(0, rows)) for source in counts if data.draw(st.booleans())}
    minimum: dict[str, float] = {}
    for source, count in counts.items():
        room = size - int(sum(minimum.values()))
        minimum[source] = data.draw(st.integers(0, max(0, min(room, count, maximum.get(source, rows)))))
    ledger = Budget(size, sources=sources, minimum=minimum, maximum=maximum).ledger(rows)
    picks = take_all(ledger, random.permutation(rows))
    picked = {source: int((sources[picks] == source).sum()) for source in counts}
    assert len(set(picks)) == len(picks)
    for source in counts:
        assert minimum[source] <= picked[source] <= maximum.get(source, rows)
    possible = sum(min(counts[source], maximum.get(source, rows)) for source in counts)
    assert len(picks) == min(size, possible)


def test_a_minimum_is_of_what_there_is_and_the_star_is_everyone_else() -> None:
    sources = list("aaabbbbcc")
    ledger = Budget(6, sources=sources, minimum={"c": 5, "*": 1}, maximum={"a": 1, "*": 0.5}).ledger(9)
    picks = take_all(ledger, np.arange(9))
    assert sorted(np.array(sources)[picks].tolist()) == list("abbbcc")


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 30), tokens=st.floats(1, 200))
def test_tokens_are_never_overspent_and_nothing_that_fits_is_left(seed: int, rows: int, tokens: float) -> None:
    random = np.random.default_rng(seed)
    costs = random.integers(1, 60, rows).astype(float)
    ledger = Budget(tokens=tokens, costs=costs).ledger(rows)
    most = ledger.at_most
    picks = take_all(ledger, random.permutation(rows))
    spent = costs[picks].sum()
    assert spent <= tokens
    rest = np.delete(costs, picks)
    assert ledger.full
    assert len(picks) <= most
    assert not len(rest) or spent + rest.min() > tokens


def test_what_is_excluded_or_put_behind_is_never_eligible() -> None:
    ledger = Budget(5, exclude=[0, 3]).ledger(6)
    ledger.extend(2)
    assert ledger.at_most == 4
    assert take_all(ledger, np.arange(8)) == [1, 2, 4, 5]
    assert not ledger.full
    assert ledger.why_nothing() == "no item is left"


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
