from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.sharded.messages import RestSummary, ShardRest
from raydpp.dpp.speculation import LocalRest

SUMMARY = RestSummary(-1.0, np.array([-0.9, -1.5, -1.5, -4.0]), ["m", "f", "f", "c"], "d")


def test_an_item_of_the_rest_may_precede_if_it_is_lifted_so_high_and_its_id_is_smaller() -> None:
    assert not SUMMARY.may_precede("z", -0.8)
    assert SUMMARY.may_precede("n", -0.9)
    assert not SUMMARY.may_precede("m", -1.2)
    assert SUMMARY.may_precede("g", -1.5)
    assert not SUMMARY.may_precede("f", -2.0)


def test_of_those_not_listed_only_the_smallest_id_is_known() -> None:
    assert not SUMMARY.may_precede("c", -9.0)
    assert SUMMARY.may_precede("cc", -4.0)
    last = RestSummary(-1.0, np.array([-1.0, -2.0]), ["m", "m"], "d")
    assert not last.may_precede("e", -1.9)
    assert last.may_precede("e", -2.0)  # it may be as high as the last of those listed
    assert not last.may_precede("d", -3.0)
    assert not RestSummary(-1.0, np.array([-1.0]), ["m"], None).may_precede("e", -3.0)


def test_no_rest_precedes_nothing() -> None:
    assert not RestSummary.empty().may_precede("z", -np.inf)


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.tuples(st.integers(-9, 9), st.sampled_from("abcdefgh")), max_size=12),
    listed=st.integers(1, 5),
    score=st.integers(-10, 10),
    order=st.sampled_from("abcdefgh"),
)
def test_what_a_summary_says_is_never_less_than_the_truth(
    items: list[tuple[int, str]], listed: int, score: int, order: str
) -> None:
    ranked = sorted(items, key=lambda item: -item[0])
    top, rest = ranked[:listed], ranked[listed:]
    first = [min(name for _, name in top[: i + 1]) for i in range(len(top))]
    smallest = min((name for _, name in rest), default=None)
    summary = RestSummary(0.0, np.array([high for high, _ in top], dtype=float), first, smallest)
    truth = any(high >= score and name < order for high, name in items)
    said = summary.may_precede(order, float(score))
    assert said or not truth
    if all(high < score for high, _ in rest) and (not top or top[-1][0] < score):
        assert said == truth


SUMMARIES = [
    RestSummary(-2.0, np.array([-2.0 + 1e-9, -3.0 + 1e-9]), ["m", "c"], "a"),
    RestSummary(-2.5, np.array([-2.5 + 1e-9]), ["k"], None),
    RestSummary.empty(),
]


def test_a_pick_is_certified_if_it_is_better_than_all_that_shards_did_not_send_or_ties_and_comes_first() -> None:
    rest = ShardRest(SUMMARIES)
    assert rest.certifies(-1.5, -1.5 + 1e-9, "z")
    assert not rest.certifies(-2.1, -2.1 + 1e-9, "a")
    assert rest.certifies(-2.0, -2.0 + 1e-9, "b")
    assert not rest.certifies(-2.0, -2.0 + 1e-9, "n")
    assert rest.certifies(-2.0 - 5e-10, -2.0 + 5e-10, "b")  # within rounding
    assert not rest.certifies(-2.0 + 5e-10, -2.0 - 5e-10, "b")  # it ties with the working set's best, not with all
    rest.picked(3)
    assert not rest.certifies(-2.1, -2.1 + 1e-9, "a")


def test_where_shards_sent_everything_everything_is_certified() -> None:
    assert ShardRest(SUMMARIES[2:]).certifies(-50.0, -50.0, "z")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    items=st.lists(st.tuples(st.integers(-6, 0), st.integers(0, 2)), min_size=1, max_size=12),
    best=st.integers(-7, 1),
    seed=st.integers(0, 99),
)
def test_summaries_of_shards_certify_as_much_as_all_items_do(
    items: list[tuple[int, int]], best: int, seed: int
) -> None:
    order = np.random.default_rng(seed).permutation(len(items) + 1)
    scores = np.array([score for score, _ in items], dtype=float)
    whole = LocalRest(np.append(scores, best), np.append(scores, best) + 0.25, order, np.array([len(items)]))
    summaries = []
    for shard in range(3):
        mine = sorted((i for i, (_, at) in enumerate(items) if at == shard), key=lambda i: -scores[i])
        names = [f"{order[i]:02d}" for i in mine]
        first = [min(names[: k + 1]) for k in range(len(names))]
        summaries.append(RestSummary(max(scores[mine], default=-np.inf), scores[mine] + 0.25, first, None))
    for high in (float(best), best + 0.2):
        sharded = ShardRest(summaries).certifies(high, high + 0.25, f"{order[-1]:02d}")
        assert sharded == whole.certifies(high, high + 0.25, int(order[-1]))
