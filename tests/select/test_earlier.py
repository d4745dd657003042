from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.dpp.features import unit_rows
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import pivot_residuals
from raydpp.errors import UserError
from raydpp.runs import RunResult
from raydpp.select import partition_merge
from raydpp.select.stage import select
from raydpp.tables import open_table, vectors
from tests.select.spread import make_table


def grow(table: str, rows: int, seed: int) -> list[str]:
    """More files for a table; the ids of their rows."""
    more = Path(make_table(Path(table).parent / f"more{seed}", rows, 2, seed))
    ids = []
    for file in more.iterdir():
        ids += pq.read_table(file)["id"].to_pylist()
        file.rename(Path(table) / f"part-1{seed}-{file.name[-5 - 8 :]}")
    return ids


def picks(run: RunResult) -> list[str]:
    return pq.read_table(Path(run.out) / "selection").sort_by("rank")["id"].to_pylist()


def features_of(table: str, ids: list[str]) -> np.ndarray:
    opened = open_table(table, "gradient")
    rows = opened.read(opened.parts)
    places = {one: n for n, one in enumerate(rows["id"].to_pylist())}
    return vectors(rows["gradient"])[[places[one] for one in ids]]


def test_an_earlier_selection_is_completed_by_the_same_scales(tmp_path: Path) -> None:
    table = make_table(tmp_path, 200, 4)
    options: dict[str, Any] = {"quality_weight": 0.3, "redundancy": "never"}
    first = select(table, str(tmp_path / "first"), 20, **options)
    grow(table, 100, 1)
    second = select(table, str(tmp_path / "second"), 35, complete=first.out, **options)
    assert picks(second)[:20] == picks(first)
    assert len(set(picks(second))) == 35
    assert second.record["counts"]["kept"] == 20
    for fact in ("gamma", "quality_unit", "quality"):
        assert second.record[fact] == first.record[fact]
    selection = pq.read_table(tmp_path / "second" / "selection")
    own = pivot_residuals(unit_rows(features_of(table, picks(second))), Kernel(gamma=first.record["gamma"])).log()
    np.testing.assert_allclose(selection["log_gain"].to_numpy(), own.numpy(), atol=1e-6)
    assert second.record["log_det"] == pytest.approx(float(own.sum()), abs=1e-5)
    again = select(table, str(tmp_path / "fewer"), 20, complete=first.out, **options)  # nothing is left to pick
    assert picks(again) == picks(first)


def test_only_what_has_come_since_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    table = make_table(tmp_path, 200, 4)
    first = select(table, str(tmp_path / "first"), 20, gamma=1.0, redundancy="never")
    with pytest.raises(UserError, match=r"nothing has come to table\.parquet since"):
        select(table, str(tmp_path / "none"), 5, complete=first.out, arrivals=True)
    came = grow(table, 60, 1)
    searched: list[int] = []
    select_rows = partition_merge.select_rows

    def noting(rows: pa.Table, *more: Any) -> Any:
        searched.append(len(rows))
        return select_rows(rows, *more)

    monkeypatch.setattr(partition_merge, "select_rows", noting)
    second = select(table, str(tmp_path / "second"), 10, complete=first.out, arrivals=True, redundancy="never")
    assert searched == [60]
    assert picks(second)[:20] == picks(first)
    added = picks(second)[20:]
    assert set(added) <= set(came)
    owned = features_of(table, picks(first))
    expected = greedy_map(features_of(table, sorted(came)), 10, ids=sorted(came), owned=owned, gamma=1.0)
    assert added == [sorted(came)[n] for n in expected.indices]


def test_picks_that_left_the_table_are_replaced(tmp_path: Path) -> None:
    table = make_table(tmp_path, 200, 4)
    first = select(table, str(tmp_path / "first"), 20, gamma=1.0, redundancy="never")
    file = sorted(Path(table).iterdir())[0]
    gone = set(pq.read_table(file)["id"].to_pylist())
    file.unlink()
    blocked = tmp_path / "blocked.txt"
    left = [one for one in picks(first) if one not in gone]
    blocked.write_text(left.pop(3))
    second = select(table, str(tmp_path / "second"), 20, complete=first.out, exclude=[str(blocked)], redundancy="never")
    assert 0 < len(left) < 19
    assert picks(second)[: len(left)] == left
    assert not gone & set(picks(second))
    assert len(picks(second)) == 20
    assert blocked.read_text() not in picks(second)


def test_quotas_and_tokens_count_what_is_kept(tmp_path: Path) -> None:
    table = make_table(tmp_path, 300, 4)
    first = select(table, str(tmp_path / "first"), 20, gamma=1.0, max_per_source=["third=4"], redundancy="never")
    select(
        table,
        str(tmp_path / "second"),
        40,
        complete=first.out,
        max_per_source=["third=6"],
        min_per_source=["first=25"],
        redundancy="never",
    )
    sources = pq.read_table(tmp_path / "second" / "selection")["source"].to_pylist()
    assert sources.count("third") <= 6
    assert sources.count("first") == 25
    spent = sum(pq.read_table(tmp_path / "first" / "gradients")["response_tokens"].to_pylist())
    select(table, str(tmp_path / "third"), tokens=spent + 90, complete=first.out, redundancy="never")
    total = sum(pq.read_table(tmp_path / "third" / "gradients")["response_tokens"].to_pylist())
    assert spent < total <= spent + 90
    assert picks(select(table, str(tmp_path / "all"), tokens=spent, complete=first.out, redundancy="never")) == picks(
        first
    )


def test_scales_are_taken_over_and_mistakes_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = make_table(tmp_path, 200, 4)
    first = select(table, str(tmp_path / "first"), 20, quality_weight=0.3, redundancy="never")
    grow(table, 100, 1)
    second = select(table, str(tmp_path / "second"), 20, quality_weight=0.3, scales_from=first.out, redundancy="never")
    for fact in ("gamma", "quality_unit", "quality"):
        assert second.record[fact] == first.record[fact]
    with caplog.at_level("INFO", "raydpp"):
        third = select(
            table,
            str(tmp_path / "third"),
            20,
            quality_weight=0.3,
            quality=["loss"],
            gamma=2.0,
            scales_from=first.out,
            redundancy="never",
        )
    assert "was judged by other qualities: their scale is measured" in caplog.text
    assert third.record["gamma"] == 2.0
    assert third.record["quality"][0]["column"] == "loss"
    for options, words in (
        ({"arrivals": True}, "name it with --complete"),
        ({"complete": first.out, "exact": True}, "leave out --exact"),
        ({"complete": first.out, "method": "random"}, "leave out --exact, --method"),
        ({"partition_cache": str(tmp_path / "c"), "partitions": 2}, "leave out --partitions"),
        ({"complete": first.out, "kernel": "cosine"}, "was selected by the kernel rbf: give --kernel rbf"),
        ({"complete": str(tmp_path / "nowhere")}, "there is no folder"),
        ({"scales_from": table}, "is not the output folder of a run"),
    ):
        with pytest.raises(UserError, match=words):
            select(table, str(tmp_path / "bad"), 20, **options)
    assert json.loads((tmp_path / "first" / "run.json").read_text())["table_files"]
