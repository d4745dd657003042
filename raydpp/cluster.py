"""Where a stage's tasks and actors run: in this process, or on a Ray cluster and how much of it."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from raydpp.errors import UserError
from raydpp.progress import BarCounter, RemoteCounter, watch
from raydpp.storage import REFUSED, is_relative

PASSING = ("OSError", r"Connection\w*Error", "BrokenPipeError", "TimeoutError", "EOFError")
"""The errors that may pass by themselves, by name; a missing file or permission is none."""

RETRIED = rf"\b(?:{'|'.join(PASSING)}): (?!.*(?:{REFUSED}))"
"""Those, as Ray Data matches them."""

log = logging.getLogger(__name__)

_UNKNOWN = 64
"""The most actors where nobody says how many GPUs there can be."""

_OF_STORAGE = rf"^(?:{'|'.join(PASSING)}|PermissionError|FileNotFoundError): (?:\[Errno (\d+)\] )?(.+)"


@dataclass(frozen=True)
class ActorPlan:
    """How a stage's model actors are placed: what each has of the cluster, and how many there are."""

    gpus: float
    cpus: float  # logical
    least: int  # must be there at the start
    most: int  # the pool may grow to
    threads: int  # of the CPU, for the model of one actor

    def __str__(self) -> str:
        count = str(self.most) if self.least == self.most else f"{self.least} to {self.most}"
        gpus = f"{self.gpus:g} GPU{'s' if self.gpus > 1 else ''}"
        each = gpus if self.gpus else f"{self.threads} CPU threads, no GPU"
        return f"{count} actor{'s' if self.most > 1 else ''} with {each} each"


def checked_gpus(gpus: float) -> float:
    """The GPUs of one actor; UserError for a number that makes no sense."""
    if 0 <= gpus <= 1 or (gpus > 1 and float(gpus).is_integer()):
        return float(gpus)
    raise UserError(f"--gpus-per-actor {gpus:g}: give 0, a part of one GPU such as 0.5, or a whole number")


def plan_actors(
    now: Mapping[str, float],
    possible: Mapping[str, float],
    nodes: int = 1,
    gpus_per_actor: float | None = None,
    actors: int | None = None,
    own: bool = True,
) -> ActorPlan:
    """Decide the actors before the run, so that what cannot be had is refused instead of waited for.

    Args:
        now: The cluster's resources, as ``ray.cluster_resources()`` gives them.
        possible: What it can grow to (an autoscaling cluster), at least ``now``.
        nodes: Nodes with CPUs now.
        gpus_per_actor: GPUs for one actor; None is 1 where the cluster has or can get GPUs, else 0.
        actors: How many actors; None is one for every GPU, or one for every node without GPUs.
        own: Whether the cluster was started for this run. Of another one nobody can say what it grows to (Ray's own
            autoscalers do not): GPUs that are asked for there may come.

    Raises:
        UserError: GPUs are asked for where the cluster has none and can get none, or a number makes no sense.
    """
    gpus_possible = max(possible.get("GPU", 0.0), now.get("GPU", 0.0))
    gpus = (1.0 if gpus_possible >= 1 else 0.0) if gpus_per_actor is None else checked_gpus(gpus_per_actor)
    if actors is not None and actors < 1:
        raise UserError(f"--actors {actors}: at least one actor is needed")
    if gpus > gpus_possible and not own:
        log.warning("the cluster has no such GPU now: actors wait for an autoscaler to bring %g GPU each", gpus)
        return ActorPlan(gpus, 0.5, actors or 1, actors or _UNKNOWN, 1)
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
    if not own and gpus_per_actor is None:
        log.info("the cluster has no GPU now: actors use CPUs; --gpus-per-actor 1 waits for GPUs of an autoscaler")
    cpus = max(now.get("CPU", 1.0), 1.0)
    count = actors or max(1, nodes)
    per_actor = cpus / count
    # Reading and tokenising need a share too: a pool that takes every CPU waits for its own input forever.
    reserved = per_actor - 1 if per_actor >= 2 else per_actor / 2
    return ActorPlan(0.0, max(math.floor(reserved * 100) / 100, 0.01), count, count, max(1, math.floor(per_actor)))


