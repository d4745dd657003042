from __future__ import annotations

from pathlib import Path

import pytest

from raydpp.errors import UserError
from raydpp.stages.select import select


def test_an_estimate_names_the_tasks_and_writes_nothing(table: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    outcome = select(table, str(out), 8, partitions=3, estimate=True)
    assert not out.exists()
    assert "3 partitions of" in outcome.summary
    assert "1 merge of" in outcome.summary
    assert "certificate" in outcome.summary
    assert outcome.record["estimate"]["seconds"] >= 0
    assert outcome.record["estimate"]["bytes"] > 1e8


def test_an_estimate_of_rounds_names_the_shards(table: str, tmp_path: Path) -> None:
    outcome = select(table, str(tmp_path / "out"), 8, partitions=3, exact=True, estimate=True)
    assert "3 shards of" in outcome.summary
    assert outcome.record["estimate"]["rounds"] >= 1


def test_more_picks_take_longer(table: str, tmp_path: Path) -> None:
    few, many = (select(table, str(tmp_path / "out"), size, estimate=True).record["estimate"] for size in (2, 40))
    assert many["seconds"] > few["seconds"]


def test_without_a_size_there_is_nothing_to_reckon_with(table: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a --size"):
        select(table, str(tmp_path / "out"), tokens=50, estimate=True)
