from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydpp.cli import main
from raydpp.errors import UserError
from raydpp.measure.stage import measure
from raydpp.select.cut import cut
from raydpp.select.stage import select


def test_the_first_picks_are_the_selection_for_that_budget(table: str, tmp_path: Path) -> None:
    whole = select(table, str(tmp_path / "whole"), 16, partitions=1).out
    small = select(table, str(tmp_path / "small"), 4, partitions=1).out
    assert main(["cut", whole, "--size", "0.25", "--out", str(tmp_path / "cut")]) == 0
    for name in ("selection", "gradients"):
        assert pq.read_table(tmp_path / "cut" / name).equals(pq.read_table(Path(small) / name))
    assert (tmp_path / "cut/examples.jsonl").read_text() == (Path(small) / "examples.jsonl").read_text()
    records = [json.loads((Path(folder) / "run.json").read_text()) for folder in (tmp_path / "cut", small)]
    assert records[0]["log_det"] == pytest.approx(records[1]["log_det"])
    assert cut(whole, str(tmp_path / "cut"), 0.25).repeated


def test_a_cut_is_cut_and_measured_like_a_selection(table: str, tmp_path: Path) -> None:
    whole = select(table, str(tmp_path / "whole"), 16, partitions=1).out
    half = cut(whole, str(tmp_path / "half"), 8).out
    assert len(pq.read_table(Path(cut(half, str(tmp_path / "quarter"), 4).out) / "selection")) == 4
    assert measure([half, whole], str(tmp_path / "report"), size=8).record["results"][0]["mean"] == pytest.approx(
        measure([half], str(tmp_path / "alone"), size=8).record["results"][0]["mean"]
    )


def test_what_is_no_selection_of_that_budget_is_refused(table: str, tmp_path: Path) -> None:
    tokens = select(table, str(tmp_path / "tokens"), tokens=40).out
    with pytest.raises(UserError, match="was selected with --tokens"):
        cut(tokens, str(tmp_path / "out"), 2)
    quotas = select(table, str(tmp_path / "quotas"), 8, min_per_source=["first=2"]).out
    with pytest.raises(UserError, match="was selected with --min-per-source"):
        cut(quotas, str(tmp_path / "out"), 2)
    whole = select(table, str(tmp_path / "whole"), 6).out
    with pytest.raises(UserError, match=r"--size 7 of .*larger than the pool of 6"):
        cut(whole, str(tmp_path / "out"), 7)
    with pytest.raises(UserError, match="was written by raydpp extract"):
        cut(table, str(tmp_path / "out"), 2)
