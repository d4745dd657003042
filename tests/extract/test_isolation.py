from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from raydpp.errors import UserError
from raydpp.extract.isolation import IsolatedExtractor
from raydpp.gradients.config import ExampleFeatures
from raydpp.gradients.tokenization import TokenizedExample


def example(token: int) -> TokenizedExample:
    return TokenizedExample(np.array([token, 1], np.int32), np.array([False, True]), False)


def loader(deadly: set[int]) -> object:
    def extract(examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        tokens = [int(one.ids[0]) for one in examples]
        if deadly & set(tokens):
            os.kill(os.getpid(), signal.SIGKILL)
        features = np.eye(100, dtype=np.float32)[tokens]
        norms = np.array(tokens, np.float32)
        return ExampleFeatures(features, norms, norms, None, [None] * len(tokens), 2 * len(tokens))

    return lambda: extract


def test_examples_that_kill_the_process_get_a_reason_and_the_others_their_features() -> None:
    isolated = IsolatedExtractor(loader({3}))  # type: ignore[arg-type]
    found = isolated([example(token) for token in range(1, 6)])
    isolated.close()
    assert [reason is None for reason in found.reasons] == [True, True, False, True, True]
    assert "even alone" in str(found.reasons[2])
    assert found.features.argmax(1).tolist() == [1, 2, 0, 4, 5]
    assert not found.features[2].any()
    assert found.losses is not None
    assert found.losses.tolist() == [1, 2, 0, 4, 5]
    assert found.difficulties is None


def test_the_process_that_children_are_forked_from_may_die(monkeypatch: pytest.MonkeyPatch) -> None:
    submit, asked = ProcessPoolExecutor.submit, []

    def once(pool: ProcessPoolExecutor, *arguments: Any) -> Any:
        asked.append(arguments)
        if len(asked) == 1:
            raise EOFError("unexpected EOF")  # what is seen where it died as it was asked for a child
        return submit(pool, *arguments)

    monkeypatch.setattr(ProcessPoolExecutor, "submit", once)
    isolated = IsolatedExtractor(loader({3}))  # type: ignore[arg-type]
    os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)  # type: ignore[attr-defined]
    found = isolated([example(token) for token in (1, 3, 2)])  # needs another child
    isolated.close()
    assert [reason is None for reason in found.reasons] == [True, False, True]


def test_a_process_that_dies_on_everything_is_not_the_examples_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydpp.extract.isolation._DEATHS", 2)
    isolated = IsolatedExtractor(loader({1, 2, 3}))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not the data's fault"):
        isolated([example(token) for token in (1, 2, 3)])
    isolated.close()


def test_what_is_wrong_with_the_model_is_raised_to_the_caller() -> None:
    def broken() -> None:
        raise UserError("there is no such model")

    with pytest.raises(UserError, match="no such model"):
        IsolatedExtractor(broken)  # type: ignore[arg-type]


ACTOR = """
import os, time
from raydpp.extract import isolation
isolation._LIBRARIES.clear()
if __name__ == "__main__":
    print(isolation.IsolatedExtractor(lambda: None)._pool.submit(os.getpid).result(), flush=True)
    time.sleep(60)
"""


def test_the_model_does_not_outlive_its_actor(tmp_path: Path) -> None:
    script = tmp_path / "actor.py"
    script.write_text(ACTOR)
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        child = psutil.Process(int(actor.stdout.readline()))
        assert child.is_running()
        actor.kill()
    with contextlib.suppress(psutil.NoSuchProcess):
        while child.status() != psutil.STATUS_ZOMBIE:  # dead, though nobody has asked for its exit code
            time.sleep(0.1)
