from __future__ import annotations

import errno
import inspect
import json
import logging
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from jsonargparse import Namespace

from raydpp import runs
from raydpp.cli import COMMANDS, find_stage, main, parse_docstring, run, run_job, stage_parser
from raydpp.errors import UserError
from raydpp.ingest.stage import ingest
from raydpp.report.table import Table
from raydpp.select.partition_merge import OVERSAMPLE

HEAVY = ("torch", "transformers", "scipy", "sklearn", "vl_convert", "ray", "peft")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    stage = find_stage(name)
    parser = stage_parser(stage)
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert not undocumented
    _, groups = parse_docstring(stage.__doc__ or "")
    explained = [option for helps in groups.values() for option in helps]
    assert sorted(explained) == sorted(inspect.signature(stage).parameters)
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_the_options_of_select_come_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["select", "--help"])
    shown = capsys.readouterr().out
    groups = {
        "What to select by": "--kernel",
        "Budget": "--tokens",
        "Per source": "--min-per-source",
        "Already owned": "--owned",
        "Scale": "--partitions",
        "Output": "--out",
    }
    places = [shown.index(text) for title, flag in groups.items() for text in (f"\n{title}:\n", f"\n  {flag} ")]
    assert places == sorted(places)


def test_a_docstring_has_a_description_and_groups_of_parameters() -> None:
    text = """One line.

    A paragraph: with a colon,
    and another line.

    Args:
        a: First.

    How much:
        b_c: Second: such as 1:2,
            over two lines.
        d: Third.
    """
    description, groups = parse_docstring(text)
    assert description == "One line.\n\nA paragraph: with a colon,\nand another line.\n\n"
    assert groups == {
        "Args": {"a": "First."},
        "How much": {"b_c": "Second: such as 1:2, over two lines.", "d": "Third."},
    }


def test_flags_and_files_mean_the_same(tmp_path: Path) -> None:
    parser = stage_parser(ingest)
    (tmp_path / "c.yaml").write_text("inputs: [a, b]\nout: o\ncarry: [x, y]\nfiles: 3\n")
    from_file = parser.parse_args(["--config", str(tmp_path / "c.yaml"), "--files", "4"])
    flags = parser.parse_args(["a", "b", "--out", "o", "--carry", "x", "y", "--files", "4"])
    assert {k: v for k, v in vars(from_file).items() if k != "config"} == {
        k: v for k, v in vars(flags).items() if k != "config"
    }


def test_a_run_replays_from_its_record(cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "Q", "completion": "A"}) + "\n")
    assert main(["ingest", str(tmp_path / "a.jsonl"), "--out", str(tmp_path / "one"), "--files", "2"]) == 0
    record = str(tmp_path / "one" / "run.json")
    assert run_job(ingest, ["--config", record, "--out", str(tmp_path / "two")]) == 0
    assert "1 kept" in capsys.readouterr().out
    again = json.loads((tmp_path / "two" / "run.json").read_text())
    assert again["config"]["files"] == 2
    assert main(["ingest", "--config", record]) == 0
    assert "nothing to do" in capsys.readouterr().out


