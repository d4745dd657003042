from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import raydpp
from raydpp import runs
from raydpp.errors import UserError
from raydpp.storage import Folder

MADE = {"counts": {"in": 3, "rows": 2}, "fingerprint": {}, "corpus": "c"}


def config(out: Path, **more: object) -> dict[str, object]:
    return {"out": str(out), "size": 3, "address": None, **more}


def finished(out: Path, **facts: object) -> runs.RunResult:
    run = runs.begin("select", config(out), ["input"])
    (out / "part").write_text("x")
    return run.finish("select: done", **facts)


def test_a_finished_run_replays_and_says_so(tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = finished(out, **MADE)
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


def test_what_was_killed_while_it_cleared_a_folder_or_wrote_its_record_is_begun_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json.unfinished").write_text("{")
    assert runs.begin("select", config(out), ["input"]).done is None
    names = ("a", "z", "report.html")
    for name in names:
        (out / name).write_text("x")

    def killed(folder: Folder, name: str) -> None:
        (Path(folder.url) / name).unlink()
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "delete", killed)
        for _ in names:
            with pytest.raises(KeyboardInterrupt):
                runs.begin("select", config(out), ["input"])
    assert runs.begin("select", config(out), ["input"]).done is None
    assert [path.name for path in out.iterdir() if path.name in names] == []


def test_a_finished_run_has_no_half_written_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = runs.begin("select", config(out), ["input"])
    run.out.write_text("table/a.parquet", "abc")
    for name in ("table/b.parquet.unfinished", "report.html.unfinished"):
        (out / name).write_text("half")
    run.finish("select: done", **MADE)
    assert sorted(path.name for path in out.rglob("*") if path.is_file()) == ["_SUCCESS", "a.parquet", "run.json"]


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


def test_a_run_that_resumes_keeps_its_work_and_has_another_owner(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = runs.resume("extract", config(out), ["input"])
    owner = first.claim({"model": "m"})
    (out / "part").write_text("x")
    again = runs.resume("extract", config(out), ["input"])
    assert again.done is None
    assert again.claim({"model": "m"}) != owner
    assert (out / "part").exists()
    with pytest.raises(UserError, match="taken over"):
        first.finish("extract: done")
    assert not (out / "_SUCCESS").exists()
    again.finish("extract: done")
    assert runs.resume("extract", config(out), ["input"]).done is not None


def test_of_two_starts_at_once_the_later_one_finishes_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = runs.begin("measure", config(out), ["input"])
    (out / "part").write_text("first's")
    second = runs.begin("measure", config(out), ["input"])
    for end in (first.finish, first.interrupt):
        with pytest.raises(UserError, match="taken over by another start"):
            end("measure: done")
    assert sorted(path.name for path in out.iterdir()) == ["run.json"]
    second.finish("measure: done")
    assert (out / "_SUCCESS").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda out: (out / "table" / "b.parquet").unlink(), "b.parquet is missing"),
        (lambda out: (out / "table" / "_temporary.parquet").mkdir(), None),
        (lambda out: (out / "rejects" / "r.jsonl").unlink(), "r.jsonl is missing"),
        (lambda out: (out / "table" / "a.parquet").write_text("with a column more"), None),
        (lambda out: (out / "report.html").unlink(), None),
        (lambda out: (out / "notes.jsonl").write_text("mine"), None),
        (lambda out: (out / "table" / "notes.txt").write_text("mine"), None),
    ],
)
def test_what_became_of_a_finished_runs_files_is_noticed(
    tmp_path: Path, change: Callable[[Path], object], words: str | None
) -> None:
    out = tmp_path / "out"
    run = runs.begin("select", config(out), ["input"])
    for name in ("table/a.parquet", "table/b.parquet", "rejects/r.jsonl"):
        run.out.write_text(name, "abc")
    run.out.write_text("report.html", "<html>")
    assert set(run.finish("select: done", **MADE).record["files"]) == {
        "table/a.parquet",
        "table/b.parquet",
        "rejects/r.jsonl",
    }
    assert runs.begin("select", config(out), ["input"]).done
    change(out)
    if words is None:
        assert runs.load_finished(["select"], Folder.at(out))
        assert runs.begin("select", config(out), ["input"]).done
        return
    with pytest.raises(UserError, match=words):
        runs.load_finished(["select"], Folder.at(out))
    assert runs.begin("select", config(out), ["input"]).done is None  # and so comes back


@pytest.mark.parametrize("name", ["table/c.parquet", "table/_temporary/c.parquet", "more/d.jsonl"])
def test_a_foreign_file_in_a_finished_runs_folder_is_refused_and_nothing_is_lost(tmp_path: Path, name: str) -> None:
    out = tmp_path / "out"
    run = runs.begin("select", config(out), ["input"])
    run.out.write_text("table/a.parquet", "abc")
    run.finish("select: done", **MADE)
    run.out.write_text(name, "x")
    for ask in (
        lambda: runs.load_finished(["select"], Folder.at(out)),
        lambda: runs.begin("select", config(out), ["input"]),
        lambda: runs.resume("select", config(out), ["input"]),
    ):
        with pytest.raises(UserError, match=f"{name} was not written by the raydpp select .* take it away"):
            ask()
    assert (out / "table" / "a.parquet").exists()


def test_a_record_without_what_it_has_to_say_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out, counts={})  # without a fingerprint
    with pytest.raises(UserError, match=r"run\.json lacks 'fingerprint', which raydpp select writes"):
        runs.load_finished(["select"], Folder.at(out))


def test_a_record_of_before_files_were_recorded_is_believed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    finished(out, **MADE)
    record = json.loads((out / "run.json").read_text())
    del record["files"]
    (out / "run.json").write_text(json.dumps(record))
    (out / "table").mkdir()
    (out / "table" / "a.parquet").write_text("x")
    assert runs.load_finished(["select"], Folder.at(out))


def test_a_finished_run_whose_input_has_grown_is_taken_up_again(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run = runs.resume("extract", config(out), ["input"])
    run.claim({"model": "m"})
    run.finish("extract: done")
    grown = runs.resume("extract", config(out), ["more input"])
    assert grown.done is None
    grown.claim({"model": "m"})
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


NOT_INSTALLED = """
import importlib.metadata as metadata

found = metadata.version

def version(name):
    if name == "raydpp":
        raise metadata.PackageNotFoundError(name)
    return found(name)

metadata.version = version
from raydpp import runs
print(runs._new_record("select", {}, [])["versions"]["raydpp"])
"""


def test_sources_that_are_not_installed_know_their_version() -> None:  # as in the working directory of a submitted job
    found = subprocess.run([sys.executable, "-c", NOT_INSTALLED], capture_output=True, text=True, check=True)
    assert found.stdout == f"{raydpp.__version__}\n"
