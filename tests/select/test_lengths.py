from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.select.lengths import EDGES, lengths, table_lengths
from raydpp.select.stage import select
from raydpp.tables import open_table
from tests.report.pages import figures


def test_bins_are_two_for_each_doubling() -> None:
    assert EDGES[:12].tolist() == [1, 2, 3, 4, 6, 8, 12, 16, 23, 32, 46, 64]
    values = np.random.default_rng(0).integers(1, 5_000, 1_000)
    expected = np.histogram(values, [*EDGES, np.inf])[0]
    np.testing.assert_array_equal(lengths(pa.table({"n": values}), "n"), expected)


def test_what_is_no_length_counts_as_none_and_what_is_small_as_the_least() -> None:
    found = lengths(pa.table({"n": pa.array([None, float("nan"), float("inf"), -3.0, 0.0, 0.5, 1.0, 2.0])}), "n")
    assert found.tolist() == [4, 1, *[0] * (len(EDGES) - 2)]


def test_those_of_a_table_are_of_its_rows(table: str) -> None:
    opened = open_table(table, "gradient")
    rows = pq.read_table(Path(table) / "gradients")
    np.testing.assert_array_equal(table_lengths(opened, "response_tokens"), lengths(rows, "response_tokens"))
    own = rows.filter(pa.compute.equal(rows["source"], "first"))
    found = table_lengths(replace(opened, source="first"), "response_tokens")
    np.testing.assert_array_equal(found, lengths(own, "response_tokens"))
    assert 0 < found.sum() < len(rows)


def test_a_report_has_them_before_and_after(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 8, quality_weight=0.9)
    points = figures((Path(run.out) / "report.html").read_text())["How long the examples are"]["spec"]["data"]["values"]
    whole, picks = (pq.read_table(Path(url) / "gradients")["response_tokens"].to_numpy() for url in (table, run.out))
    for name, values in (("the whole", whole), ("selection", picks)):
        own = {point["x"]: point["y"] for point in points if point["name"] == name}
        assert sum(own.values()) == pytest.approx(1, abs=1e-5)
        for low, high in zip([*own], [*own][1:], strict=False):
            assert own[low] == pytest.approx(((values >= low) & (values < high)).mean(), abs=1e-5)
    assert (Path(run.out) / "plots" / "lengths.png").exists()
    assert json.loads((Path(run.out) / "run.json").read_text())["counts"]["rows"] == 8
