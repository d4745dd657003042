"""One progress bar a stage, on standard error."""

from __future__ import annotations

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
    """An actor that adds up what the tasks of a stage report."""

    def __init__(self) -> None:
        self._done = 0

    def add(self, steps: int) -> None:
        self._done += steps

    def done(self) -> int:
        return self._done


def reporter(counter: Any, every: float = 0.5) -> Callable[[int, float], None]:
    """A callback for a search inside a task: tells the counter now and then how far it has come."""
    told, when = 0, time.monotonic()

    def report(steps: int, _gain: float) -> None:
        nonlocal told, when
        if time.monotonic() - when >= every:
            counter.add.remote(steps - told)
            told, when = steps, time.monotonic()

    return report


def watch(references: Sequence[Any], counter: Any, bar: Any) -> None:
    """Wait for tasks, moving the bar as they report; raises what the first failing one raised."""
    import ray

    waiting = list(references)
    while waiting:
        finished, waiting = ray.wait(waiting, timeout=0.3)
        ray.get(finished)  # raises early; a finished task's result stays in the object store
        bar.n = min(ray.get(counter.done.remote()), bar.total)
        bar.update(0)
