from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.refresh import lease as leases
from raydpp.refresh import stage
from raydpp.refresh.stage import checked, refresh
from raydpp.refresh.versions import Versions
from raydpp.runs import RunResult
from raydpp.select.stage import select
from raydpp.storage import Folder
from tests.conftest import WORDS, write_rows
from tests.refresh.contents import texts

WORD = WORDS.split()


def rows(first: int, count: int, mark: str = "") -> list[dict[str, Any]]:
    """Conversations that no other call with another range has."""
    return [
        {
            "prompt": f"what is {WORD[n % 20]} {WORD[n // 20 % 17]} {WORD[n // 340]}{mark}",
            "completion": " ".join(WORD[(n * 3 + j) % 22] for j in range(1 + n % 5)),
        }
        for n in range(first, first + count)
    ]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "_SETTLE", 0.0)


@pytest.fixture
def again(cluster: None, tiny_model: str, tmp_path: Path) -> Callable[..., RunResult]:
    """Refreshes OUT from the files in RAW."""
    options: dict[str, Any] = {"extract": {"dimension": 16}, "select": {"redundancy": "never"}}

    def call(size: int | None = 6, **more: Any) -> RunResult:
        return refresh([str(tmp_path / "raw")], str(tmp_path / "out"), tiny_model, size, **{**options, **more})

    return call


def latest(out: Path) -> Path:
    return out / "versions" / (out / "latest").read_text().strip()


def picks(folder: Path) -> list[str]:
    return pq.read_table(folder / "selection").sort_by("rank")["id"].to_pylist()


