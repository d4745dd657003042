from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from raydpp.cluster import OnRay
from raydpp.dpp.budget import Budget
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.request import Request
from raydpp.tables import open_table, vectors
from tests.select.spread import job_of


def test_one_partition_is_greedy_over_the_table_and_says_by_which_oracle(
    table: str, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_table(table, "gradient")
    rows = opened.read(opened.parts)
    with caplog.at_level(logging.INFO, "raydpp"):
        picked = distributed_greedy(job_of(table, 1, Request(Budget(9), Objective(Kernel()))), 2.0)
    expected = greedy_map(vectors(rows["gradient"]), 9, ids=rows["id"].to_pylist())
    assert picked.rows["id"].to_pylist() == rows.take(pa.array(expected.indices))["id"].to_pylist()
    assert picked.selection.log_det == pytest.approx(expected.log_det)
    assert picked.selection.indices.tolist() == list(range(9))
    assert not picked.interrupted
    assert "title: greedy MAP by the textbook oracle" in caplog.text


def test_partitions_hand_in_to_a_merge(table: str, caplog: pytest.LogCaptureFixture) -> None:
    request = Request(Budget(9), Objective(Kernel()), oracle="cholesky")
    with caplog.at_level(logging.INFO, "raydpp"):
        picked = distributed_greedy(job_of(table, 3, request, OnRay("select")), 2.0)
    assert picked.rows.equals(distributed_greedy(job_of(table, 3, request), 2.0).rows)  # here, one after the other
    assert len(set(picked.rows["id"].to_pylist())) == 9
    assert picked.selection.oracle == "cholesky"
    assert "by the cholesky oracle" in caplog.text
