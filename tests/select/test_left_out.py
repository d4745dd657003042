from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.cluster import Here
from raydpp.diversity.redundancy import redundancy
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.errors import UserError
from raydpp.select import left_out
from raydpp.select.inputs import Owned, SelectionJob, partitioned
from raydpp.select.left_out import LeftOut
from raydpp.select.request import Picked, Request
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import open_table, vectors, write_table


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
    assert whole.record["left_out"] == {"rows": 0, "half": 0, "most": 0, "copies": 0}
    assert not (Path(whole.out) / "redundancy").exists()


def test_pairs_are_of_different_picks_and_no_copies(tmp_path: Path) -> None:
    picks = np.eye(8, dtype=np.float32)  # (8, D)
    near = np.repeat(picks[:4], [6, 3, 2, 1], axis=0)  # (12, D) beside four of them
    near[:, 4:] += np.linspace(0.1, 0.5, 12, dtype=np.float32)[:, None]
    rows = np.concatenate([picks, picks[:3], near])
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    table = pa.table({"id": [f"{n:02}" for n in range(23)], "gradient": list(rows)})
    for number in range(2):
        write_table(Folder.at(tmp_path / "t"), f"{number}.parquet", table.take(list(range(number, 23, 2))))
    (tmp_path / "no.txt").write_text("\n".join(table["id"].to_pylist()[11:]))
    chosen = select(str(tmp_path / "t"), str(tmp_path / "s"), 8, kernel="cosine", exclude=[str(tmp_path / "no.txt")])
    picked = Picked(pq.read_table(Path(chosen.out) / "gradients"), None)  # type: ignore[arg-type]
    opened = open_table(str(tmp_path / "t"), "gradient")
    request = Request(Budget(8), Objective(Kernel("cosine")), "gradient")
    for partitions in (1, 2):
        parts = partitioned(opened, partitions, False, Here())
        job = SelectionJob(opened, parts, request, Owned.nothing(), "select", Here())
        found = left_out.look_at_left_out(job, picked, Folder.at(tmp_path / "left"))
        assert (found.rows, found.copies) == (15, 3)
        whole = pq.read_table(tmp_path / "left" / "redundancy").to_pylist()
        best: dict[str, float] = {}
        for row in whole:
            if row["cosine"] < 1 - 1e-6:
                best[row["nearest"]] = max(best.get(row["nearest"], 0), row["explained"])
        assert [(pair["nearest"], pair["explained"]) for pair in found.pairs] == sorted(
            best.items(), key=lambda one: -one[1]
        )
        assert len(best) == 4
    section = found.section({found.pairs[0]["id"]: "its text"})
    assert section.pairs[0].texts == ("its text", "")
    assert section.pairs[0].labels[0] == f"left out: {found.pairs[0]['id']}"
    assert "3 are copies of selected ones" in section.text
    assert found.section({}).table


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
    assert str(LeftOut(200, 50, 3, 0, ())) == (
        "of 200 left out, the selection explains 25.0% by more than half, and 1.5% by more than nine tenths"
    )
    assert "0.0%" in str(LeftOut(0, 0, 0, 0, ()))