def test_nights_of_a_corpus_that_changes(
    again: Callable[..., RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_rows(raw / "first.jsonl", rows(0, 40))
    write_rows(raw / "zzsecret.jsonl", rows(40, 20, " zzsecret"))
    first = again()
    assert latest(out).name == "000001"
    assert first.record["cost"]["new conversations"] == 60
    assert len(picks(latest(out))) == 6

    with monkeypatch.context() as patch:
        for name in ("run_ingest", "run_extract", "run_select", "compare_versions"):
            patch.setattr(stage, name, lambda *_, **__: pytest.fail("nothing has changed"))
        assert again().repeated

    write_rows(raw / "more.jsonl", [*rows(0, 5), *rows(100, 3)])  # five are known: one row in twenty is new
    second = again()
    assert second.record["cost"]["new conversations"] == 3
    assert second.record["cost"]["tokens"] <= 0.1 * first.record["cost"]["tokens"]
    assert (out / "latest").read_text() == "000002\n"
    versions = [json.loads((out / "versions" / name / "run.json").read_text()) for name in ("000001", "000002")]
    assert versions[0]["gamma"] == versions[1]["gamma"]  # of the first
    assert versions[1]["counts"]["in"] == 63
    fresh = select(str(out / "table"), str(tmp_path / "fresh"), 6, gamma=versions[0]["gamma"], redundancy="never")
    assert picks(latest(out)) == picks(Path(fresh.out))
    changes = json.loads((out / "changes" / "000002" / "changes.json").read_text())
    old, new = (set(picks(out / "versions" / name)) for name in ("000001", "000002"))
    assert (set(changes["added"]), set(changes["removed"])) == (new - old, old - new)
    assert changes["distances"].keys() == {"000001", "000002"}
    assert "examples added" in (out / "changes" / "000002" / "report.html").read_text()

    (raw / "zzsecret.jsonl").unlink()
    third = again()
    assert third.record["left"] == 20
    assert third.record["erased"] > 0
    assert latest(out).name == "000003"
    assert third.record["cost"]["new conversations"] == 0
    assert not [name for name, text in texts(out).items() if "zzsecret" in text]
    assert len(picks(latest(out))) == 6
    assert pq.read_table(out / "table" / "gradients").num_rows == 43

    write_rows(raw / "first.jsonl", [{**row, "note": "checked"} for row in rows(0, 40)])
    assert again().record["cost"]["new conversations"] == 0
    assert latest(out).name == "000004"  # another column has come, which the examples have too
    assert '"note": "checked"' in (latest(out) / "examples.jsonl").read_text()
    os.utime(raw / "first.jsonl")
    assert again().record["version"] == "000004"  # the same in a newer file
    assert sorted(path.name for path in (out / "versions").iterdir()) == ["000002", "000003", "000004"]


def test_picks_stay_and_are_completed_or_added_to(again: Callable[..., RunResult], tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_rows(raw / "a.jsonl", rows(0, 30))
    again(size=5)
    kept = picks(latest(out))
    write_rows(raw / "b.jsonl", rows(100, 12))
    again(size=8, keep=True)
    assert picks(latest(out))[:5] == kept
    assert len(picks(latest(out))) == 8
    kept = picks(latest(out))
    write_rows(raw / "c.jsonl", rows(200, 10, " new"))
    again(size=None, add=2)
    added = picks(latest(out))[8:]
    assert picks(latest(out))[:8] == kept
    assert len(added) == 2
    corpus = {row["id"]: row["source"] for row in pq.read_table(out / "corpus" / "corpus").to_pylist()}
    assert {corpus[one] for one in added} == {"c"}
    sources = {corpus[one] for one in picks(latest(out))}
    (raw / "a.jsonl").unlink()  # what is left of it is a version too, and nothing has come
    again(size=None, add=2)
    assert sources == {"a", "b", "c"} or sources == {"a", "c"}
    assert picks(latest(out)) == [one for one in [*kept, *added] if corpus[one] != "a"]


def test_a_search_that_ctrl_c_ended_makes_no_version(
    again: Callable[..., RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_rows(tmp_path / "raw" / "a.jsonl", rows(0, 12))

    def interrupted(*_: Any, **__: Any) -> RunResult:
        return RunResult("out", {"status": "interrupted"}, "some picks")

    monkeypatch.setattr(stage, "run_select", interrupted)
    with pytest.raises(KeyboardInterrupt):
        again()
    assert not (tmp_path / "out" / "latest").exists()
    assert not (tmp_path / "out" / "lease.json").exists()


STEPS = ("run_ingest", "run_extract", "run_select", "compare_versions", "publish", "erase", "retain")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.slow
def test_ended_anywhere_it_leaves_the_latest_version_and_goes_on(
    again: Callable[..., RunResult], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, after: bool
) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_rows(raw / "a.jsonl", rows(0, 30))
    write_rows(raw / "zzsecret.jsonl", rows(40, 10, " zzsecret"))
    again(size=5)
    before = texts(latest(out))
    (raw / "zzsecret.jsonl").unlink()
    write_rows(raw / "b.jsonl", rows(100, 5))
    owner: Any = stage if hasattr(stage, step) else Versions
    real = getattr(owner, step)

    def ending(*arguments: Any, **options: Any) -> None:
        if after:
            real(*arguments, **options)
        raise OSError("the machine is gone")

    with monkeypatch.context() as patch:
        patch.setattr(owner, step, ending)
        with pytest.raises(OSError, match="gone"):
            again(size=5)
    published = STEPS.index(step) > 3 and not (step == "publish" and not after)
    published = published or step == "compare_versions"
    assert latest(out).name == ("000002" if published else "000001")
    if not published:
        assert texts(latest(out)) == before
    found = again(size=5)
    assert latest(out).name == "000002"
    assert found.record["version"] == "000002"
    assert not [name for name, text in texts(out).items() if "zzsecret" in text]
    gamma = json.loads(before["run.json"])["gamma"]
    fresh = select(str(out / "table"), str(tmp_path / "fresh"), 5, gamma=gamma, redundancy="never")
    assert picks(latest(out)) == picks(Path(fresh.out))
    assert pq.read_table(out / "table" / "gradients").num_rows == 35
    assert again(size=5).repeated


@pytest.mark.slow
def test_killed_at_any_time_the_next_start_finishes(tiny_model: str, tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    write_rows(raw / "a.jsonl", rows(0, 60))
    config = tmp_path / "refresh.yaml"
    settings = {"inputs": [str(raw)], "out": str(out), "model": tiny_model, "size": 6, "extract": {"dimension": 16}}
    config.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "raydpp.cli", "refresh", "--config", str(config)]
    kills = 0
    for seconds in (2, 5, 8, 11, 14, 17, 20):
        process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            process.wait(seconds)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            kills += 1
            if (out / "latest").exists():
                assert len(picks(latest(out))) == 6
    assert kills
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    ids = pq.read_table(out / "table" / "gradients")["id"].to_pylist()
    assert len(ids) == len(set(ids)) == 60
    assert len(picks(latest(out))) == 6
    began = time.monotonic()
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "nothing to do" in again.stdout
    assert "torch" not in sys.modules or time.monotonic() - began < 60


def test_mistakes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = write_rows(tmp_path / "raw" / "a.jsonl", rows(0, 3))
    for options, sentence in (
        ({}, "no budget: give --size or --add"),
        ({"size": 3, "retain": 0}, "at least the latest version is kept"),
        ({"add": 3, "size": 3}, "neither --keep nor --size beside it"),
        ({"add": 0}, "give a whole number above 0"),
        ({"size": 3, "select": {"gama": 2}}, "select has no option gama: raydpp select --help"),
        ({"size": 3, "select": {"table": "x"}}, "table among the options of select: refresh gives it itself"),
        ({"size": 3, "extract": {"out": "x"}}, "out among the options of extract"),
        ({"size": 3, "ingest": {"incremental": False}}, "incremental among the options of ingest"),
    ):
        with pytest.raises(UserError, match=sentence):
            refresh([raw], str(tmp_path / "out"), "m", **options)
    assert not (tmp_path / "out").exists()
    with pytest.raises(SystemExit) as ended:
        checked("select", {"quality_weight": "much"})
    assert ended.value.code == 2
    assert checked("select", {"gamma": "auto", "quality": ["loss=-1"], "min_log_gain": "-3"}) == {
        "gamma": "auto",
        "quality": ["loss=-1"],
        "min_log_gain": -3.0,
    }
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.txt").write_text("dear")
    with pytest.raises(UserError, match="exists and is not a raydpp run"):
        refresh([raw], str(tmp_path / "foreign"), "m", 3)
    assert Folder.at(tmp_path / "foreign").files() == ["thesis.txt"]
