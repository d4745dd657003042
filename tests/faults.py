"""Actors that misbehave on purpose; Ray must pickle them by value, since its workers cannot import tests."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from ray import cloudpickle

from raydpp.extract import isolation
from raydpp.extract.isolation import Features
from raydpp.extract.workers import ExtractJob, FeatureActor
from raydpp.gradients.config import ExampleFeatures
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.select.shard_actors import _ShardActor

cloudpickle.register_pickle_by_value(sys.modules[__name__])


def refusing(model: str, folder: Path, condition: str, message: str) -> str:
    """A copy of a model whose chat template refuses ``messages`` of which the condition holds, with a message."""
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    template = folder / "chat_template.jinja"
    refusal = "{% if " + condition + " %}{{ raise_exception('" + message + "') }}{% endif %}"
    template.write_text(refusal + template.read_text())
    return str(folder)


class Fake:
    """An extractor without a model: every example becomes a unit vector drawn by its tokens."""

    def __init__(self, dimension: int) -> None:
        self._dimension = dimension

    def __call__(self, examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        seeds = (np.asarray(example.ids, np.uint32) for example in examples)
        features = np.array([np.random.default_rng(seed).normal(size=self._dimension) for seed in seeds], np.float32)
        features /= np.linalg.norm(features, axis=1, keepdims=True)  # (n, D)
        ones = np.ones(len(examples), np.float32)
        return ExampleFeatures(features, ones, ones, None, [None] * len(examples), sum(len(e.ids) for e in examples))


class Deadly:
    """An extractor whose process dies on every example with a certain token."""

    def __init__(self, token: int, inner: Features) -> None:
        self._token = token
        self._inner = inner

    def __call__(self, examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        if any(self._token in example.ids for example in examples):
            os.kill(os.getpid(), signal.SIGKILL)
        return self._inner(examples)


def faulty(
    log: Path,
    deadly: int | None = None,
    dies_once: bool = False,
    gate: Path | None = None,
    free: int = 0,
    seconds: float = 0.0,
) -> type[FeatureActor]:
    """A FeatureActor with a Fake that notes the ids it begins with, dies, and stands still.

    Args:
        log: The file for the ids.
        deadly: A token on which the model's process dies.
        dies_once: Whether the actor dies on the first unit of all, before it does anything.
        gate: A file; while there is none, an actor stops in the middle of the unit after the first ``free`` ones, and
            notes its node and process in LOG.waiting.
        seconds: The time it takes for a unit, of which it notes its process in LOG.at.
    """

    class Faulty(FeatureActor):
        def __init__(self, job: ExtractJob) -> None:
            isolation._LIBRARIES[:] = ["raydpp.extract.isolation"]  # there is no model that would need the others
            self._begun = 0
            super().__init__(job)

        def loader(self) -> Any:
            fake = Fake(self._job.extractor.dimension)
            return lambda: fake if deadly is None else Deadly(deadly, fake)

        def __call__(self, table: pa.Table) -> Any:
            append(log, table["id"].to_pylist())
            marker = log.with_suffix(".died")
            if dies_once and not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            self._begun += 1
            if gate is not None and self._begun > free:
                append(log.with_suffix(".waiting"), [f"{ray.get_runtime_context().get_node_id()} {os.getpid()}"])
                while not gate.exists():
                    time.sleep(0.02)
            if seconds:
                append(log.with_suffix(".at"), [str(os.getpid())])
                time.sleep(seconds)
            return super().__call__(table)

    return Faulty


def append(file: Path, lines: list[str]) -> None:
    with file.open("a") as stream:
        stream.write("".join(f"{line}\n" for line in lines))


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
            with log.open("a") as stream:
                node = ray.get_runtime_context().get_node_id()
                stream.write(f"{self._number} {update.number} {os.getpid()} {node}\n")
            append(log.with_suffix(".at"), [str(os.getpid())])
            time.sleep(seconds)
            answer = super().advance(setup, update, own)
            for marker in (log.with_suffix(f".died{death}") for death in range(deaths)):
                if update.number >= dies_in and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            return answer

    return FaultyShard
