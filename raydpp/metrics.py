"""Counters of what a stage has done, for Prometheus, through ray.util.metrics; nothing where there is no Ray.

Ray exports each on the metrics port of its node as ``ray_raydpp_NAME_total``, with the tags ``stage`` and ``out``, the
name of the output folder. What Ray does a second time, since a node was lost, counts a second time.
"""

from __future__ import annotations

import functools
import sys
from typing import Any

COUNTERS = {
    "rows": "Rows that ingest has read, or extract has put into its table",
    "rejects": "Rows that ingest or extract could not use",
    "tokens": "Tokens that went through the model, padding left out",
    "picks": "Examples picked, by partitions, merges, rounds and baselines",
    "rounds": "Rounds of an exact search",
    "model_seconds": "Seconds that actors spent in the model, forward and backward",
    "actor_seconds": "Seconds that actors have lived; model_seconds over them is the busy share of their GPUs",
}
"""By name, what is counted."""

_tags = {"stage": "", "out": ""}


def label(stage: str, out: str) -> None:
    """Name what this process counts from now on: a stage, and its output folder by its last name."""
    _tags.update(stage=stage, out=out)


def count(name: str, more: float) -> None:
    """Add to one of COUNTERS."""
    ray = sys.modules.get("ray")
    if more > 0 and ray is not None and ray.is_initialized():
        _counter(name).inc(float(more), _tags)  # Ray refuses a number of NumPy


@functools.cache
def _counter(name: str) -> Any:
    from ray.util.metrics import Counter

    return Counter(f"raydpp_{name}", COUNTERS[name], ("stage", "out"))
