"""One progress bar a stage: on a terminal, or as records of the log; and Ctrl-C that reaches the tasks."""

from __future__ import annotations

import io
import logging
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm

from raydpp.metrics import count
from raydpp.report.table import visible

log = logging.getLogger(__name__)

_LINE = "{desc}: {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


def progress_bar(stage: str, total: int | None, unit: str, done: int = 0) -> Any:
    """A bar on a terminal; off a terminal (a job's log, a file) a record of the log every ten seconds at the most.

    ``done`` was done before, and is no part of the rate. Picks are counted as they are shown (``metrics``).
    """
    common: dict[str, Any] = {"total": total, "desc": visible(stage), "initial": done}
    if sys.stderr.isatty():
        return _Bar(**common, unit=f" {unit}", dynamic_ncols=True, mininterval=0.2)
    return _Lines(**common, unit=unit, file=io.StringIO(), mininterval=10, bar_format=_LINE)


class _Bar(tqdm):
    """Counts picks."""

    def __init__(self, **settings: Any) -> None:
        self._counted = settings["initial"]
        super().__init__(**settings)

    def display(self, *arguments: Any, **options: Any) -> None:
        self._count()
        super().display(*arguments, **options)

    def _count(self) -> None:
        if self.unit.strip() == "picks":
            count("picks", self.n - self._counted)
            self._counted = self.n


class _Lines(_Bar):
    """Each state of a bar is a record of the log, with its numbers for those who read logs by machine."""

    def display(self, *_: Any, **__: Any) -> None:
        self._count()
        seconds, rate = self.format_dict["elapsed"], self.format_dict["rate"]
        if rate is None and seconds:
            rate = (self.n - self.initial) / seconds
        numbers = {"done": self.n, "total": self.total, "unit": self.unit, "rate": rate, "seconds": seconds}
        log.info("%s", str(self), extra={"event": "progress", **numbers})


class BarCounter:
    """Moves a bar as a task in this process reports its steps."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def add(self, steps: int, gain: float) -> bool:
        """Book steps and the last one's log gain; whether the task is to stop."""
        _show_gain(self._bar, gain)
        self._bar.update(steps)
        return False


class RemoteCounter:
    """Adds up what tasks on the cluster report, and tells them when to stop; it travels with each."""

    def __init__(self) -> None:
        import ray

        self._actor: Any = ray.remote(num_cpus=0)(Counter).remote()

    def add(self, steps: int, gain: float) -> bool:
        """Book steps and the last one's log gain; whether the task is to stop."""
        import ray

        return bool(ray.get(self._actor.add.remote(steps, gain)))

    def state(self) -> tuple[int, float]:
        """All steps, and the last log gain."""
        import ray

        found: tuple[int, float] = ray.get(self._actor.state.remote())
        return found

    def stop(self) -> None:
        """Have every task stop at its next report."""
        import ray

        ray.get(self._actor.stop.remote())


class Counter:
    """The actor behind a ``RemoteCounter``."""

    def __init__(self) -> None:
        self._steps, self._gain, self._stopped = 0, math.nan, False

    def add(self, steps: int, gain: float = math.nan) -> bool:
        self._steps += steps
        self._gain = gain
        return self._stopped

    def state(self) -> tuple[int, float]:
        return self._steps, self._gain

    def stop(self) -> None:
        self._stopped = True


def reporter(counter: Any, every: float = 0.5) -> Callable[[int, float], None]:
    """A callback for a search inside a task: reports to the counter now and then how far it has come.

    Raises KeyboardInterrupt in the task where the counter says that it is to stop.
    """
    sent, when = 0, time.monotonic()

    def report(steps: int, gain: float) -> None:
        nonlocal sent, when
        if time.monotonic() - when >= every:
            if counter.add(steps - sent, gain):
                raise KeyboardInterrupt
            sent, when = steps, time.monotonic()

    return report


def watch(references: Sequence[Any], counter: RemoteCounter, bar: Any, stoppable: bool = False) -> None:
    """Wait for tasks, moving the bar as they report; raises what the first failing one raised.

    Args:
        references: The tasks.
        counter: What they report to.
        bar: What to move.
        stoppable: Whether Ctrl-C ends the tasks with what they have, rather than this wait with a KeyboardInterrupt.
    """
    import ray

    waiting, stopped = list(references), False
    while waiting:
        try:
            finished, waiting = ray.wait(waiting, timeout=0.3)
            ray.get(finished)  # raises early; a finished task's result stays in the object store
            steps, gain = counter.state()
            bar.n = steps if bar.total is None else min(steps, bar.total)
            if len(references) > 1:
                bar.set_postfix(tasks=f"{len(references) - len(waiting)}/{len(references)}", refresh=False)
            else:
                _show_gain(bar, gain)
            bar.update(0)
        except KeyboardInterrupt:
            if not stoppable or stopped:
                raise
            stopped = True
            counter.stop()


def _show_gain(bar: Any, gain: float) -> None:
    if not math.isnan(gain):
        bar.set_postfix(log_gain=f"{gain:.3f}", refresh=False)
