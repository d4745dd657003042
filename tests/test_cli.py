from __future__ import annotations

import json
from pathlib import Path

import pytest

from raydpp.cli import STAGES, main, run_job, stage_parser
from raydpp.ingest.stage import ingest


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.__name__)
def test_every_option_is_explained(stage: object, capsys: pytest.CaptureFixture[str]) -> None:
    parser = stage_parser(stage)  # type: ignore[arg-type]
    undocumented = [action.dest for action in parser._actions if not action.help]
    assert not undocumented
    with pytest.raises(SystemExit) as ended:
        main([stage.__name__, "--help"])  # type: ignore[attr-defined]
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out


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
