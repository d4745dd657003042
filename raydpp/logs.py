"""Where a command's log records go: lines for people, or one JSON object a line (``--log-format json``)."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Literal

from raydpp.report.table import visible

LogFormat = Literal["text", "json"]


@contextmanager
def logging_to_stderr(stage: str, form: LogFormat) -> Iterator[None]:
    """Have this project's records from INFO on, and others' from WARNING on, written to standard error.

    As JSON each has ``time``, ``stage``, ``logger``, ``level``, ``event`` and ``message``, and what the event has of
    its own. What Python code prints to standard error itself (warnings, other libraries' handlers and bars) becomes a
    record of the logger ``stderr``; what native code writes to the file descriptor does not pass here.
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Visible("%(message)s") if form == "text" else _json_formatter(stage))
    root = logging.getLogger()
    root.addHandler(handler)
    logging.getLogger("raydpp").setLevel(logging.INFO)
    try:
        with redirect_stderr(sys.stderr if form == "text" else _Records()):
            yield
    finally:
        root.removeHandler(handler)


def _json_formatter(stage: str) -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter(  # it escapes all that is not ASCII: nothing reaches a terminal raw
        ["name", "levelname", "message"],
        rename_fields={"name": "logger", "levelname": "level"},
        static_fields={"stage": stage},
        defaults={"event": "log"},
        timestamp="time",
    )


class _Visible(logging.Formatter):
    """Names of files and texts of users never reach a terminal raw."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


class _Records(io.TextIOBase):
    """A standard error, no terminal, of which every line, or lines written at once, becomes a record."""

    def __init__(self) -> None:
        self._begun = ""

    def write(self, text: str) -> int:
        self._begun += text
        if self._begun.endswith(("\n", "\r")):
            whole, self._begun = self._begun.strip(), ""
            if whole:
                logging.getLogger("stderr").warning("%s", whole)
        return len(text)
