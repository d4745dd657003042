from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.budget import Budget, count_of, in_order
from raydpp.dpp.features import Items
from raydpp.errors import UserError


def items(rows: int, sources: Any = None, costs: Any = None, excluded: Any = ()) -> Items:
    return Items(
        np.eye(rows),
        costs=None if costs is None else np.array(costs, dtype=float),
        sources=None if sources is None else np.array(sources),
        excluded=np.array(excluded, dtype=np.int64),
    )


def test_a_budget_is_a_count_or_a_fraction() -> None:
    assert count_of(7, 100) == 7
    assert count_of(0.1, 100) == 10
    assert count_of(0.001, 100) == 1
    assert count_of(12.0, 100) == 12
    assert count_of(1, 100) == 1
    assert count_of(1.0, 100) == 100  # a fraction: the whole
    assert count_of(np.int64(3), 100) == 3  # type: ignore[arg-type]
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
    state = Budget(6, minimum={"c": 5, "*": 1}, maximum={"a": 1, "*": 0.5}).state(items(9, sources))
    picks = in_order(state, np.arange(9))
    assert sorted(np.array(sources)[picks].tolist()) == list("abbbcc")


def test_without_a_size_all_items_may_be_picked() -> None:
    for wrong in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(UserError, match="a smallest log gain of"):
            Budget(min_log_gain=wrong)
    assert Budget(min_log_gain=-1.0).state(items(7)).left == 7
    assert Budget(min_log_gain=-1.0).state(items(7)).min_log_gain == -1.0
    assert Budget(7).state(items(7)).min_log_gain == -np.inf


@pytest.mark.parametrize(
    ("budget", "given", "words"),
    [
        ({}, {}, "no budget: give a size"),
        ({"tokens": 10}, {}, "needs the costs"),
        ({"tokens": 0}, {"costs": [1] * 4}, "above 0"),
        ({"size": 2, "minimum": {"a": 1}}, {}, "needs the sources"),
        ({"size": 2, "maximum": {"z": 1}}, {"sources": list("aabb")}, "no such source: there are a, b"),
        ({"size": 2, "maximum": {"a": -1}}, {"sources": list("aabb")}, "whole number or a fraction"),
        ({"size": 2, "maximum": {"a": 1.5}}, {"sources": list("aabb")}, "whole number or a fraction"),
        ({"size": 2, "minimum": {"a": 2}, "maximum": {"a": 1}}, {"sources": list("aabb")}, "above its maximum"),
        ({"size": 2, "minimum": {"*": 2}}, {"sources": list("aabb")}, "add up to 4, more than the budget of 2"),
        ({"minimum": {"a": 1}}, {"sources": list("aabb")}, "needs a budget in items"),
        ({"tokens": 3, "maximum": {"a": 0.5}}, {"costs": [1] * 4, "sources": list("aabb")}, "is a fraction"),
        ({"size": 2}, {"excluded": [0, 1, 2, 3]}, "every item is owned or excluded"),
    ],
)
def test_a_mistake_is_refused(budget: dict[str, Any], given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Budget(**budget).state(items(4, **given))


def test_quotas_become_counts_of_every_source() -> None:
    budget = Budget(0.1, None, {"a": 0.25, "*": 1}, {"b": 0.55, "c": 9}, -2.0)
    counted = budget.in_counts(100, list("abc"))
    assert (counted.size, counted.min_log_gain) == (10, -2.0)
    assert counted.minimum == {"a": 3, "b": 1, "c": 1}
    assert counted.maximum == {"b": 5, "c": 9}
    assert counted.in_counts(100, list("abc")) == counted
    assert Budget(0.3).in_counts(10, []).size == 3
    with pytest.raises(UserError, match="there is a maximum for source 'c', and no such source: there are a, b"):
        budget.in_counts(100, list("ab"))


def test_the_mix_is_kept_in_whole_or_in_part_beside_what_is_asked_for() -> None:
    counts = {"a": 60, "b": 30, "c": 10}
    budget = Budget(20, minimum={"b": 1}, maximum={"a": 9})
    assert budget.keeping_mix(1.0, counts) == Budget(20, minimum={"a": 12, "b": 1, "c": 2}, maximum={"a": 9})
    assert Budget(15).keeping_mix(0.5, counts).minimum == {"a": 4, "b": 2, "c": 0}
    for other in (Budget(tokens=5.0), Budget(20, tokens=5.0), Budget(min_log_gain=-1.0)):
        with pytest.raises(UserError, match="needs a size, and no budget of tokens"):
            other.keeping_mix(1.0, counts)


def test_a_part_of_the_items_is_asked_for_no_more_than_it_has() -> None:
    budget = Budget(20, None, {"a": 5, "z": 2}, {"b": 7, "y": 1})
    part = budget.within(items(9, list("aaabbbbcc")))
    assert (part.size, part.minimum, part.maximum) == (9, {"a": 5}, {"b": 7})
    assert Budget(tokens=9.0).within(items(3)) == Budget(tokens=9.0)
    assert Budget(2).within(items(3)).size == 2


def test_a_streaming_state_has_no_items_and_the_limits_of_all() -> None:
    budget = Budget(0.5, minimum={"c": 5, "*": 1}, maximum={"a": 1, "*": 0.5})
    state = budget.streaming_state(12, {"a": 3, "b": 4, "c": 2})
    assert (len(state.eligible), state.left, state.limits[0]) == (0, 6, None)
    sources = np.array(list("aaabbbbcc"))
    state.add_items(np.unique(sources, return_inverse=True)[1], np.full(9, np.inf))
    assert sorted(sources[in_order(state, np.arange(9))].tolist()) == list("abbbcc")
    spent = Budget(tokens=7.0).streaming_state(12, {"": 12})
    spent.add_items(np.zeros(4, dtype=np.int64), np.array([3.0, 5.0, 4.0, 1.0]))
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
def test_a_mistake_is_refused_in_a_streaming_state_too(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        Budget(**arguments).streaming_state(12, {"a": 6, "b": 6})


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
    state = Budget(size, minimum=minimum, maximum=maximum).state(items(rows, sources))
    picks = in_order(state, random.permutation(rows))
    picked = {source: int((sources[picks] == source).sum()) for source in counts}
    assert len(set(picks)) == len(picks)
    for source in counts:
        assert minimum[source] <= picked[source] <= maximum.get(source, rows)
    possible = sum(min(counts[source], maximum.get(source, rows)) for source in counts)
    assert len(picks) == min(size, possible)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 30), tokens=st.floats(1, 200))
