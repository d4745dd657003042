from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.selection.budget import Budget
from raydpp.selection.ledger import Ledger, in_order


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
    picks = in_order(ledger, random.permutation(rows))
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
    ledger = Budget(tokens=tokens, costs=costs).ledger(rows)
    most = ledger.at_most
    picks = in_order(ledger, random.permutation(rows))
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
    assert in_order(ledger, np.arange(8)) == [1, 2, 4, 5]
    assert not ledger.full
    assert ledger.why_nothing() == "no item is left"


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
    whole = Budget(size, spend, costs, sources, minimum, maximum).ledger(rows)
    counts = dict(zip(labels.tolist(), np.bincount(groups).tolist(), strict=True))
    part = Budget(size, spend, minimum=minimum, maximum=maximum).opening(rows, counts)
    part.extend(2)  # such as what is owned
    come = [-1, -1]
    while part.left:
        most, may = part.terms
        meet = may[groups] & (costs <= most if most is not None else True)
        waiting = np.setdiff1d(np.arange(rows), come)
        assert meet[waiting].tolist() == whole.eligible[waiting].tolist()
        new = random.permutation(waiting[meet[waiting]])[: random.integers(0, 4)]
        part.admit(groups[new], costs[new])
        come += new.tolist()
        assert part.eligible.tolist() == [False, False, *whole.eligible[come[2:]]]
        assert part.left == whole.left
        open_ = np.flatnonzero(part.eligible)
        if len(open_):
            index = int(random.choice(open_))
            part.take(index)
            whole.take(come[index])
        elif not whole.eligible.any():
            break
    assert len(come) > 2 or not whole.eligible.any()


def test_the_terms_are_what_may_be_spent_and_on_which_groups() -> None:
    ledger = Ledger(
        np.ones(4, dtype=bool),
        3,
        10.0,
        np.array([1.0, 2.0, 3.0, 8.0]),
        np.array([0, 1, 1, 2]),
        np.array([0.0, 0.0, 1.0]),
        np.array([1.0, np.inf, np.inf]),
    )
    tokens, may = ledger.terms
    assert (tokens, may.tolist()) == (10.0, [True, True, True])
    ledger.take(0)
    tokens, may = ledger.terms
    assert (tokens, may.tolist()) == (9.0, [False, True, True])
    ledger.take(1)  # one is left, and owed to the last group
    tokens, may = ledger.terms
    assert (tokens, may.tolist()) == (7.0, [False, False, True])
    assert Ledger(np.ones(2, dtype=bool), 1).terms[0] is None


def test_what_is_taken_in_order_is_told() -> None:
    heard: list[int] = []
    ledger = Budget(2, exclude=[3]).ledger(5)
    assert in_order(ledger, [3, 4, 0, 1], lambda count, gain: heard.append(count)) == [4, 0]
    assert heard == [1, 2]
