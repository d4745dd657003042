from __future__ import annotations

import errno
import socket
import subprocess
import sys
from typing import Any

import pytest
from ray._common.retry import format_exception, matches_error

from raydpp.cluster import (
    RETRIED,
    ActorPlan,
    Here,
    OnRay,
    cluster_plan,
    connect,
    plan_actors,
    tasks_for,
    unwrap_task_errors,
    value_of,
)
from raydpp.errors import UserError


def test_a_laptop_gets_one_actor_and_keeps_a_share_for_reading() -> None:
    plan = plan_actors({"CPU": 2.0}, {})
    assert (plan.gpus, plan.cpus, plan.least, plan.most, plan.threads) == (0, 1.0, 1, 1, 2)
    assert str(plan) == "1 actor with 2 CPU threads, no GPU each"


@pytest.mark.parametrize("cpus", [1, 2, 3, 8, 64])
@pytest.mark.parametrize("actors", [None, 1, 2, 5])
def test_a_pool_never_takes_every_cpu(cpus: int, actors: int | None) -> None:
    plan = plan_actors({"CPU": float(cpus)}, {}, actors=actors)
    assert plan.cpus * plan.most <= cpus - 0.25


@pytest.mark.parametrize("actors", [None, 4])
def test_a_pool_with_gpus_leaves_cpus_too(actors: int | None) -> None:
    plan = plan_actors({"CPU": 4.0, "GPU": 4.0}, {}, actors=actors)
    assert plan.most == 4
    assert plan.cpus * plan.most <= 4 - 0.25


def test_gpus_are_used_where_there_are_or_can_be_some() -> None:
    plan = plan_actors({"CPU": 16.0, "GPU": 4.0}, {})
    assert (plan.gpus, plan.least, plan.most) == (1.0, 1, 4)
    growing = plan_actors({"CPU": 0.0}, {"CPU": 64, "GPU": 8})
    assert (growing.gpus, growing.least, growing.most) == (1.0, 1, 8)
    shared = plan_actors({"CPU": 8.0, "GPU": 1.0}, {}, gpus_per_actor=0.5)
    assert (shared.gpus, shared.most) == (0.5, 2)
    several = plan_actors({"CPU": 8.0, "GPU": 7.0}, {}, gpus_per_actor=3)
    assert (several.gpus, several.most) == (3, 2)
    assert str(several) == "1 to 2 actors with 3 GPUs each"
    none = plan_actors({"CPU": 8.0, "GPU": 1.0}, {}, gpus_per_actor=0)
    assert none.gpus == 0


@pytest.mark.parametrize(
    ("gpus", "actors", "words"),
    [
        (1, None, "this cluster has 0 and can get 0"),
        (1.5, None, "whole number"),
        (-1, None, "give 0"),
        (float("nan"), None, "give 0"),
        (float("inf"), None, "give 0"),
        (4, None, "4 GPU for each actor is asked for, but this cluster has 0"),
        (None, 0, "at least one actor"),
    ],
)
def test_what_cannot_be_had_is_refused_at_once(gpus: float | None, actors: int | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        plan_actors({"CPU": 4.0}, {}, gpus_per_actor=gpus, actors=actors)


def test_more_actors_than_gpus_are_refused() -> None:
    with pytest.raises(UserError, match="at most 2 actors"):
        plan_actors({"CPU": 4.0, "GPU": 2.0}, {}, actors=3)


def test_the_plan_for_this_cluster_has_no_gpu(cluster: None) -> None:
    assert cluster_plan(None, None).gpus == 0
    with pytest.raises(UserError, match="cluster with GPUs"):
        cluster_plan(1, None)


def test_a_cluster_that_is_not_there_is_said_at_once() -> None:
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))  # and never listens
        address = f"127.0.0.1:{unheard.getsockname()[1]}"
        code = f"from raydpp.cluster import connect; connect({address!r})"
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=50)
    assert f"UserError: no Ray cluster answers at {address}" in found.stderr


REFUSED = """
from unittest import mock
from raydpp.cluster import connect
from raydpp.errors import UserError

def say(address):
    try:
        connect(address)
    except UserError as error:
        print(error)

for address in ("http://127.0.0.1:8265", "ray://127.0.0.1:10001", "127.0.0.1", "a b:6379", "127.0.0.1:99999"):
    say(address)
mismatch = RuntimeError("Version mismatch: The cluster was started with:\\n    Ray: 2.9.3")
with mock.patch("ray.init", side_effect=mismatch):
    say("auto")
"""


def test_an_address_that_is_none_and_a_cluster_of_other_versions_are_said_before_anything_starts() -> None:
    found = subprocess.run([sys.executable, "-c", REFUSED], capture_output=True, text=True, check=True, timeout=100)
    *addresses, port, versions = found.stdout.splitlines()
    assert len(addresses) == 4
    assert all("is no address of a Ray cluster: give HOST:PORT" in line for line in addresses)
    assert "no Ray cluster answers at 127.0.0.1:99999" in port
    assert versions.startswith("the Ray cluster at auto runs other versions: Version mismatch: The cluster was started")


