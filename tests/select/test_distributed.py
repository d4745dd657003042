from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raydpp.cluster import Here, OnRay
from raydpp.dpp.budget import Budget
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select.distributed import greedy
from raydpp.select.inputs import ROWS_PER_PARTITION, Owned, SelectionJob, partitioned
from raydpp.select.request import Request
from raydpp.storage import Folder
from raydpp.tables import Part, open_table, vectors, write_table


@pytest.fixture(scope="module")
def copies(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A table of four files, each with the same twelve points under ids of its own, and one file with twelve others."""
    folder = tmp_path_factory.mktemp("copies") / "rows.parquet"
    x = np.random.default_rng(0).standard_normal((24, 40)).astype(np.float32)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for file in range(5):
        some = x[12:] if file == 4 else x[:12]
        features = pa.FixedSizeListArray.from_arrays(pa.array(some.ravel()), 40)
        ids = [f"{file}-{i:02d}" for i in range(12)]
        write_table(Folder.at(folder), f"part-{file}.parquet", pa.table({"id": ids, "gradient": features}))
    return str(folder)


def test_what_partitions_hand_in_twice_is_made_up_for_by_rounds(
    here: None, copies: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = open_table(copies, "gradient")
    groups = partitioned(table, 5, False, Here())
    assert len(groups) == 5
    request = Request(Budget(20), Objective(Kernel("rbf", 1.0)))
    with caplog.at_level(logging.INFO, "raydpp"):
        job = SelectionJob(table, groups, request, Owned.nothing(), "select", Here())
        picked, certificate = greedy(job, Part(Folder.at(tmp_path), "picks.parquet"), exact=False, oversample=1.0)
    assert "are not copies of others; looking for more" in caplog.text
    ids = picked.rows["id"].to_pylist()
    assert len(ids) == 20
    assert len({name[-2:] if name[0] != "4" else name for name in ids}) == 20  # no point twice
    assert picked.selection.log_gains.min() > -3
    assert certificate is not None


def test_rounds_over_all_partitions_are_exact_and_need_no_certificate(here: None, copies: str, tmp_path: Path) -> None:
    table = open_table(copies, "gradient")
    rows = table.read(table.parts)
    expected = greedy_map(vectors(rows["gradient"]), 20, ids=rows["id"].to_pylist())
    record = Part(Folder.at(tmp_path), "picks.parquet")
    request = Request(Budget(20), Objective(Kernel("rbf", 1.0)))
    groups = partitioned(table, 3, True, Here())
    job = SelectionJob(table, groups, request, Owned.nothing(), "select", Here())
    picked, certificate = greedy(job, record, exact=True, oversample=1.0)
    assert picked.rows["id"].to_pylist() == rows.take(pa.array(expected.indices))["id"].to_pylist()
    assert certificate is None


def test_partitions_are_as_many_as_their_rows_or_the_cpus_are_worth(
    cluster: None, copies: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from raydpp.select import inputs as stage

    table = open_table(copies, "gradient")
    assert table.rows < ROWS_PER_PARTITION
    assert len(partitioned(table, None, False, Here())) == 1
    assert len(partitioned(table, None, True, OnRay("select"))) == 1
    monkeypatch.setattr(stage, "_LEAST_ROWS", 10)
    assert len(partitioned(table, None, True, OnRay("select"))) == 2  # the cluster's CPUs
    assert len(partitioned(table, 3, True, Here())) == 3
