"""One progress bar a stage, on standard error; and Ctrl-C that reaches the tasks."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from tqdm import tqdm


def progress_bar(stage: str, total: int | None, unit: str) -> Any:
    """A bar on a terminal; off a terminal (a job's log, a file) it moves every ten seconds at the most."""
    off_terminal = not sys.stderr.isatty()
    return tqdm(
        total=total,
        desc=stage,
        unit=f" {unit}",
        dynamic_ncols=True,
        mininterval=10 if off_terminal else 0.2,
        ascii=True if off_terminal else None,
    )


class Counter:
    """An actor that adds up what the tasks of a stage report, and tells them when to stop."""

    def __init__(self) -> None:
        self._done = 0
        self._gain = math.nan
        self._stopped = False

    def add(self, steps: int, gain: float = math.nan) -> bool:
        """Book steps and the last one's log gain; whether the task is to stop."""
        self._done += steps
        self._gain = gain
        return self._stopped

    def done(self) -> int:
        return self._done

    def gain(self) -> float:
        return self._gain

    def stop(self) -> None:
        self._stopped = True


def reporter(counter: Any, every: float = 0.5) -> Callable[[int, float], None]:
    """A callback for a search inside a task: tells the counter now and then how far it has come.

    Raises KeyboardInterrupt in the task where the counter was told to stop.
    """
    import ray

    told, when = 0, time.monotonic()

    def report(steps: int, gain: float) -> None:
        nonlocal told, when
        if time.monotonic() - when >= every:
            if ray.get(counter.add.remote(steps - told, gain)):
                raise KeyboardInterrupt
            told, when = steps, time.monotonic()

    return report


def watch(references: Sequence[Any], counter: Any, bar: Any, stoppable: bool = False) -> bool:
    """Wait for tasks, moving the bar as they report; raises what the first failing one raised.

    Args:
        references: The tasks.
        counter: The actor they report to.
        bar: What to move.
        stoppable: Whether Ctrl-C ends the tasks with what they have, rather than this wait with a KeyboardInterrupt.

    Returns:
        Whether they were stopped.
    """
    import ray

    waiting, stopped = list(references), False
    while waiting:
        try:
            finished, waiting = ray.wait(waiting, timeout=0.3)
            ray.get(finished)  # raises early; a finished task's result stays in the object store
            done = ray.get(counter.done.remote())
            bar.n = done if bar.total is None else min(done, bar.total)
            gain = ray.get(counter.gain.remote())
            notes = {"tasks": f"{len(references) - len(waiting)}/{len(references)}"} if len(references) > 1 else {}
            if not math.isnan(gain):
                notes["log_gain"] = f"{gain:.3f}"
            bar.set_postfix(notes, refresh=False)
            bar.update(0)
        except KeyboardInterrupt:
            if not stoppable or stopped:
                raise
            stopped = True
            ray.get(counter.stop.remote())
    return stopped