def cluster_plan(gpus_per_actor: float | None, actors: int | None) -> ActorPlan:
    """``plan_actors`` for the cluster this process is connected to."""
    import ray

    return plan_actors(
        ray.cluster_resources(), growth(), OnRay("extract").nodes, gpus_per_actor, actors, is_own_cluster()
    )


class Here:
    """Tasks in this process: each runs as it is submitted, and its reference is its result. Needs no Ray."""

    on_ray = False

    @property
    def cpus(self) -> int:
        return os.cpu_count() or 1

    @property
    def nodes(self) -> int:
        return 1

    @property
    def threads(self) -> int:
        """Threads that a task alone on its node may use."""
        return self.cpus

    def counter(self, bar: Any) -> Any:
        """What tasks report their steps to; it moves the bar."""
        return BarCounter(bar)

    def put(self, value: Any) -> Any:
        """A reference to a value, to hand to many tasks."""
        return value

    def get(self, references: Any) -> Any:
        """The value behind a reference, or those behind a list of them."""
        return references

    def submit(self, function: Callable[..., Any], *arguments: Any, memory: int = 0, returns: int = 1) -> Any:
        """Run ``function(*arguments)``, references among them as values; a reference to what it returns.

        ``memory`` is what it needs at its peak, in bytes. With ``returns`` each member of the tuple that it returns
        has a reference of its own.
        """
        return function(*arguments)

    def wait(self, references: Sequence[Any], counter: Any, bar: Any, stoppable: bool = False) -> None:
        """Wait for tasks. See ``progress.watch``."""

    def as_completed(self, references: Sequence[Any]) -> Iterator[Any]:
        """What tasks return, in the order in which they end."""
        yield from references


