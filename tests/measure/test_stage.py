from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import raydpp
from raydpp.diversity.fidelity import SAMPLE, fidelity
from raydpp.dpp.features import unit_rows
from raydpp.dpp.scale import median_gamma
from raydpp.errors import UserError
from raydpp.measure.stage import measure
from raydpp.storage import Folder
from raydpp.tables import open_table, vector_array, vectors, write_table


@pytest.mark.parametrize("subset", ["greedy", "uniform"])
def test_the_job_agrees_with_the_function(table: str, tmp_path: Path, subset: str) -> None:
    run = measure([table], str(tmp_path / "out"), size=12, subset=subset, draws=2)  # type: ignore[arg-type]
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    expected = raydpp.log_det_distance(vectors(rows["gradient"]), 12, subset=subset, draws=2)  # type: ignore[arg-type]
    (found,) = json.loads((tmp_path / "out" / "distances.json").read_text())
    if subset == "greedy":  # a uniform draw depends on the order of rows
        assert found["mean"] == pytest.approx(expected.mean, abs=1e-9)
    assert found["std"] >= 0
    assert found["error"] > 0
    assert "projection's error" in run.tables[0].headings
    assert found["curve"]["sizes"] == list(range(1, 13))
    assert found["curve"]["means"][-1] == pytest.approx(found["mean"])
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<svg" in report
    assert "log-det distance" in report
    assert "nats per example" in run.summary
    assert measure([table], str(tmp_path / "out"), size=12, subset=subset, draws=2).repeated  # type: ignore[arg-type]


def test_sources_are_measured_side_by_side(table: str, tmp_path: Path) -> None:
    run = measure([table], str(tmp_path / "out"), split_by_source=True)
    assert [(row["table"], row["rows"], row["size"]) for row in run.record["results"]] == [
        ("first", 20, 20),
        ("second", 20, 20),
    ]
    (shown,) = run.tables
    assert [row[:3] for row in shown.rows] in (
        [["first", 20, 20], ["second", 20, 20]],
        [["second", 20, 20], ["first", 20, 20]],
    )
    assert [row[3] for row in shown.rows] == sorted(row["mean"] for row in run.record["results"])


def test_a_table_whose_cosines_are_mostly_noise_is_warned_about(
    table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    measure([table], str(tmp_path / "out"))
    warned = "a cosine of two examples is off by" in caplog.text
    assert warned == bool((found := fidelity(open_table(table, "gradient").sample(SAMPLE))) and found.poor)
    noisy = tmp_path / "noisy"
    shutil.copytree(table, noisy)
    random = np.random.default_rng(0)
    for path in (noisy / "gradients").iterdir():
        rows = pq.read_table(path)
        noise = vector_array(random.normal(size=(len(rows), 64)), pa.int8())
        place = rows.column_names.index("gradient")
        write_table(Folder.at(path.parent), path.name, rows.set_column(place, "gradient", noise))
    caplog.clear()
    measure([str(noisy)], str(tmp_path / "noisy-out"))
    assert "mostly noise. Extract with --dimension" in caplog.text
    plain = measure([str(noisy / "gradients")], str(tmp_path / "plain"))  # which does not say that it holds projections
    assert plain.record["results"][0]["error"] is None
    assert "projection's error" not in plain.tables[0].headings


def test_mistakes_are_named(table: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="has 40 examples"):
        measure([table], out, size=41)
    with pytest.raises(UserError, match=r"uniform|greedy"):
        measure([table], out, subset="best")  # type: ignore[arg-type]
    other = tmp_path / "other"
    shutil.copytree(table, other)
    record = json.loads((other / "run.json").read_text())
    record["fingerprint"]["projection"]["seed"] = 1
    (other / "run.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="their projection seed differs"):
        measure([table, str(other)], out)
    plain = str(tmp_path / "plain.parquet")
    write_table(Folder.at(tmp_path), "plain.parquet", pa.table({"id": ["a"], "x": [1.0]}))
    with pytest.raises(UserError, match="no column 'gradient'; it has id, x"):
        measure([plain], out)
    with pytest.raises(UserError, match="not lists of numbers"):
        measure([plain], out, feature_column="x")


def test_gamma_comes_from_all_tables_and_is_said(table: str, tmp_path: Path) -> None:
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    own = unit_rows(vectors(rows["gradient"])).numpy()
    near = own + 30 * np.eye(64)[0]
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    write_table(
        Folder.at(tmp_path), "near.parquet", pa.table({"id": rows["id"], "gradient": list(near.astype(np.float32))})
    )
    one = measure([table], str(tmp_path / "one"), gamma="auto")
    both = measure([table, str(tmp_path / "near.parquet")], str(tmp_path / "both"), gamma="auto")
    assert one.record["gamma"] == median_gamma(vectors(rows["gradient"]))
    assert both.record["gamma"] == median_gamma(np.concatenate([own, near])) != one.record["gamma"]
    assert f"gamma {one.record['gamma']:g}" in one.summary
    assert f"gamma {both.record['gamma']:g}" in both.tables[0].title
    again = measure([table], str(tmp_path / "again"), gamma=one.record["gamma"])
    assert again.record["results"] == one.record["results"]
    assert measure([table], str(tmp_path / "cosine"), gamma="auto", kernel="cosine").record["gamma"] is None


def test_small_gains_can_be_dropped(table: str, tmp_path: Path) -> None:
    rows = pq.read_table(Path(table) / "gradients")
    write_table(Folder.at(tmp_path), "twice.parquet", rows.take([*range(40), 1, 2]).drop_columns("id").append_column(
        "id", pa.array([f"{n:03d}" for n in range(42)])))  # fmt: skip
    twice = str(tmp_path / "twice.parquet")
    kept, dropped = (
        measure([twice], str(tmp_path / f"{least}"), gamma=0.25, drop_below=least).record["results"][0]["mean"]
        for least in (None, -7.0)
    )
    expected = raydpp.log_det_distance(vectors(pq.read_table(twice)["gradient"]), 42, gamma=0.25, drop_below=-7.0)
    assert dropped == pytest.approx(expected.mean)
    assert kept > dropped + 2 * 10 / 42
