from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from raydpp.errors import UserError
from raydpp.refresh import lease as module
from raydpp.refresh.lease import lease
from raydpp.runs import LEASE as NAME
from raydpp.storage import Folder


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SETTLE", 0.05)


def held_by(folder: Path, process: int, host: str, renewed: float) -> None:
    Folder.at(folder).write_json(NAME, {"token": "t", "host": host, "process": process, "renewed": renewed})


def test_one_at_a_time_and_free_afterwards(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path)
    with lease(folder):
        with pytest.raises(UserError, match=rf"process {os.getpid()} on .*: wait until it has ended"), lease(folder):
            pass
        assert (tmp_path / NAME).exists()
    assert not (tmp_path / NAME).exists()
    with pytest.raises(KeyError), lease(folder):
        raise KeyError
    with lease(folder):
        pass


def test_a_process_that_is_gone_holds_nothing_on_its_host_and_little_elsewhere(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    held_by(tmp_path, gone.pid, socket.gethostname(), time.time())
    with lease(Folder.at(tmp_path)):
        pass
    held_by(tmp_path, gone.pid, "elsewhere", time.time() - 100)
    ends = pytest.raises(UserError, match=r"process \d+ on elsewhere.*its lease ends in (19|20) s")
    with ends, lease(Folder.at(tmp_path)):
        pass
    held_by(tmp_path, gone.pid, "elsewhere", time.time() - 121)
    with lease(Folder.at(tmp_path)):
        pass
    (tmp_path / NAME).write_text("{torn")
    with lease(Folder.at(tmp_path)):
        pass


def test_it_is_renewed_while_it_is_held_but_not_over_anothers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SECONDS", 0.3)
    with lease(Folder.at(tmp_path)):
        first = json.loads((tmp_path / NAME).read_text())["renewed"]
        time.sleep(0.3)
        assert json.loads((tmp_path / NAME).read_text())["renewed"] > first
        held_by(tmp_path, 1, "elsewhere", 1.0)
        time.sleep(0.2)
    assert json.loads((tmp_path / NAME).read_text())["host"] == "elsewhere"


def test_of_two_that_start_at_once_one_goes_on(tmp_path: Path) -> None:
    found: list[str] = []
    barrier = threading.Barrier(4)

    def start() -> None:
        barrier.wait()
        try:
            with lease(Folder.at(tmp_path)):
                found.append("held")
                time.sleep(0.3)
        except UserError:
            found.append("refused")

    threads = [threading.Thread(target=start) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == ["held", "refused", "refused", "refused"]
