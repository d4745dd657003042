from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydpp import runs
from raydpp.errors import UserError
from raydpp.storage import Folder


def config(out: Path, **more: object) -> dict[str, object]:
    return {"out": str(out), "size": 3, "address": None, **more}


def finished(out: Path) -> runs.RunResult:
    run = runs.begin("select", config(out), ["input"])
    (out / "part").write_text("x")
    return run.finish("select: done", counts={"in": 3, "rows": 2})


def test_a_finished_run_replays_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = finished(out)
    assert not outcome.repeated
    assert (out / "_SUCCESS").exists()
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "finished"
    assert record["config"]["size"] == 3
    assert {"python", "ray", "torch"} <= record["versions"].keys()
    again = runs.begin("select", config(out, address="elsewhere"), ["input"])
    assert again.done is not None
    assert again.done.repeated
    assert "nothing to do" in again.done.summary
    assert runs.load_finished(["select"], Folder.at(out))["counts"] == {"in": 3, "rows": 2}


def test_an_unfinished_run_is_cleared_and_begun_anew(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs.begin("select", config(out), ["input"])
    (out / "left-over").write_text("x")
    with pytest.raises(UserError, match="unfinished"):
        runs.load_finished(["select"], Folder.at(out))
    assert runs.begin("select", config(out), ["input"]).done is None
    assert [path.name for path in out.iterdir()] == ["run.json"]


def test_a_mistake_found_before_any_work_does_not_claim_the_folder(tmp_path: Path) -> None:
    runs.begin("select", config(tmp_path / "out"), ["input"])
    assert runs.begin("select", config(tmp_path / "out", size=5), ["input"]).done is None


@pytest.mark.parametrize(
    ("stage", "more", "inputs", "words"),
    [
        ("select", {"size": 4}, ["input"], "its size was 3 and now is 4"),
        ("measure", {}, ["input"], "written by raydpp select"),
        ("select", {}, ["other"], "input files have changed"),
    ],
)
def test_another_runs_folder_is_refused(
    tmp_path: Path, stage: str, more: dict[str, object], inputs: list[str], words: str
) -> None:
    finished(tmp_path / "out")
    with pytest.raises(UserError, match=words):
        runs.begin(stage, config(tmp_path / "out", **more), inputs)


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.doc").write_text("x")
    with pytest.raises(UserError, match="not a raydpp run"):
        runs.begin("select", config(tmp_path), [])
    assert (tmp_path / "thesis.doc").exists()
    with pytest.raises(UserError, match="is a file"):
        runs.begin("select", config(tmp_path / "thesis.doc"), [])
    with pytest.raises(UserError, match="no folder"):
        runs.load_finished(["extract"], Folder.at(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"no run\.json"):
        runs.load_finished(["extract"], Folder.at(tmp_path))
    with pytest.raises(UserError, match="written by raydpp select: give the output folder of raydpp extract"):
        runs.load_finished(["extract"], Folder.at(finished(tmp_path / "out").out))


def test_a_folder_full_of_runs_is_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs.begin("demo", config(out), [], keep=True)
    (out / "corpus").mkdir()
    runs.begin("demo", config(out), [], keep=True)
    assert (out / "corpus").exists()


def test_a_run_that_resumes_keeps_its_work_and_counts_its_attempts(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = runs.resume("extract", config(out), ["input"])
    assert first.claim({"model": "m"}) == 1
    (out / "part").write_text("x")
    again = runs.resume("extract", config(out), ["input"])
    assert again.done is None
    assert again.claim({"model": "m"}) == 2
    assert (out / "part").exists()
    again.finish("extract: done")
    assert runs.resume("extract", config(out), ["input"]).done is not None


def test_a_finished_run_whose_input_has_grown_is_taken_up_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = runs.resume("extract", config(out), ["input"])
    run.claim({"model": "m"})
    run.finish("extract: done")
    grown = runs.resume("extract", config(out), ["more input"])
    assert grown.done is None
    assert grown.claim({"model": "m"}) == 2
    assert not (out / "_SUCCESS").exists()


def test_a_run_of_another_fingerprint_or_option_is_refused_by_name(tmp_path: Path) -> None:
    out = tmp_path / "out"
    runs.resume("extract", config(out), ["input"]).claim({"model": "m"})
    (out / "part").write_text("x")
    with pytest.raises(UserError, match="its model was 'm' and now is 'n'"):
        runs.resume("extract", config(out), ["input"]).claim({"model": "n"})
    with pytest.raises(UserError, match="its size was 3 and now is 4"):
        runs.resume("extract", config(out, size=4), ["input"])
    assert runs.resume("extract", config(out, size=4), ["input"], free=["size"]).done is None
