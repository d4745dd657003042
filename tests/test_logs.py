from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import Any

import pytest

from raydpp.logs import LogFormat, logging_to_stderr

NOISE = """
import argparse, logging, os, sys, warnings
from raydpp import cli, errors, runs
from raydpp.progress import progress_bar

def stage():
    logging.getLogger("raydpp.x").info("of \\x1b[31m ours \\u202e")
    logging.getLogger("raydpp.x").debug("too much")
    logging.getLogger("another").warning("of %s", "another")
    logging.getLogger("another").info("too much")
    if sys.argv[2] == "well":
        import transformers
        transformers.utils.logging.get_logger("transformers").warning("of transformers")
    warnings.warn("warned")
    print("printed", "in", "parts", file=sys.stderr)
    sys.stderr.write("\\r 3% of a bar\\r")
    with progress_bar("stage", 7, "rows") as bar:
        bar.update(7)
    if sys.argv[2] == "mistake":
        raise errors.UserError("mend this")
    if sys.argv[2] == "bug":
        raise ValueError("of ours")
    return runs.RunResult("there", {"counts": {"rows": 7}, "seconds": 0.5}, "stage: 7 rows")

sys.exit(cli.run(stage, argparse.Namespace(log_format=sys.argv[1])))
"""


def spoken(form: str, how: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", NOISE, form, how], capture_output=True, text=True)


@pytest.mark.parametrize(("how", "code"), [("well", 0), ("mistake", 2), ("bug", 1)])
def test_as_json_every_line_is_an_object_whoever_wrote_it(how: str, code: int) -> None:
    found = spoken("json", how)
    assert (found.returncode, found.stdout) == (code, "")
    lines = [json.loads(line) for line in found.stderr.splitlines()]
    assert all({"time", "stage", "level", "event", "message"} <= line.keys() for line in lines)
    assert {line["stage"] for line in lines} == {"stage"}
    of = {line["message"]: line for line in lines}
    assert of["of \x1b[31m ours \u202e"]["level"] == "INFO"
    assert not set(found.stderr) & set("\x1b\u202e")
    assert (of["of another"]["logger"], of["of another"]["level"]) == ("another", "WARNING")
    stray = [line["message"] for line in lines if line["logger"] == "stderr"]
    if how == "well":  # importing it takes its time
        assert stray.pop(0) == "[transformers] of transformers"
    assert stray.pop(0).split("UserWarning: ")[1].startswith("warned")
    assert stray == ["printed in parts", "3% of a bar"]
    assert "too much" not in of
    *_, done, last = lines
    assert (done["event"], done["done"], done["total"], done["unit"]) == ("progress", 7, 7, "rows")
    assert last["event"] == ("error" if code else "summary")
    assert last["code"] == code
    if how == "well":
        assert (last["message"], last["out"], last["counts"]) == ("stage: 7 rows", "there", {"rows": 7})
    if how == "mistake":
        assert last["message"] == "raydpp stage: mend this"
    if how == "bug":
        assert "ValueError: of ours" in last["exc_info"]


def test_as_text_people_read_lines_and_the_summary_on_standard_output() -> None:
    found = spoken("text", "well")
    assert found.returncode == 0
    assert found.stdout == "stage: 7 rows\n"
    assert "of \ufffd[31m ours \ufffd" in found.stderr
    assert "stage: 7/7 rows" in found.stderr
    assert "too much" not in found.stderr


@pytest.mark.parametrize("form", ["text", "json"])
def test_afterwards_everything_is_as_it_was(form: LogFormat) -> None:
    before: list[Any] = [sys.stderr, *logging.getLogger().handlers]
    with pytest.raises(ZeroDivisionError), logging_to_stderr("stage", form):
        1 / 0  # noqa: B018
    assert [sys.stderr, *logging.getLogger().handlers] == before
