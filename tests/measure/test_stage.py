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
    assert [one["subset"] for one in run.record["results"]] == [subset]
    (found,) = json.loads((tmp_path / "out" / "distances.json").read_text())
    if subset == "greedy":  # a uniform draw depends on the order of rows
        assert found["mean"] == pytest.approx(expected.mean, abs=1e-9)
    assert found["std"] >= 0
    assert found["error"] > 0
    assert "projection's error" in run.tables[0].headings
    assert found["curve"]["sizes"] == list(range(1, 13))
    assert found["curve"]["means"][-1] == pytest.approx(found["mean"])
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<figure" in report
    assert (tmp_path / "out" / "plots" / f"curves-{subset}.png").read_bytes().startswith(b"\x89PNG")
    assert "Log-det distance" in report
    assert "nats per example" in run.summary
    assert measure([table], str(tmp_path / "out"), size=12, subset=subset, draws=2).repeated  # type: ignore[arg-type]


def test_sources_are_measured_side_by_side(table: str, tmp_path: Path) -> None:
    run = measure([table], str(tmp_path / "out"), split_by_source=True)
    assert [(row["subset"], row["table"], row["rows"], row["size"]) for row in run.record["results"]] == [
        (subset, name, 20, 20) for subset in ("greedy", "uniform") for name in ("first", "second")
    ]
    assert len(run.tables) == 3  # the last of other measures
    for shown, form in zip(run.tables[:2], ("greedy", "uniform"), strict=True):
        assert [row[:3] for row in shown.rows] in (
            [["first", 20, 20], ["second", 20, 20]],
            [["second", 20, 20], ["first", 20, 20]],
        )
        assert [row[3] for row in shown.rows] == sorted(
            row["mean"] for row in run.record["results"] if row["subset"] == form
        )


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


def spread_over(folder: Path, name: str, rows: int, near: float, seed: int, dimension: int = 12) -> str:
    """Unit rows, the nearer to one another the larger ``near`` is."""
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    points[:, 0] += near * dimension**0.5
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    ids = [f"{n:04d}" for n in range(rows)]
    write_table(Folder.at(folder), f"{name}.parquet", pa.table({"id": ids, "gradient": list(points)}))
    return str(folder / f"{name}.parquet")


def test_one_is_called_more_diverse_only_where_it_is(tmp_path: Path) -> None:
    wide, again = (spread_over(tmp_path, name, 300, 0.0, seed) for seed, name in enumerate(("wide", "again")))
    narrow = spread_over(tmp_path, "narrow", 300, 1.0, 5)
    run = measure([narrow, wide, again], str(tmp_path / "out"), size=40, measures=False)
    for shown in run.tables:
        verdicts = {row[0]: row[shown.headings.index("more diverse than the next")] for row in shown.rows}
        assert list(verdicts)[2] == "narrow.parquet"
        first, second, last = verdicts.values()
        assert first == "no difference seen"
        assert float(str(second).rstrip("%")) > 99
        assert last is None
    assert "no difference seen between" in run.summary
    clear = measure([narrow, wide], str(tmp_path / "clear"), size=40, measures=False)
    assert "most diverse wide.parquet, with a probability of" in clear.summary
    alone = measure([wide], str(tmp_path / "alone"), size=40, measures=False)
    greedy, uniform = alone.record["results"]
    assert f"{greedy['mean']:.4f} +- {greedy['sampling']:.4f} nats per example" in alone.summary
    assert uniform["subset"] == "uniform"


def test_greedy_picks_from_pools_of_one_size(tmp_path: Path) -> None:
    few, many = spread_over(tmp_path, "few", 40, 0.0, 0), spread_over(tmp_path, "many", 200, 0.0, 1)
    whole = measure([few, many], str(tmp_path / "whole"), size=10, subset="greedy", measures=False)
    assert "--pool 40 takes as many of each" in (tmp_path / "whole" / "report.html").read_text()
    same = measure([few, many], str(tmp_path / "same"), size=10, subset="greedy", pool=40, measures=False)
    assert "They were picked from 40 of each table" in (tmp_path / "same" / "report.html").read_text()
    before, now = ([one["mean"] for one in run.record["results"]] for run in (whole, same))
    assert before[0] == now[0]
    assert before[1] < now[1]  # fewer to pick from
    for pool in (9, 41):
        with pytest.raises(UserError, match=f"--pool {pool}: give a number from --size 10 to the 40 examples of few"):
            measure([few, many], str(tmp_path / "out"), size=10, pool=pool)


def test_a_table_can_be_the_reference(tmp_path: Path) -> None:
    wide, narrow = spread_over(tmp_path, "wide", 80, 0.0, 0), spread_over(tmp_path, "narrow", 90, 1.0, 1)
    alone = measure([wide, narrow], str(tmp_path / "alone"), size=40, draws=3, measures=False).record["results"]
    run = measure([narrow, wide], str(tmp_path / "out"), size=40, draws=3, reference=wide, measures=False)
    found = {(one["subset"], one["table"]): one["mean"] for one in run.record["results"]}
    by_points = {(one["subset"], one["table"]): one["mean"] for one in alone}
    for subset in ("greedy", "uniform"):
        assert found[subset, "wide.parquet"] == pytest.approx(0, abs=1e-9)
        difference = by_points[subset, "narrow.parquet"] - by_points[subset, "wide.parquet"]
        assert found[subset, "narrow.parquet"] == pytest.approx(difference, abs=1e-9)
    assert "from wide.parquet" in run.summary
    with pytest.raises(UserError, match=r"--size 85: wide\.parquet has 80"):
        measure([narrow], str(tmp_path / "large"), size=85, reference=wide)
    other = spread_over(tmp_path, "other", 80, 0.0, 0, dimension=5)
    with pytest.raises(UserError, match="dimensions"):
        measure([narrow], str(tmp_path / "other-out"), reference=other)
