from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.measure import map as module
from raydpp.measure.stage import measure
from raydpp.select.stage import select
from tests.report.pages import figures
from tests.select.test_map import conversations


def test_a_map_has_points_of_every_table_in_its_colour(table: str, corpus: str, tmp_path: Path) -> None:
    subset = select(table, str(tmp_path / "subset"), 10).out
    run = measure([table, subset], str(tmp_path / "out"), size=5, subset="greedy", measures=False)
    found = pq.read_table(Path(run.out) / "map" / "map.parquet")
    assert found.column_names == ["id", "x", "y", "table", "source", "text"]
    names = [Path(table).name, "subset"]
    assert found["table"].to_pylist() == [names[0]] * 40 + [names[1]] * 10
    rows, texts = found.to_pylist(), conversations(corpus)
    picks = pq.read_table(Path(subset) / "selection")["id"].to_pylist()
    assert sorted(row["id"] for row in rows[40:]) == sorted(picks)
    places = {row["id"]: (row["x"], row["y"]) for row in rows[:40]}
    for row in rows:
        assert row["text"] == texts[row["id"]]
        assert (row["x"], row["y"]) == pytest.approx(places[row["id"]], abs=1e-6)
    report = (Path(run.out) / "report.html").read_text()
    drawn = figures(report)["Map of the examples"]
    assert drawn["columns"]["name"] == found["table"].to_pylist()
    assert "all of each table" in report
    lengths = figures(report)["How long the examples are"]["spec"]["encoding"]["color"]["scale"]["domain"]
    assert lengths == names
    for title in ("Log-det distance against the number of examples", "Map of the examples"):
        spec = figures(report)[title]["spec"]
        colour = spec["encoding"]["color"] if "encoding" in spec else spec["layer"][0]["encoding"]["color"]
        assert colour["scale"]["domain"] == names  # one colour a table in all figures
    assert f"raydpp measure --config {run.out}/run.json --out NEW" in report
    curves = figures(report)["Log-det distance against the number of examples"]["spec"]["data"]["values"]
    for distance in json.loads((Path(run.out) / "distances.json").read_text()):
        last = [point for point in curves if point["name"] == distance["table"]][-1]
        assert last["y"] == pytest.approx(distance["mean"], rel=1e-5)
        assert last["y"] == pytest.approx(distance["curve"]["means"][-1], rel=1e-5)


def test_a_corpus_that_is_gone_leaves_ids_and_another_can_be_given(
    table: str, corpus: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raydpp")
    monkeypatch.setattr(module, "MOST", 30)
    moved = shutil.copytree(table, tmp_path / "moved")
    record = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps(record | {"corpus": str(tmp_path / "gone")}))
    options = {"size": 5, "subset": "greedy", "measures": False, "split_by_source": True}
    run = measure([str(moved)], str(tmp_path / "out"), **options)  # type: ignore[arg-type]
    found = pq.read_table(Path(run.out) / "map" / "map.parquet")
    assert found["table"].to_pylist() == found["source"].to_pylist() == ["first"] * 15 + ["second"] * 15
    assert found["text"].to_pylist() == found["id"].to_pylist()
    assert "the map shows ids in place of texts" in caplog.text
    assert "at most 15 of a table" in (Path(run.out) / "report.html").read_text()
    again = measure([str(moved)], str(tmp_path / "again"), corpus=corpus, **options)  # type: ignore[arg-type]
    texts = conversations(corpus)
    for row in pq.read_table(Path(again.out) / "map" / "map.parquet").to_pylist():
        assert row["text"] == texts[row["id"]]
    with pytest.raises(UserError, match="there is no folder"):
        measure([str(moved)], str(tmp_path / "bad"), corpus=str(tmp_path / "gone"), **options)  # type: ignore[arg-type]
