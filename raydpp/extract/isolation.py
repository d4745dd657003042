"""A model in a process of its own, so that an example that kills it costs nothing but itself.

Some failures cannot be caught: a segmentation fault, the kernel's out-of-memory killer, a GPU context that is lost.
Left to Ray they take the whole unit, and the actor with everything that waits for it, and Ray does not learn which
example it was. Here the process is started again, and the examples it had are halved until the one is alone.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_all_start_methods, get_context, parent_process
from typing import Any

import numpy as np
from ray import cloudpickle

from raydpp.errors import UserError
from raydpp.gradients.config import ExampleFeatures
from raydpp.gradients.tokenization import TokenizedExample

log = logging.getLogger(__name__)

Features = Callable[[Sequence[TokenizedExample]], ExampleFeatures]

# Each child is forked from a process that has the libraries loaded and has done nothing with them: a start is cheap.
_CONTEXT = get_context("forkserver" if "forkserver" in get_all_start_methods() else "spawn")
_LIBRARIES = [
    "raydpp.gradients.representations",
    "raydpp.extract.isolation",
    "transformers.models.auto.modeling_auto",
    "peft",
]

_DEATHS = 8  # examples that kill the process alone, one after the other, before it is no longer the examples' fault


class IsolatedExtractor:
    """Calls the extractor that ``load`` makes in a child process. Raises what UserError ``load`` raises there."""

    def __init__(self, load: Callable[[], Features]) -> None:
        self._load = cloudpickle.dumps(load)
        self._deaths = 0
        _CONTEXT.set_forkserver_preload(_LIBRARIES)
        self._start()

    def _start(self) -> None:
        for more in (2, 1, 0):
            self._pool = ProcessPoolExecutor(1, _CONTEXT, initializer=_die_with_parent)
            try:
                self._pool.submit(_load_in_child, self._load).result()
                return
            except BrokenProcessPool as error:
                raise UserError("the process that loads the model dies: is there memory enough for it?") from error
            except (EOFError, ConnectionError):  # the process that children are forked from is gone: another comes
                if not more:
                    raise

    def __call__(self, examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        """The features of n examples; those on which the process dies twice, the second time alone, get a reason."""
        found = self._attempt(examples)
        if found is None and len(examples) == 1:
            found = self._attempt(examples)
        if found is not None:
            self._deaths = 0
            return found
        if len(examples) > 1:
            # Which example it was died with the process. The half without it comes through in one piece, the other is
            # halved again: with n examples and one that kills, that is about log2(n) starts of the process.
            middle = len(examples) // 2
            return _joined([self(examples[:middle]), self(examples[middle:])])
        self._deaths += 1
        if self._deaths >= _DEATHS:
            raise UserError(
                f"the model's process died on {self._deaths} examples one after the other, each alone: that is not the"
                " data's fault. Look at Ray's logs (out of memory?), and run the same command again"
            )
        zero = np.zeros(1, np.float32)
        reason = "the model's process died every time it worked on this example, even alone"
        return ExampleFeatures(np.zeros((1, 1), np.float32), zero, zero, zero, [reason], len(examples[0].ids))

    def _attempt(self, examples: Sequence[TokenizedExample]) -> ExampleFeatures | None:
        """None where the process died; another one is there then."""
        try:
            return self._pool.submit(_extract_in_child, list(examples)).result()
        except BrokenProcessPool:
            log.warning("the model's process died on %d examples; it is started again", len(examples))
            self._pool.shutdown()
            self._start()
            return None

    def close(self) -> None:
        """End the process."""
        self._pool.shutdown()


def _joined(parts: list[ExampleFeatures]) -> ExampleFeatures:
    like = next((part for part in parts if None in part.reasons), parts[0])  # the others know neither D nor the columns

    def column(name: str) -> Any:
        known = getattr(like, name)  # (n, D) or (n,), or None
        if known is None:
            return None
        zeros = [np.zeros((len(part.reasons), *known.shape[1:]), known.dtype) for part in parts]
        columns = [
            getattr(part, name) if None in part.reasons else zero for part, zero in zip(parts, zeros, strict=True)
        ]
        return np.concatenate(columns)

    features, norms, losses, difficulties = map(column, ("features", "norms", "losses", "difficulties"))
    reasons = [reason for part in parts for reason in part.reasons]
    return ExampleFeatures(features, norms, losses, difficulties, reasons, sum(part.padded_tokens for part in parts))


_in_child: Any = None


def _load_in_child(load: bytes) -> None:
    global _in_child
    _in_child = cloudpickle.loads(load)()


def _extract_in_child(examples: list[TokenizedExample]) -> ExampleFeatures:
    try:
        found: ExampleFeatures = _in_child(examples)
        return found
    except getattr(sys.modules.get("torch"), "AcceleratorError", ()):
        os._exit(1)  # the device is lost to this process: every later call would fail too


def _die_with_parent() -> None:
    """A child that outlived its actor would hold the GPU's memory."""
    parent = parent_process()

    def wait() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