def test_tokens_are_never_overspent_and_nothing_that_fits_is_left(seed: int, rows: int, tokens: float) -> None:
    random = np.random.default_rng(seed)
    costs = random.integers(1, 60, rows).astype(float)
    state = Budget(tokens=tokens).state(items(rows, costs=costs))
    most = state.at_most
    picks = in_order(state, random.permutation(rows))
    spent = costs[picks].sum()
    assert spent <= tokens
    rest = np.delete(costs, picks)
    assert state.full
    assert len(picks) <= most
    assert not len(rest) or spent + rest.min() > tokens


def test_what_is_excluded_or_put_behind_is_never_eligible() -> None:
    state = Budget(5).state(items(6, excluded=[0, 3]))
    state.add_items(np.zeros(2, dtype=np.int64), np.full(2, np.inf), eligible=False)
    assert state.at_most == 4
    assert in_order(state, np.arange(8)) == [1, 2, 4, 5]
    assert not state.full
    assert state.why_nothing() == "no item is left"


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 40), tokens=st.booleans(), data=st.data())
def test_items_that_come_bit_by_bit_are_eligible_as_if_all_were_there(
    seed: int, rows: int, tokens: bool, data: st.DataObject
) -> None:
    random = np.random.default_rng(seed)
    sources = random.choice(["a", "b", "c"], rows)
    labels, groups = np.unique(sources, return_inverse=True)
    costs = random.integers(1, 9, rows).astype(float)
    size = data.draw(st.integers(1, rows))
    maximum: dict[str, float] = {label: data.draw(st.integers(0, rows)) for label in labels if data.draw(st.booleans())}
    minimum: dict[str, float] = {}
    if not tokens:
        room = size
        for label in labels:
            minimum[label] = data.draw(st.integers(0, int(min(room, maximum.get(label, rows)))))
            room -= int(minimum[label])
    spend = data.draw(st.floats(1, 100)) if tokens else None
    whole = Budget(size, spend, minimum, maximum).state(items(rows, sources, costs))
    counts = dict(zip(labels.tolist(), np.bincount(groups).tolist(), strict=True))
    part = Budget(size, spend, minimum, maximum).streaming_state(rows, counts)
    part.add_items(np.zeros(2, dtype=np.int64), np.full(2, np.inf), eligible=False)  # such as what is owned
    come = [-1, -1]
    while part.left:
        most, may = part.limits
        meet = may[groups] & (costs <= most if most is not None else True)
        waiting = np.setdiff1d(np.arange(rows), come)
        assert meet[waiting].tolist() == whole.eligible[waiting].tolist()
        new = random.permutation(waiting[meet[waiting]])[: random.integers(0, 4)]
        part.add_items(groups[new], costs[new])
        come += new.tolist()
        assert part.eligible.tolist() == [False, False, *whole.eligible[come[2:]]]
        assert part.left == whole.left
        allowed = np.flatnonzero(part.eligible)
        if len(allowed):
            index = int(random.choice(allowed))
            part.spend(index)
            whole.spend(come[index])
        elif not whole.eligible.any():
            break
    assert len(come) > 2 or not whole.eligible.any()


def test_the_terms_are_what_may_be_spent_and_on_which_groups() -> None:
    budget = Budget(3, 10.0, maximum={"a": 1})
    state = budget.state(items(4, list("abbc"), [1.0, 2.0, 3.0, 8.0]))
    state.least[2] = 1.0
    tokens, may = state.limits
    assert (tokens, may.tolist()) == (10.0, [True, True, True])
    state.spend(0)
    tokens, may = state.limits
    assert (tokens, may.tolist()) == (9.0, [False, True, True])
    state.spend(1)  # one is left, and owed to the last group
    tokens, may = state.limits
    assert (tokens, may.tolist()) == (7.0, [False, False, True])
    assert Budget(1).state(items(2)).limits[0] is None


def test_what_is_taken_in_order_is_reported() -> None:
    seen: list[int] = []
    state = Budget(2).state(items(5, excluded=[3]))
    assert in_order(state, [3, 4, 0, 1], lambda count, gain: seen.append(count)) == [4, 0]
    assert seen == [1, 2]
