from __future__ import annotations

import csv
import dataclasses
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.cluster import Here, OnRay
from raydpp.diversity.measures import Measures, measures
from raydpp.measure.metrics import submit_measures
from raydpp.measure.stage import measure
from raydpp.report.table import Table
from raydpp.storage import Folder
from raydpp.tables import open_table, vectors, write_table
from tests.test_tables import directions

FIELDS = ("mean", "std", "sampling", "error", "floored")
NAMES = [field.name for field in dataclasses.fields(Measures)]


def cells(table: Table, name: str) -> list[str]:
    return next(row for row in table.cells if row[0] == name)


@pytest.fixture
def plain(tmp_path: Path) -> list[str]:
    """Two tables of Parquet: one of 30 rows in two files with a source, one of 90 with copies."""
    for name, points in (("few", directions(30, 16)), ("many", np.tile(directions(45, 16, 1), (2, 1)))):
        for number, rows in enumerate(np.array_split(points.astype(np.float16), 2)):
            ids = [f"{number}-{row:02}" for row in range(len(rows))]
            columns = {"id": ids, "source": ["a", "b", "b"] * (len(rows) // 3), "gradient": list(rows)}
            write_table(Folder.at(tmp_path / name), f"{number}.parquet", pa.table(columns))
    return [str(tmp_path / "few"), str(tmp_path / "many")]


def test_densities_come_from_the_reference(plain: list[str], tmp_path: Path) -> None:
    run = measure(plain[:1], str(tmp_path / "out"), size=10, reference=plain[1])
    features, reference = (vectors(pq.read_table(url)["gradient"]) for url in plain)
    expected = measures([features], sample=30, reference=reference).novel_sum
    assert run.record["measures"]["few"]["novel_sum"] == pytest.approx(expected, rel=1e-6)
    assert expected != pytest.approx(measures([features], sample=30).novel_sum, rel=1e-3)


def test_all_outputs_have_the_numbers_of_the_function(plain: list[str], tmp_path: Path) -> None:
    run = measure(plain, str(tmp_path / "out"), size=10, draws=2)
    shown = {row[0]: row for row in run.tables[2].rows}
    metrics = {one["table"]: one for one in json.loads((tmp_path / "out" / "metrics.json").read_text())}
    with (tmp_path / "out" / "metrics.csv").open(newline="") as file:
        lines = {line["table"]: line for line in csv.DictReader(file)}
    report = (tmp_path / "out" / "report.html").read_text()
    for url, name in zip(plain, ("few", "many"), strict=True):
        features = vectors(pq.read_table(url)["gradient"])
        expected = dataclasses.asdict(measures([features], sample=30))  # as large as the smallest table
        for found in (run.record["measures"][name], metrics[name]):
            assert {field: found[field] for field in NAMES} == pytest.approx(expected, rel=1e-6)
        used = {"table": name, "size": 10, "kernel": "rbf", "gamma": 1.0, "ridge": 0.0}
        own = {**run.record["measures"][name], **used}
        for one in run.record["results"]:
            if one["table"] == name:
                own |= {
                    f"{one['subset']}_{field}": one[field] for field in ("mean", "std", "sampling", "error", "floored")
                }
        assert own == metrics[name]
        assert {field: "" if value is None else str(value) for field, value in metrics[name].items()} == lines[name]
        numbers = [value for value in shown[name][1:] if value is not None]
        assert set(numbers) <= {run.record["measures"][name][field] for field in NAMES}
        assert len(numbers) == len(NAMES) - 1  # all but the size of the sample, which the title says
        assert all(f">{cell}</td>" in report for cell in cells(run.tables[2], name))
    assert metrics["few"]["near_duplicates"] == 0
    assert 0 < metrics["many"]["near_duplicates"] < 1  # copies, of which the sample has both or one
    assert "30 examples" in run.tables[2].title
    assert measure(plain, str(tmp_path / "out"), size=10, draws=2).repeated


def test_sources_have_measures_of_their_own_rows(plain: list[str], tmp_path: Path) -> None:
    run = measure(plain[:1], str(tmp_path / "out"), split_by_source=True)
    rows = pq.read_table(plain[0])
    for source, found in run.record["measures"].items():
        own = vectors(rows.filter(pa.compute.equal(rows["source"], source))["gradient"])
        expected = dataclasses.asdict(measures([own], sample=10))
        for name in ("rows", "vendi_1", "vendi_2", "vendi_inf", "cosine_distance"):
            assert found[name] == pytest.approx(expected[name], rel=1e-6)
        assert (found["rows"], found["sampled"]) == (len(own), 10)
    assert set(run.record["measures"]) == {"a", "b"}


def test_a_task_on_a_cluster_finds_the_same(cluster: None, plain: list[str]) -> None:
    tables, tasks = [open_table(plain[0], "gradient")], OnRay("measure")
    (found,) = tasks.get(submit_measures(tasks, tables))
    assert found == pytest.approx(submit_measures(Here(), tables)[0])


def test_they_can_be_left_out(plain: list[str], tmp_path: Path) -> None:
    run = measure(plain, str(tmp_path / "out"), size=10, subset="greedy", measures=False)
    assert len(run.tables) == 1
    assert run.record["measures"] == {}
    assert "Vendi" not in (tmp_path / "out" / "report.html").read_text()
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert [one["greedy_mean"] for one in found] == [one["mean"] for one in run.record["results"]]


def test_one_row_has_no_pairs_and_its_outputs_are_strict(tmp_path: Path) -> None:
    write_table(Folder.at(tmp_path), "one.parquet", pa.table({"id": ["a"], "gradient": [[1.0, 0.0]]}))
    run = measure([str(tmp_path / "one.parquet")], str(tmp_path / "out"))
    assert run.record["measures"]["one.parquet"]["nearest_cosine"] is None
    assert (tmp_path / "out" / "metrics.csv").read_text().count("\n") == 2
