from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.errors import UserError
from raydpp.select.plan import merge_levels, search_cost
from raydpp.select.request import Request
from raydpp.select.stage import select


def test_one_partition_is_one_level_that_is_asked_for_everything() -> None:
    request = Request(Budget(10), Objective(Kernel()))
    (level,) = merge_levels(request, [100], 2.0, 1_000)
    assert level.request is request
    assert (level.groups, level.rows, level.picks) == (((0,),), (100,), (10,))


def test_partitions_hand_in_more_than_their_share_and_one_merge_takes_all() -> None:
    first, last = merge_levels(Request(Budget(100), Objective(Kernel())), [1_000, 1_000, 1_000, 30], 2.0, 10_000)
    assert first.picks == (50, 50, 50, 30)
    assert last.groups == ((0, 1, 2, 3),)
    assert last.rows == (180,)
    assert last.request.budget.size == 100


def test_a_union_that_no_task_holds_is_merged_in_several_levels() -> None:
    request = Request(Budget(3), Objective(Kernel()))
    plan = merge_levels(request, [50] * 64, 2.0, 16)  # each hands in one, though a tenth would be its share
    assert [len(level.groups) for level in plan] == [64, 4, 1]
    assert [sum(level.picks) for level in plan] == [64, 8, 3]
    for before, level in itertools.pairwise(plan):
        assert sorted(i for bundle in level.groups for i in bundle) == list(range(len(before.groups)))
        assert level.rows == tuple(sum(before.picks[i] for i in bundle) for bundle in level.groups)
        assert max(level.rows) <= 16


def test_a_level_that_would_throw_nothing_away_is_left_out() -> None:
    plan = merge_levels(Request(Budget(100), Objective(Kernel())), [1_000] * 10, 2.0, 50)
    assert [len(level.groups) for level in plan] == [10, 1]


def test_a_budget_without_a_size_is_merged_at_once() -> None:
    plan = merge_levels(Request(Budget(tokens=100.0), Objective(Kernel())), [50] * 5, 2.0, 60)
    assert [len(level.groups) for level in plan] == [5, 1]
    assert plan[1].request.budget.size is None


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("cosine")])
def test_more_rows_and_picks_need_more(kernel: Kernel) -> None:
    request = Request(Budget(1_000), Objective(kernel))
    small = search_cost(request, 10_000, 512)
    assert search_cost(request, 40_000, 512).bytes > small.bytes
    apart = 1.2 * 1_000**3 if small.oracle == "cholesky" else 25 * 1_000 * 512**2  # of the rows
    assert search_cost(request, 40_000, 512).flop >= 3.9 * (small.flop - apart)
    more = search_cost(Request(Budget(4_000), Objective(kernel)), 10_000, 512)
    assert more.seconds(1e11) > small.seconds(1e11) > search_cost(request, 10_000, 512).seconds(2e11)
    assert (more.bytes > small.bytes) == (small.oracle == "cholesky")  # the feature space's state does not grow


def test_what_is_owned_counts_like_picks() -> None:
    request = Request(Budget(1_000), Objective(Kernel("rbf")))
    assert search_cost(request, 10_000, 64, owned=2_000).bytes > search_cost(request, 10_000, 64).bytes


def test_quality_alone_needs_no_products() -> None:
    assert search_cost(Request(Budget(1_000), Objective(Kernel(), 1.0)), 10_000, 64).flop == 0


def test_an_estimate_names_the_tasks_and_writes_nothing(table: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = select(table, str(out), 8, partitions=3, dry_run=True)
    assert not out.exists()
    assert "3 partitions of" in outcome.summary
    assert "1 merge of" in outcome.summary
    assert "certificate" in outcome.summary
    assert outcome.record["estimate"]["seconds"] >= 0
    assert outcome.record["estimate"]["bytes"] > 1e8


def test_an_estimate_of_rounds_names_the_shards(table: str, tmp_path: Path) -> None:
    outcome = select(table, str(tmp_path / "out"), 8, partitions=3, exact=True, dry_run=True)
    assert "3 shards of" in outcome.summary
    assert outcome.record["estimate"]["rounds"] >= 1


def test_more_picks_take_longer(table: str, tmp_path: Path) -> None:
    few, many = (select(table, str(tmp_path / "out"), size, dry_run=True).record["estimate"] for size in (2, 40))
    assert many["seconds"] > few["seconds"]


def test_without_a_size_there_is_nothing_to_reckon_with(table: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a --size"):
        select(table, str(tmp_path / "out"), tokens=50, dry_run=True)