def test_a_mistake_is_one_line_and_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ingest", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert "does not exist" in error
    assert "Traceback" not in error
    with pytest.raises(SystemExit) as ended:
        main(["select", "table", "--out", "x", "--size", "many"])
    assert ended.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), 3),
        (OSError(errno.ECONNREFUSED, "Connection refused"), 3),
        (OSError("When reading from s3: AWS Error NETWORK_CONNECTION"), 3),
        (PermissionError(errno.EACCES, "Permission denied", "/table"), 2),
        (OSError(errno.EROFS, "Read-only file system"), 2),
    ],
)
def test_what_storage_refuses_is_a_sentence(error: OSError, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> runs.RunResult:
        raise error

    assert run(stage, Namespace()) == code
    said = capsys.readouterr().err
    assert str(error) in said
    assert ("the same command again goes on" in said) == (code == 3)


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """A file system at tmp_path/disk with 12 kB of room; called, it is mounted again with other options."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options: str) -> int:
        return subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", disk], capture_output=True).returncode

    if not shutil.which("mount") or mount("size=12k"):
        pytest.skip("file systems cannot be mounted here")
    yield lambda options: (mount(f"remount,{options}") and pytest.fail(options)) or None
    subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("stage", ["ingest", "select", "measure", pytest.param("extract", marks=pytest.mark.slow)])
def test_a_full_disk_is_a_sentence_and_with_room_the_same_command_goes_on(
    stage: str, full_disk: Callable[[str], None], table: str, corpus: str, tiny_model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    given = {
        "ingest": [str(Path(corpus).parent / "raw"), "--files", "8"],
        "extract": [corpus, "--model", tiny_model, "--dimension", "64", "--rows-per-file", "8"],
        "select": [table, "--size", "10"],
        "measure": [table],
    }[stage]
    command = [stage, *given, "--out", str(tmp_path / "disk" / "out")]
    assert main(command) == 3
    error = capsys.readouterr().err
    assert "No space left on device; when that has passed, the same command again goes on" in error
    assert "Traceback" not in error
    assert not (tmp_path / "disk" / "out" / "_SUCCESS").exists()
    full_disk("size=9m")
    assert main(command) == 0
    full_disk("ro")
    assert main(command) == 0  # nothing to do, and nothing to write
    capsys.readouterr()
    assert main([*command[:-1], str(tmp_path / "disk" / "other")]) == 2
    assert "Read-only file system" in capsys.readouterr().err


def test_names_never_reach_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    def stage() -> runs.RunResult:
        logging.getLogger("raydpp").warning("log \x1b[31m")
        raise UserError("no \x1b[2J\u202e file")

    assert run(stage, Namespace()) == 2
    assert "no \ufffd[2J\ufffd file" in capsys.readouterr().err
    record = {"summary": "s\x07", "paths": ["\x9b1m"], "tables": [Table("\x1b", ["a"], [["\u2066x"]]).record]}
    assert run(lambda: runs.RunResult("out", record, "s\x07"), Namespace()) == 0
    assert not set(capsys.readouterr().out) & set("\x1b\x9b\x07\u2066")


def test_what_rows_hold_is_said_to_nobody(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"role": "user", "content": "SECRET"}, {"role": "assistant", "content": "SECRET"}]
    rows = [turns, turns[:1], "SECRET", [{"role": "SECRET", "content": "x"}], [{"role": "user", "content": ["SECRET"]}]]
    lines = [json.dumps({"messages": row}) for row in rows]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, '{"messages": SECRET']))
    (tmp_path / "b.csv").write_text('prompt,completion\nSECRET,SECRET\n"SECRET,x\n')
    (tmp_path / "c.json").write_text('[{"prompt": "SECRET", "completion": "b"}, SECRET]')
    files = [str(tmp_path / name) for name in ("a.jsonl", "b.csv", "c.json")]
    assert main(["ingest", *files, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr()
    assert "10 rows in = 2 kept + 1 duplicates + 7 rejects" in said.out
    assert "SECRET" not in said.out + said.err


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\x89PNG\r\n\x1a\n\x00\xff", "the file of --config is not text"),
        (b"a: &a [1, 2]\nsize: *a\n", "an alias (*name): write out what it stands for"),
        (b"size: [" + b"[" * 300 + b"]" * 300 + b"]", "--size"),
        (b'size: "' + b"x\\x1b[2J" * 9_000 + b'"', "--size"),
        (b"- 1\n- 2\n", "config"),
    ],
)
def test_a_config_that_is_none_is_a_short_sentence(
    content: bytes, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["select", "table", "--out", "x", "--config", str(tmp_path / "config.yaml")])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error) < 1_000
    assert "\x1b" not in error


STANDING = """
import argparse, sys, time
from raydpp import cli
from raydpp.cluster import connect

def stage():
    if sys.argv[1] == "ray":
        connect()
    print("begun", flush=True)
    time.sleep(100)

sys.exit(cli.run(stage, argparse.Namespace()))
"""


@pytest.mark.parametrize(("number", "on", "code"), [(signal.SIGTERM, "ray", 143), (signal.SIGINT, "here", 130)])
def test_a_signal_ends_a_stage_in_words(number: int, on: str, code: int) -> None:
    # as a cluster's nodes, Kubernetes and `ray job stop` do; twice, as people do who cannot wait
    with subprocess.Popen(
        [sys.executable, "-c", STANDING, on], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        assert process.stdout.readline() == "begun\n"
        if on == "ray":  # of a cluster of one's own nothing listens to the network
            running = psutil.Process(process.pid).children(recursive=True)
            sockets = [one for child in running for one in child.net_connections("inet") if one.status == "LISTEN"]
            assert len(sockets) > 3
            assert all("127.0.0.1" in one.laddr.ip for one in sockets)
        process.send_signal(number)
        time.sleep(0.3)
        process.send_signal(number)
        _, error = process.communicate(timeout=60)
    assert process.returncode == code
    assert error.count("the same command again resumes") == 1
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--size", "many"], "--size many: give a number"),
        (["--tokens", "1.5"], "--tokens 1.5: give a whole number"),
        (["--kernel", "linear"], "--kernel linear: give one of rbf, cosine"),
        (["--sise", "3"], "unrecognized arguments: --sise 3"),
        (["--config", "nowhere.yaml"], "File does not exist"),
    ],
)
def test_a_wrong_option_is_said_in_a_sentence(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["select", "table", "--out", "x", *options])
    assert ended.value.code == 2
    usage, error = capsys.readouterr().err.splitlines()
    assert usage == "usage: raydpp select TABLE --out OUT [options]"
    assert error.startswith("raydpp select: ")
    assert said in error


def test_the_elements_of_a_list_are_checked(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["measure", "table", "--out", "x", "--reference-seeds", "1", "x"])
    assert "--reference-seeds x: give a whole number" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "required: COMMAND"),
        (["--help"], 0, "measure"),
        (["refreshed"], 2, "invalid choice"),
        *(([name, "--help"], 0, "--out OUT") for name in COMMANDS),
        *(([name, "--no-such-option"], 2, f"raydpp {name}: ") for name in COMMANDS),
        (["select", "table", "--out", "x", "--size", "many"], 2, "give a number"),
        (["select", "table", "--out", "x"], 2, "no budget"),
        (["select", "table", "--out", "x", "--size", "1", "--oversample", "0.5"], 2, "--oversample 0.5"),
        (["select", "nowhere", "--out", "x", "--size", "1"], 2, "nowhere"),
        (["measure", "nowhere", "--out", "x"], 2, "nowhere"),
        (["extract", "nowhere", "--out", "x", "--model", "m"], 2, "nowhere"),
        (["measure", "table", "--out", "x", "--subset", "uniform", "--draws", "0"], 2, "--draws 0"),
        (["cut", "nowhere", "--out", "x", "--size", "1"], 2, "nowhere"),
        (["demo", "--limit", "3"], 2, "--limit 3"),
    ],
)
def test_help_and_mistakes_need_nothing_that_takes_seconds_to_load(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    script = f"""
import sys
from raydpp.cli import main
try:
    code = main({arguments})
except SystemExit as end:
    code = end.code
print(code, sorted({{*{HEAVY}}} & set(sys.modules)))
"""
    found = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert found.stdout.splitlines()[-1] == f"{code} []"
    assert said in found.stdout + found.stderr


def test_the_oversampling_that_select_names_is_that_of_the_merge() -> None:
    parameters = inspect.signature(find_stage("select")).parameters
    assert parameters["oversample"].default == OVERSAMPLE
