"""Actors that misbehave on purpose; Ray must pickle them by value, since its workers cannot import tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
from ray import cloudpickle

from raydpp.extract.isolation import Features
from raydpp.extract.workers import FeatureActor, Work
from raydpp.gradients.representations import ExampleFeatures
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.select.shard_actors import _ShardActor

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def refusing(model: str, folder: Path, condition: str, words: str) -> str:
    """A copy of a model whose chat template refuses ``messages`` of which the condition holds, in these words."""
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = folder / "chat_template.jinja"
    refusal = "{% if " + condition + " %}{{ raise_exception('" + words + "') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    return str(folder)


class Deadly:
    """An extractor whose process dies on every example with a certain token."""

    def __init__(self, token: int, inner: Features) -> None:
        self._token = token
        self._inner = inner

    def __call__(self, examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        if any(self._token in example.ids for example in examples):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._inner(examples)


def on_cpu() -> type[FeatureActor]:
    """A FeatureActor whose model is on the CPU, for a cluster that only claims to have GPUs."""

    class OnCpu(FeatureActor):
        def __init__(self, work: Work) -> None:
            super().__init__(replace(work, plan=replace(work.plan, gpus=0.0)))

    return OnCpu


def faulty(log: Path, seconds: float = 0.0, dies_once: bool = False, deadly: int | None = None) -> type[FeatureActor]:
    """A FeatureActor that notes the ids it begins with, takes its time, and dies.

    Args:
        log: The file for the ids.
        seconds: The time it takes for a unit.
        dies_once: Whether the actor dies on the first unit.
        deadly: A token on which the model's process dies.
    """

    class Faulty(FeatureActor):
        def loader(self) -> Any:
            load = super().loader()
            return load if deadly is None else lambda: Deadly(deadly, load())

        def __call__(self, table: pa.Table) -> Any:
            with log.open("a") as stream:
                stream.write("".join(f"{identity}\n" for identity in table["id"].to_pylist()))
            time.sleep(seconds)
            marker = log.with_suffix(".died")
            if dies_once and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(table)

    return Faulty


def faulty_shard(log: Path, seconds: float = 0.0, dies_in: int = 0, deaths: int = 0) -> type[_ShardActor]:
    """A shard's actor that notes its rounds, takes its time, and dies when a round is done but not yet answered.

    Args:
        log: The file for a line of shard, round, process and node at the beginning of each round.
        seconds: The time it takes for a round.
        dies_in: The first round in which an actor may die.
        deaths: How many times one does, in all shards together.
    """

    class FaultyShard(_ShardActor):
        def advance(self, setup: list[Any], update: Any, own: Any) -> Any:
            import ray

            with log.open("a") as stream:
                node = ray.get_runtime_context().get_node_id()
                stream.write(f"{self._number} {update.number} {os.getpid()} {node}\n")
            time.sleep(seconds)
            answer = super().advance(setup, update, own)
            for marker in (log.with_suffix(f".died{death}") for death in range(deaths)):
                if update.number >= dies_in and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return answer

    return FaultyShard