class OnRay(Here):
    """Tasks on the cluster that this process is connected to."""

    on_ray = True

    def __init__(self, stage: str) -> None:
        self._stage = stage

    @property
    def cpus(self) -> int:
        import ray

        return max(1, int(ray.cluster_resources().get("CPU", 1)))

    @property
    def nodes(self) -> int:
        return sum(1 for node in alive_nodes() if node["Resources"].get("CPU"))

    @property
    def threads(self) -> int:
        return max([1, *(int(node["Resources"].get("CPU", 1)) for node in alive_nodes())])

    def counter(self, bar: Any) -> Any:
        return RemoteCounter()

    def put(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def get(self, references: Any) -> Any:
        import ray

        return ray.get(references)

    def submit(self, function: Callable[..., Any], *arguments: Any, memory: int = 0, returns: int = 1) -> Any:
        """As in this process, with the memory that ``memory_for`` allows; an OSError is tried again."""
        import ray

        wanted = memory_for(memory, self._stage) if memory else None
        task: Any = ray.remote(function).options(
            max_retries=3, retry_exceptions=[OSError], memory=wanted, num_returns=returns
        )
        return task.remote(*arguments)

    def wait(self, references: Sequence[Any], counter: Any, bar: Any, stoppable: bool = False) -> None:
        watch(references, counter, bar, stoppable)

    def as_completed(self, references: Sequence[Any]) -> Iterator[Any]:
        import ray

        waiting = list(references)
        while waiting:
            finished, waiting = ray.wait(waiting)
            yield from ray.get(finished)


def tasks_for(stage: str, address: str | None, paths: Sequence[str], alone: bool) -> Here:
    """Where a stage's tasks run: here, if one process can do it (``alone``) and no cluster is named, else on Ray.

    RAY_ADDRESS names a cluster too; ``paths`` are the user's, as they were given. See ``connect``.
    """
    if alone and not named_cluster(address):
        return Here()
    connect(address, paths)
    return OnRay(stage)


def memory_for(needed: int, what: str) -> int:
    """Bytes of memory to ask Ray for, so that it puts no more on a node than fits.

    Raises:
        UserError: No node has as much, and the cluster does not grow: the task would wait for ever.
    """
    most = max((node["Resources"].get("memory", 0.0) for node in alive_nodes()), default=0.0)
    if needed > most and not growth() and is_own_cluster():
        raise UserError(
            f"{what}: one task needs about {needed / 1e9:.1f} GB of memory, and the largest node has"
            f" {most / 1e9:.1f} GB for tasks: use more --partitions, a smaller --size, or larger nodes"
        )
    return needed


def value_of(reference: Any) -> Any:
    """Inside a task: the value behind a reference, or a value as it is."""
    ray = sys.modules.get("ray")
    return ray.get(reference) if ray is not None and isinstance(reference, ray.ObjectRef) else reference


def alive_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def is_own_cluster() -> bool:
    """Whether this process started the cluster that it is connected to."""
    from ray._private import worker

    return bool(worker._global_node and worker._global_node.head)


def growth() -> Mapping[str, float]:
    """What the cluster can grow to; empty where it does not grow, or does not say (Ray's own autoscalers do not)."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def named_cluster(address: str | None) -> str:
    """The Ray cluster that the user named, by address or in RAY_ADDRESS; empty where none is."""
    return address or os.environ.get("RAY_ADDRESS", "")


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
    # Ray makes a token for a cluster of its own and warns about it; nobody has to do anything.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    from unittest import mock

    import ray

    if not ray.is_initialized():
        target, terminate = named_cluster(address), signal.getsignal(signal.SIGTERM)
        if not (found := re.fullmatch(r"(?:auto|local|([^/:\s]+):(\d+))?", target)):
            raise UserError(
                f"{target!r} is no address of a Ray cluster: give HOST:PORT as ray start says it (6379 is its port), or"
                " auto for the cluster that this machine is part of; from elsewhere, submit the job: ray job submit"
            )
        try:
            if found[1]:  # Ray itself would try for many minutes
                socket.create_connection((found[1], int(found[2])), timeout=10).close()
            own = target in ("", "local")
            constants = ray._private.ray_constants
            # All ports of a cluster of one's own are on loopback, as Ray has it on macOS and Windows anyway.
            with mock.patch.object(constants, "ENABLE_RAY_CLUSTER", constants.ENABLE_RAY_CLUSTER and not own):
                ray.init(
                    address=target or "local",
                    include_dashboard=None if target else False,  # nine processes and a port that nobody asked for
                    logging_level=logging.WARNING,
                    log_to_driver=False,
                )
        except (OSError, OverflowError) as error:
            raise UserError(f"no Ray cluster answers at {target}: {error}") from error
        except RuntimeError as error:
            if "ersion mismatch" not in str(error):
                raise
            raise UserError(
                f"the Ray cluster at {target} runs other versions: {' '.join(str(error).split())}"
            ) from error
        if callable(terminate) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, terminate)  # Ray's core has put one there that only prints a trace
    relative = [path for path in paths if is_relative(path)]
    if relative and len(alive_nodes()) > 1:
        raise UserError(
            f"{relative[0]} is a relative path, and the cluster has several nodes: give a URL such as s3://bucket/...,"
            " or the absolute path of storage that all nodes share"
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False  # the stages show their own, one bar each
    context.print_on_execution_start = False
    # what passes, such as storage that does not answer, is tried again: five times, up to half a minute apart
    context.retried_map_errors, context.max_map_retries = [RETRIED], 5
    context.issue_detectors_config.detectors = []  # would write through the bars what nobody can act on
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that its bars are off
    # says that a task failed, in its own words: the stage says why
    logging.getLogger("ray.data._internal.execution.streaming_executor_state").setLevel(logging.CRITICAL)


@contextmanager
def unwrap_task_errors() -> Iterator[None]:
    """Turn what a Ray task raised into what it means: a mistake of the user's or of storage, wherever it was found."""
    try:
        yield
    except Exception as error:
        ray = sys.modules.get("ray")
        if ray is None or not isinstance(error, (ray.exceptions.RayError, SystemError)):
            raise
        seen: BaseException | None = error
        while seen is not None:
            inner = getattr(seen, "cause", None)  # first: a task's error has its class too, and a traceback
            if isinstance(inner, BaseException):
                seen = inner
                continue
            if isinstance(seen, UserError) or (isinstance(seen, OSError) and not hasattr(seen, "cause")):
                raise seen from None
            seen = seen.__cause__ or seen.__context__
        # Ray Data pickles what a user's class raised without its cause: only the traceback's text still names it.
        if found := re.findall(r"raydpp\.errors\.UserError: (.+)", str(error)):
            raise UserError(found[-1]) from None
        if storage := re.findall(_OF_STORAGE, str(error), re.MULTILINE):
            number, words = storage[-1]
            raise (OSError(int(number), words) if number else OSError(words)) from None
        raise
