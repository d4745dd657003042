from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.diversity.redundancy import redundancy
from raydpp.dpp.kernels import Kernel
from raydpp.errors import UserError
from raydpp.select import left_out
from raydpp.select.left_out import LeftOut
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import vectors, write_table


@pytest.mark.parametrize("partitions", [1, 3])
def test_every_example_left_out_has_its_nearest_pick(table: str, tmp_path: Path, partitions: int) -> None:
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    (tmp_path / "no.txt").write_text("\n".join(rows["id"].to_pylist()[:3]))
    run = select(table, str(tmp_path / "out"), 8, partitions=partitions, exclude=[str(tmp_path / "no.txt")])
    picks = pq.read_table(Path(run.out) / "gradients")
    found = pq.read_table(Path(run.out) / "redundancy").sort_by("id")
    left = [row for row in rows.to_pylist()[3:] if row["id"] not in picks["id"].to_pylist()]
    assert found["id"].to_pylist() == [row["id"] for row in left]
    assert found["source"].to_pylist() == [row["source"] for row in left]
    features = np.array([row["gradient"] for row in left], np.int8)
    kernel = Kernel("rbf", run.record["gamma"])
    expected = redundancy(features, vectors(picks["gradient"]), kernel)
    assert found["nearest"].to_pylist() == [picks["id"][i].as_py() for i in expected.nearest.tolist()]
    np.testing.assert_allclose(found["cosine"], expected.cosine)
    np.testing.assert_allclose(found["explained"], expected.explained)
    counts = run.record["left_out"]
    assert counts["rows"] == len(left) == 40 - 8 - 3
    assert (counts["half"], counts["most"]) == ((expected.explained > 0.5).sum(), (expected.explained > 0.9).sum())
    report = (Path(run.out) / "report.html").read_text()
    assert "What is left out" in report
    assert left[int(expected.explained.argmax())]["id"] in report


def test_a_baseline_of_a_table_without_sources_has_it_too(tmp_path: Path) -> None:
    points = np.random.default_rng(0).standard_normal((12, 4))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    points[7] = points[2]
    ids = [f"{n:02d}" for n in range(12)]
    write_table(Folder.at(tmp_path), "p.parquet", pa.table({"id": ids, "gradient": list(points)}))
    run = select(str(tmp_path / "p.parquet"), str(tmp_path / "out"), 11, method="k-center")
    found = pq.read_table(Path(run.out) / "redundancy").to_pylist()
    assert [(row["source"], row["explained"]) for row in found] == [(None, pytest.approx(1.0))]
    assert {found[0]["id"], found[0]["nearest"]} == {"02", "07"}
    whole = select(str(tmp_path / "p.parquet"), str(tmp_path / "whole"), 12, method="random")
    assert whole.record["left_out"] == {"rows": 0, "half": 0, "most": 0}
    assert not (Path(whole.out) / "redundancy").exists()


def test_it_is_left_where_it_would_take_long_or_is_not_wanted(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never = select(table, str(tmp_path / "never"), 5, redundancy="never")
    monkeypatch.setattr(left_out, "_CHEAP", 40 * 5 * (64 + 5) - 1)
    large = select(table, str(tmp_path / "large"), 5)
    for run in (never, large):
        assert run.record["left_out"] is None
        assert not (Path(run.out) / "redundancy").exists()
        assert "What is left out" not in (Path(run.out) / "report.html").read_text()
    assert select(table, str(tmp_path / "always"), 5, redundancy="always").record["left_out"]["rows"] == 35
    for options, words in (({"redundancy": "no"}, "use auto, always or never"), ({"prune_below": 1.0}, "a share")):
        with pytest.raises(UserError, match=words):
            select(table, str(tmp_path / "bad"), 5, **options)


def test_the_pruning_rank_is_said_and_marked(table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "raydpp")
    run = select(table, str(tmp_path / "out"), 20, gamma=0.1, prune_below=0.3)
    gains = pq.read_table(Path(run.out) / "selection")["log_gain"].to_numpy()
    rank = run.record["prune_rank"]
    assert 1 < rank < 20
    assert gains[rank - 1] < np.log(0.3) <= gains[rank - 2]
    assert f"from pick {rank} on, each adds less than 0.3 of an example's variance" in caplog.text
    assert f"From pick {rank} on" in (Path(run.out) / "report.html").read_text()
    assert select(table, str(tmp_path / "few"), 3, gamma=0.1, prune_below=1e-9).record["prune_rank"] is None


def test_it_says_how_much_is_explained() -> None:
    assert str(LeftOut(200, 50, 3, ())) == (
        "of 200 left out, the selection explains 25.0% by more than half, and 1.5% by more than nine tenths"
    )
    assert "0.0%" in str(LeftOut(0, 0, 0, ()))
