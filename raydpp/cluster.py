"""Ray, and the decision what one actor gets of it."""

from __future__ import annotations

import logging
import math
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from raydpp.errors import UserError
from raydpp.storage import is_relative


@dataclass(frozen=True)
class ActorPlan:
    """How a stage's model actors are placed.

    Attributes:
        gpus: GPUs of one actor (0 on a cluster without).
        cpus: Logical CPUs of one actor.
        least: Actors that must be there at the start.
        most: Actors the pool may grow to.
        threads: CPU threads the model may use in one actor.
    """

    gpus: float
    cpus: float
    least: int
    most: int
    threads: int

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        each = f"{self.gpus:g} GPU" if self.gpus else f"{self.threads} CPU threads, no GPU"
        return f"{count} actor{'s' if self.most > 1 else ''} with {each} each"


def plan_actors(
    now: Mapping[str, float],
    possible: Mapping[str, float],
    nodes: int = 1,
    gpus_per_actor: float | None = None,
    actors: int | None = None,
) -> ActorPlan:
    """Decide the actors before the run, so that what cannot be had is refused instead of waited for.

    Args:
        now: The cluster's resources, as ``ray.cluster_resources()`` gives them.
        possible: What it can grow to (an autoscaling cluster), at least ``now``.
        nodes: Nodes with CPUs now.
        gpus_per_actor: GPUs for one actor; None is 1 where the cluster has or can get GPUs, else 0.
        actors: How many actors; None is one for every GPU, or one for every node without GPUs.

    Raises:
        UserError: GPUs are asked for where the cluster has none and can get none, or a number makes no sense.
    """
    gpus_possible = max(possible.get("GPU", 0.0), now.get("GPU", 0.0))
    gpus = (1.0 if gpus_possible >= 1 else 0.0) if gpus_per_actor is None else float(gpus_per_actor)
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise UserError(f"--gpus-per-actor {gpus:g}: give 0, a part of one GPU such as 0.5, or a whole number")
    if actors is not None and actors < 1:
        raise UserError(f"--actors {actors}: at least one actor is needed")
    if gpus > gpus_possible:
        raise UserError(
            f"{gpus:g} GPU for each actor is asked for, but this cluster has {now.get('GPU', 0):g} and can get"
            f" {gpus_possible:g}: leave --gpus-per-actor out, set it to 0, or use a cluster with GPUs"
        )
    if gpus:
        most = math.floor(gpus_possible / gpus + 1e-9)
        if actors is not None and actors > most:
            raise UserError(
                f"--actors {actors} with {gpus:g} GPU each need {actors * gpus:g} GPUs; the cluster can get"
                f" {gpus_possible:g}: at most {most} actors"
            )
        # The pool grows as GPUs come. Half a CPU: the rest of a machine with as many CPUs as GPUs feeds its actors.
        return ActorPlan(gpus, 0.5, actors or 1, actors or most, 1)
    cpus = max(now.get("CPU", 1.0), 1.0)
    count = actors or max(1, nodes)
    per_actor = cpus / count
    # Reading and tokenising need a share too: a pool that takes every CPU waits for its own input forever.
    reserved = per_actor - 1 if per_actor >= 2 else per_actor / 2
    return ActorPlan(0.0, max(math.floor(reserved * 100) / 100, 0.01), count, count, max(1, math.floor(per_actor)))


def cluster_plan(gpus_per_actor: float | None, actors: int | None) -> ActorPlan:
    """``plan_actors`` for the cluster this process is connected to."""
    import ray
    from ray._private.state import state

    now = ray.cluster_resources()
    possible = state.get_max_resources_from_cluster_config() or {}
    nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
    return plan_actors(now, possible, nodes, gpus_per_actor, actors)


def threads_of_a_node() -> int:
    """How many CPUs the largest node of the cluster has."""
    import ray

    return max([1, *(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])])


def memory_for(need: int, what: str) -> int:
    """Bytes of memory to ask Ray for, so that it puts no more on a node than fits.

    Raises:
        UserError: No node has as much, and the cluster does not grow: the task would wait for ever.
    """
    import ray
    from ray._private.state import state

    most = max((node["Resources"].get("memory", 0.0) for node in ray.nodes() if node["Alive"]), default=0.0)
    if need > most and not state.get_max_resources_from_cluster_config():
        raise UserError(
            f"{what}: one task needs about {need / 1e9:.1f} GB of memory, and the largest node has {most / 1e9:.1f} GB"
            " for tasks: use more --partitions, a smaller --size, or larger nodes"
        )
    return need


def connect(address: str | None = None, paths: Sequence[str] = ()) -> None:
    """Connect to a Ray cluster, or start a local one; once a process.

    Args:
        address: The cluster; None is RAY_ADDRESS where that is set (as in a submitted job), else this machine.
        paths: What the user named, as it was given.

    Raises:
        UserError: No cluster answers, or a path is relative and the cluster has several nodes.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if not ray.is_initialized():
        target = address or os.environ.get("RAY_ADDRESS", "")
        try:
            if found := re.fullmatch(r"(?:ray://)?([^/]+):(\d+)", target):  # Ray itself would try for many minutes
                socket.create_connection((found[1], int(found[2])), timeout=10).close()
            ray.init(
                address=target or "local",
                include_dashboard=None if target else False,  # nine processes and a port that nobody asked for
                logging_level=logging.WARNING,
                log_to_driver=False,
            )
        except OSError as error:
            raise UserError(f"no Ray cluster answers at {target}: {error}") from error
    relative = [path for path in paths if is_relative(path)]
    if relative and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise UserError(
            f"{relative[0]} is a relative path, and the cluster has several nodes: give a URL such as s3://bucket/...,"
            " or the absolute path of storage that all nodes share"
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages show their own, one bar each
    context.print_on_execution_start = False
    context.issue_detectors_config.detectors = []  # would write through the bars what nobody can act on
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off


@contextmanager
def explain() -> Iterator[None]:
    """Turn what a Ray task raised into what it means: a user's mistake stays one, wherever it was found."""
    import ray

    try:
        yield
    except (ray.exceptions.RayError, SystemError) as error:
        seen: BaseException | None = error
        while seen is not None:
            inner = getattr(seen, "cause", None)  # first: a task's error has its class too, and a traceback
            if isinstance(inner, BaseException):
                seen = inner
                continue
            if isinstance(seen, UserError):
                raise seen from None
            seen = seen.__cause__ or seen.__context__
        # Ray Data pickles what a user's class raised without its cause: only the traceback's text still names it.
        if found := re.findall(r"raydpp\.errors\.UserError: (.+)", str(error)):
            raise UserError(found[-1]) from None
        raise