def test_a_relative_path_is_refused_where_there_are_several_nodes(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    paths = ["s3://bucket/table", "/data", "runs/out"]
    connect(None, paths)  # one node reads it as we do
    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: nodes * 2)
    connect(None, paths[:2])
    with pytest.raises(UserError, match=r"runs/out is a relative path, and the cluster has several nodes"):
        connect(None, paths)


def test_a_mistake_found_in_a_task_is_said_without_the_tasks_traceback(cluster: None) -> None:
    import ray

    @ray.remote
    def task() -> None:
        raise UserError("give distinct ids")

    with pytest.raises(UserError) as caught, unwrap_task_errors():
        ray.get(task.remote())
    assert str(caught.value) == "give distinct ids"


@pytest.mark.parametrize("number", [errno.ENOSPC, None])
def test_what_storage_refused_in_a_task_is_said_as_it_is(cluster: None, number: int | None) -> None:
    import ray

    error = OSError(number, "no room") if number else OSError("AWS Error")

    @ray.remote
    def task() -> None:
        raise error

    def rows(table: Any) -> Any:
        raise error

    connect()
    context = ray.data.DataContext.get_current()
    before, context.max_map_retries = context.max_map_retries, 0
    try:
        for ask in (lambda: ray.get(task.remote()), lambda: ray.data.range(1).map_batches(rows).materialize()):
            with pytest.raises(OSError, match=r"no room|AWS Error") as caught, unwrap_task_errors():
                ask()
            assert not isinstance(caught.value, ray.exceptions.RayError)
            assert (caught.value.errno, str(caught.value)) == (number, str(error))
    finally:
        context.max_map_retries = before


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation"), True),
        (OSError(errno.ENOSPC, "no room"), True),
        (ConnectionResetError("reset"), True),
        (EOFError("unexpected EOF"), True),
        (OSError("When reading: AWS Error ACCESS_DENIED during GetObject operation"), False),
        (PermissionError(errno.EACCES, "denied"), False),
        (ValueError("no"), False),
    ],
)
def test_ray_data_tries_again_what_may_pass(error: Exception, again: bool) -> None:
    assert matches_error(RETRIED, format_exception(error)) == again


def total(values: list[int]) -> int:
    return sum(values)


def beside(values: list[int], holder: dict[str, Any]) -> tuple[int, int]:
    """A reference inside of an argument stays one."""
    return sum(values), sum(value_of(holder["inside"]))


def test_memory_that_no_node_has_is_refused(cluster: None) -> None:
    tasks = OnRay("select")
    assert tasks.get(tasks.submit(total, [1, 1], memory=10**6)) == 2
    with pytest.raises(UserError, match=r"select: one task needs about 9000\.0 GB .* use more --partitions"):
        tasks.submit(total, [1, 1], memory=9 * 10**12)
    assert tasks.threads == 2


@pytest.mark.parametrize("make", [Here, lambda: OnRay("select")], ids=["here", "ray"])
def test_tasks_are_the_same_here_and_on_ray(cluster: None, make: Any) -> None:
    tasks = make()
    kept = tasks.put([1, 2, 3])
    assert tasks.get(tasks.submit(total, kept)) == 6
    one, other = tasks.submit(beside, kept, {"inside": kept}, returns=2)
    assert tasks.get([one, other]) == [6, 6]
    assert tasks.cpus >= 1
    assert tasks.threads >= 1


def test_one_process_does_what_it_can_unless_a_cluster_is_named(cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert not tasks_for("select", None, [], alone=True).on_ray
    assert tasks_for("select", None, [], alone=False).on_ray
    assert tasks_for("select", "auto", [], alone=True).on_ray
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert tasks_for("select", None, [], alone=True).on_ray


def test_a_mistake_found_here_is_said_as_it_is() -> None:
    with pytest.raises(UserError, match="give distinct ids"), unwrap_task_errors():
        raise UserError("give distinct ids")
    with pytest.raises(ValueError, match="ours"), unwrap_task_errors():
        raise ValueError("ours")


def test_gpus_that_are_asked_for_may_come_to_a_cluster_of_others(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "raydpp"):
        assert plan_actors({"CPU": 4.0}, {}, 1, 1, None, own=False) == ActorPlan(1.0, 0.5, 1, 64, 1)
        assert plan_actors({"CPU": 4.0, "GPU": 1.0}, {}, 1, 2, 3, own=False) == ActorPlan(2.0, 0.5, 3, 3, 1)
    assert "wait for an autoscaler" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", "raydpp"):
        assert plan_actors({"CPU": 4.0}, {}, own=False).gpus == 0
    assert "--gpus-per-actor 1 waits for GPUs" in caplog.text
    with pytest.raises(UserError, match="can get 0"):
        plan_actors({"CPU": 4.0}, {}, 1, 1)
