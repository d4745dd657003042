from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.diversity.plane import principal_plane
from raydpp.select import map as module
from raydpp.select.map import draw
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import NO_SOURCE, open_table, vectors, write_table
from tests.report.pages import figures
from tests.test_tables import directions


def conversations(corpus: str) -> dict[str, str]:
    rows = pq.read_table(Path(corpus) / "corpus").to_pylist()
    return {row["id"]: "\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["messages"]) for row in rows}


def test_a_map_holds_the_picks_and_what_was_left_out(table: str, corpus: str, tmp_path: Path) -> None:
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    (tmp_path / "no.txt").write_text("\n".join(rows["id"].to_pylist()[:3]))
    run = select(table, str(tmp_path / "out"), 8, exclude=[str(tmp_path / "no.txt")])
    found = pq.read_table(Path(run.out) / "map" / "map.parquet")
    assert found.column_names == ["id", "x", "y", "source", "rank", "text"]
    picks = pq.read_table(Path(run.out) / "selection")
    ranks = dict(zip(picks["id"].to_pylist(), picks["rank"].to_pylist(), strict=True))
    own = {row["id"]: row for row in rows.to_pylist()[3:]}
    assert {row["id"]: (row["source"], row["rank"]) for row in found.to_pylist()} == {
        one: (row["source"], ranks.get(one)) for one, row in own.items()
    }
    texts = conversations(corpus)
    assert all(row["text"] == texts[row["id"]] for row in found.to_pylist())
    plane = principal_plane([np.array([own[one]["gradient"] for one in found["id"].to_pylist()], np.int8)])
    np.testing.assert_allclose(np.column_stack([found["x"], found["y"]]), plane.points, atol=1e-5)
    report = (Path(run.out) / "report.html").read_text()
    drawn = figures(report)["Map of the examples"]["columns"]
    assert [drawn["text"][place] for place in map(drawn["rank"].index, range(1, 9))] == [
        texts[one] for one in picks["id"].to_pylist()
    ]
    assert "37 of 40; picked ones are larger" in report
    assert f"{plane.explained:.1%} of their" in report


def test_of_many_examples_it_has_the_picks_and_a_sample(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST", 12)
    run = select(table, str(tmp_path / "out"), 8)
    found = pq.read_table(Path(run.out) / "map" / "map.parquet")
    assert found["rank"].to_pylist() == [*range(1, 9), *[None] * 4]
    assert len(set(found["id"].to_pylist())) == 12
    assert "12 of 40" in (Path(run.out) / "report.html").read_text()
    monkeypatch.setattr(module, "MOST", 5)
    run = select(table, str(tmp_path / "few"), 8)
    assert pq.read_table(Path(run.out) / "map" / "map.parquet")["rank"].to_pylist() == [1, 2, 3, 4, 5]


def test_without_corpus_and_sources_it_shows_ids(tmp_path: Path) -> None:
    columns = {"key": [f"{n:02}" for n in range(20)], "point": list(directions(20, 6).astype(np.float32))}
    plain = pa.table(columns).rename_columns(["id", "point"])
    write_table(Folder.at(tmp_path), "p.parquet", plain)
    run = select(str(tmp_path / "p.parquet"), str(tmp_path / "out"), 20, feature_column="point")
    found = pq.read_table(Path(run.out) / "map" / "map.parquet")
    assert found["text"].to_pylist() == found["id"].to_pylist()
    assert set(found["source"].to_pylist()) == {NO_SOURCE}
    assert "How long" not in (Path(run.out) / "report.html").read_text()


def test_a_sample_is_the_same_again_and_leaves_out_what_is_skipped(table: str) -> None:
    opened = open_table(table, "gradient")
    ids = pq.read_table(Path(table) / "gradients")["id"].to_pylist()
    one, other = (draw(opened, 6, pa.array(ids[:20])) for _ in range(2))
    assert one.equals(other)
    assert len(one) == 6
    assert not set(one["id"].to_pylist()) & set(ids[:20])
    assert len(draw(opened, 100, pa.array(ids[:20]))) == 20
    rows = {row["id"]: row["gradient"] for row in pq.read_table(Path(table) / "gradients").to_pylist()}
    np.testing.assert_array_equal(vectors(one["features"]), [rows[i] for i in one["id"].to_pylist()])


def test_the_report_and_run_json_agree(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 8, gamma=0.1, prune_below=0.5, compare=True)
    report = (Path(run.out) / "report.html").read_text()
    shown, record = figures(report), json.loads((Path(run.out) / "run.json").read_text())
    gains = [point["y"] for point in shown["What each pick adds"]["spec"]["data"]["values"]]
    np.testing.assert_allclose(gains, pq.read_table(Path(run.out) / "selection")["log_gain"], rtol=1e-5)
    assert sum(gains) == pytest.approx(record["log_det"], rel=1e-5)
    layers = shown["What each pick adds"]["spec"]["layer"]
    assert {layer["data"]["values"][0]["x"] for layer in layers if "data" in layer} == {record["prune_rank"]}
    curves = shown["Log-det distance against the number of examples"]["spec"]["data"]["values"]
    for one in record["comparison"]:
        assert [p["y"] for p in curves if p["name"] == one["method"]][-1] == pytest.approx(one["distance"], rel=1e-5)
    sources = pq.read_table(Path(run.out) / "selection")["source"].to_pylist()
    for bar in shown["Where the examples come from"]["spec"]["data"]["values"]:
        expected = sources.count(bar["source"]) / 8 if bar["name"] == "selection" else 0.5
        assert bar["share"] == pytest.approx(expected)
    log_det = f"{record['log_det']:.4g}"
    for name, value in (("examples selected", "8"), ("oracle", record["oracle"]), ("log_det", log_det)):
        assert f"<td>{name}</td>\n<td>{value}</td>" in report
    for part, took in record["seconds"].items():
        assert f"<td>seconds, {part}</td>\n<td>{took:.4g}</td>" in report
    assert f"raydpp select --config {run.out}/run.json --out NEW" in report
