from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pytest

from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select import partition_merge
from raydpp.select.partition_cache import PartitionCache
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.request import Request
from raydpp.storage import Folder
from raydpp.tables import Part
from tests.select.spread import job_of, make_table


@pytest.fixture
def searched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every search that is made, in order."""
    found: list[int] = []
    select_rows = partition_merge.select_rows

    def noting(table: pa.Table, *arguments: object) -> object:
        found.append(table.num_rows)
        return select_rows(table, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(partition_merge, "select_rows", noting)
    return found


def request_for(size: int, **budget: object) -> Request:
    return Request(Budget(size, **budget), Objective(Kernel()), oracle="cholesky")  # type: ignore[arg-type]


def ids(job: object) -> list[str]:
    return distributed_greedy(job, 2.0).rows["id"].to_pylist()  # type: ignore[arg-type]


def test_partitions_of_the_same_files_are_searched_once(tmp_path: Path, searched: list[int]) -> None:
    job = replace(
        job_of(make_table(tmp_path, 400, 8), 4, request_for(40)), cache=PartitionCache(Folder.at(tmp_path / "c"), "")
    )
    first = distributed_greedy(job, 2.0)
    assert searched == [100, 100, 100, 100, 80]
    assert len(first.kept) == len(set(first.kept)) == 4
    assert first.rows.equals(distributed_greedy(replace(job, cache=None), 2.0).rows)
    searched.clear()
    again = distributed_greedy(job, 2.0)
    assert searched == [80]  # the merge alone
    assert again.rows.equals(first.rows)
    assert again.selection.log_gains.tolist() == first.selection.log_gains.tolist()

    searched.clear()
    smaller = replace(job, request=request_for(20))
    assert ids(smaller) == ids(replace(smaller, cache=None))  # greedy is nested
    assert searched[:1] == [40]
    searched.clear()
    larger = replace(job, request=request_for(60))
    assert ids(larger) == ids(replace(larger, cache=None))
    assert searched[:4] == [100, 100, 100, 100]
    searched.clear()
    fourth = job.partitions[3][0]
    rows = fourth.read(fourth.columns)
    fourth.folder.write(fourth.name, lambda stream: pa.parquet.write_table(rows.slice(0, 10), stream))
    job.partitions[3][0] = replace(fourth, rows=10)
    assert ids(job) == ids(replace(job, cache=None))
    assert searched[0] == 60
    assert len(searched) == 2 + 5


@pytest.mark.parametrize(
    "other",
    [
        {"minimum": {"first": 30}},
        {"maximum": {"first": 2}},
        {"tokens": 300.0},
        {"min_log_gain": -0.5},
    ],
    ids=str,
)
def test_other_options_are_other_searches(tmp_path: Path, searched: list[int], other: dict[str, object]) -> None:
    job = replace(
        job_of(make_table(tmp_path, 400, 8), 4, request_for(40)), cache=PartitionCache(Folder.at(tmp_path / "c"), "")
    )
    ids(job)
    for options in (other, {}):  # and back
        searched.clear()
        changed = replace(job, request=request_for(40, **options))
        assert ids(changed) == ids(replace(changed, cache=None))
        assert len(searched) == (5 if options else 1) + 5
    beside = replace(job, cache=PartitionCache(Folder.at(tmp_path / "c"), "other scores"))
    searched.clear()
    ids(beside)
    assert len(searched) == 5


@pytest.mark.parametrize("budget", [{"minimum": {"first": 30}}, {"tokens": 300.0}], ids=str)
def test_picks_with_minima_or_by_tokens_are_not_the_first_of_more(
    tmp_path: Path, searched: list[int], budget: dict[str, object]
) -> None:
    job = replace(
        job_of(make_table(tmp_path, 400, 8), 4, request_for(60, **budget)),
        cache=PartitionCache(Folder.at(tmp_path / "c"), ""),
    )
    ids(job)
    searched.clear()
    smaller = replace(job, request=request_for(40, **budget))
    assert ids(smaller) == ids(replace(smaller, cache=None))
    assert len(searched) == 5 + 5


def test_what_ctrl_c_ended_is_not_kept_and_others_can_be_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = PartitionCache(Folder.at(tmp_path / "c"), "")
    job = replace(job_of(make_table(tmp_path, 400, 8), 4, request_for(40)), cache=cache)
    select_rows = partition_merge.select_rows

    def interrupted(*arguments: object) -> object:
        rows, found = select_rows(*arguments)  # type: ignore[arg-type]
        return rows, replace(found, stopped="interrupted after some")

    with monkeypatch.context() as patch:
        patch.setattr(partition_merge, "select_rows", interrupted)
        distributed_greedy(job, 2.0)
    assert cache.folder.files() == []
    kept = distributed_greedy(job, 2.0).kept
    distributed_greedy(replace(job, partitions=[[*job.partitions[0], *job.partitions[1]]]), 2.0)
    assert len(cache.folder.files()) == 5
    cache.keep_only(kept)
    assert cache.folder.files() == sorted(kept)
    assert isinstance(cache.file_for(job.partitions[0], job.request), Part)
