"""A lease on a folder of any file system: one refresh at a time, and none for ever once its process is gone."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from raydpp.errors import UserError
from raydpp.runs import LEASE as NAME
from raydpp.storage import Folder

SECONDS = 120.0
"""How long a lease holds without a sign of life."""

_SETTLE = 1.0  # seconds until all who took it at the same moment have written: the last one has it


@contextmanager
def lease(folder: Folder) -> Iterator[None]:
    """Hold the folder. A thread renews the lease; where the process dies, it ends by itself.

    Object stores cannot create a file only where there is none: two who start within a second of one another both
    write, and whoever reads another's token afterwards gives way. What they may still have written beside one another
    is for the owner's token of each run to tell (``runs.require_owner``).

    Raises:
        UserError: Another process holds it.
    """
    if (holder := _read(folder)) and (left := _seconds_left(holder)) > 0:
        raise UserError(
            f"another refresh of {folder} is at work, process {holder['process']} on {holder['host']}, which gave a"
            f" sign of life {time.time() - holder['renewed']:.0f} s ago: wait until it has ended. If it was killed, its"
            f" lease ends in {max(left, 1):.0f} s"
        )
    mine = {"token": uuid.uuid4().hex, "host": socket.gethostname(), "process": os.getpid()}
    _renew(folder, mine)
    time.sleep(_SETTLE)
    if (now := _read(folder)) is None or now["token"] != mine["token"]:
        raise UserError(f"another refresh of {folder} was started at the same moment, and goes on; this one has ended")
    ended = threading.Event()

    def keep() -> None:
        while not ended.wait(SECONDS / 6):
            with suppress(OSError):  # the next time, or the lease ends
                if (now := _read(folder)) and now["token"] == mine["token"]:
                    _renew(folder, mine)

    thread = threading.Thread(target=keep, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        if (now := _read(folder)) and now["token"] == mine["token"]:
            folder.delete(NAME)


def _renew(folder: Folder, mine: dict[str, Any]) -> None:
    with suppress(FileNotFoundError):  # another writes it at the same moment, and has moved it to its name
        folder.write_json(NAME, {**mine, "renewed": time.time()})


def _read(folder: Folder) -> dict[str, Any] | None:
    try:
        found = json.loads(folder.read_text(NAME) or "null")
    except ValueError:
        return None
    return found if isinstance(found, dict) and {"token", "host", "process", "renewed"} <= found.keys() else None


def _seconds_left(holder: dict[str, Any]) -> float:
    if holder["host"] == socket.gethostname():  # there it can be seen whether the process lives
        try:
            os.kill(holder["process"], 0)
        except ProcessLookupError:
            return 0.0
        except PermissionError:
            pass
    return float(holder["renewed"]) + SECONDS - time.time()
