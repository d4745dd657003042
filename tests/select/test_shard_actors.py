from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from raydpp.cluster import OnRay, unwrap_task_errors
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.sharded.messages import RoundUpdate
from raydpp.errors import UserError
from raydpp.select import shard_actors as stage
from raydpp.select.request import Request
from raydpp.select.shard_actors import ShardActors, cpus_of_each
from raydpp.tables import gradient_schema, open_table, partition_files
from tests.faults import faulty_shard
from tests.select.spread import DIMENSION, job_of, make_table

FIRST = RoundUpdate(0, 0, np.empty((0, 1)), None, 1.0, 8)


@pytest.fixture(scope="module")
def table(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_table(tmp_path_factory.mktemp("shards"), rows=200, files=4)


@pytest.fixture
def made(table: str) -> Iterator[Any]:
    """A function that makes shards of the table, which end with the test."""
    some: list[ShardActors] = []

    def make(count: int, exclude: pa.Array | None = None, cost: str = "response_tokens", **options: Any) -> ShardActors:
        request = Request(Budget(20, **options), Objective(Kernel()), cost=cost)
        job = job_of(table, count, request, OnRay("select"), exclude=exclude)
        some.append(ShardActors(job, "cholesky", 20))
        return some[-1]

    yield make
    for shards in some:
        shards.close()


@pytest.fixture
def full(cluster: None) -> Iterator[Any]:
    """Someone else's work, which takes all CPUs until it is called off, with its function to do so."""
    import ray

    class Work:
        def begin(self) -> None:
            pass

    actor: Any = ray.remote(num_cpus=ray.cluster_resources()["CPU"])(Work).remote()
    ray.get(actor.begin.remote())
    yield lambda: ray.kill(actor)
    ray.kill(actor)


@pytest.mark.parametrize(
    ("shards", "cpus", "each"), [(3, 4, 1.0), (5, 4, 0.5), (16, 4, 0.25), (3, 1, 0.3333), (2, 0, 0.5)]
)
def test_a_shard_gets_a_whole_cpu_or_a_part_that_fits(shards: int, cpus: int, each: float) -> None:
    assert cpus_of_each(shards, cpus) == each


def test_all_shards_find_room_whatever_the_nodes() -> None:
    random = np.random.default_rng(0)
    for _ in range(2000):
        nodes = random.integers(1, 17, random.integers(1, 9))
        count = int(random.integers(1, 20 * nodes.sum()))
        each = round(1e4 * cpus_of_each(count, int(nodes.sum())))
        assert (10_000 * nodes // each).sum() >= count


def test_rows_come_in_the_order_asked_for_with_all_columns(table: str, made: Any) -> None:
    opened = open_table(table, "gradient")
    shards = made(3)
    places = [(2, 5), (0, 3), (2, 0), (1, 8), (0, 3), (0, 1)]
    rows = shards.take(places)
    tables = [opened.read(group) for group in partition_files(opened.parts, 3)]
    assert rows.equals(pa.concat_tables([tables[shard].slice(row, 1) for shard, row in places]))
    assert rows.column_names == gradient_schema(DIMENSION).names
    assert shards.take([]).schema.equals(rows.schema)


def test_what_may_be_picked_is_counted_by_source_without_what_is_excluded(table: str, made: Any) -> None:
    opened = open_table(table, "gradient")
    rows = opened.read(opened.parts)
    gone = rows.slice(0, 50)
    shards = made(2, gone["id"].combine_chunks(), maximum={"first": 9})
    left = rows.slice(50)["source"].value_counts().to_pylist()
    assert shards.available() == {entry["values"]: entry["counts"] for entry in left}
    found = shards.find([*rows["id"].to_pylist()[60:70], "nobody"])
    assert sorted(name for one in found for name in one.ids) == rows["id"].to_pylist()[60:70]


def test_a_mistake_found_in_a_shard_is_said_in_words(made: Any) -> None:
    shards = made(2, tokens=50, cost="source")
    with pytest.raises(UserError, match="the column 'source' is string, not numbers"), unwrap_task_errors():
        shards.available()


def test_shards_without_a_node_end_the_search_in_words(
    made: Any, full: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(stage, "PATIENCE", 2.0)
    monkeypatch.setattr(stage, "_LOOK", 0.3)
    shards = made(2)
    with (
        caplog.at_level(logging.WARNING, "raydpp"),
        pytest.raises(UserError, match="2 of 2 shards have no node to run on: each needs 1 CPU of its own"),
    ):
        shards.available()
    assert "waiting for room" in caplog.text
    full()
    monkeypatch.setattr(stage, "PATIENCE", 300.0)  # processes take their time to start
    assert sum(shards.available().values()) == 200  # there is room now


def test_where_the_cluster_can_grow_shards_wait_for_a_node(
    made: Any, full: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "PATIENCE", 0.5)
    monkeypatch.setattr(stage, "_LOOK", 0.2)
    monkeypatch.setattr(stage, "_cpus", lambda: (4, 8))
    shards = made(2)
    timer = threading.Timer(3.0, full)
    timer.start()
    started = time.monotonic()
    assert sum(shards.available().values()) == 200
    assert time.monotonic() - started > 3.0


def test_a_slow_round_is_no_shard_without_a_node(made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "_ShardActor", faulty_shard(tmp_path / "log", seconds=4.0))
    shards = made(2)
    shards.available()
    monkeypatch.setattr(stage, "PATIENCE", 0.5)
    monkeypatch.setattr(stage, "_LOOK", 0.2)
    answers = shards.advance(FIRST, {0: Exact.empty(), 1: Exact.empty()})
    assert all(answers[i].ids for i in range(2))


def test_a_shard_that_dies_every_time_ends_the_search_in_words(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stage, "_ShardActor", faulty_shard(tmp_path / "log", deaths=99))
    monkeypatch.setattr(stage, "DEATHS", 2)
    monkeypatch.setattr(stage, "_LOOK", 0.2)
    with pytest.raises(UserError, match="the process of a shard died 2 times in one round"):
        made(1).advance(FIRST, {0: Exact.empty()})
    assert 2 <= len(list(tmp_path.glob("log.died*"))) <= 3


def test_shards_end_when_they_are_closed(made: Any) -> None:
    shards = made(2)
    shards.available()
    assert states(shards) == ["ALIVE", "ALIVE"]
    shards.close()
    until = time.monotonic() + 10
    while states(shards) != ["DEAD", "DEAD"]:
        assert time.monotonic() < until
        time.sleep(0.1)


def states(shards: ShardActors) -> list[str]:
    from ray._private.state import state

    return [state.actor_table(actor._actor_id.hex())["State"] for actor in shards._actors]
