from __future__ import annotations

import logging

import pyarrow as pa
import pytest

from raydpp.dpp.budget import Budget
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.request import Request
from raydpp.tables import open_table, partition_files, vectors


def test_one_partition_is_greedy_over_the_table_and_says_by_which_oracle(
    table: str, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_table(table, "gradient")
    rows = opened.read(opened.parts)
    with caplog.at_level(logging.INFO, "raydpp"):
        picked = distributed_greedy(
            opened, [list(opened.parts)], Request(Budget(9), Objective(Kernel()), opened.column), 2.0, "title"
        )
    expected = greedy_map(vectors(rows["gradient"]), 9, ids=rows["id"].to_pylist())
    assert picked.rows["id"].to_pylist() == rows.take(pa.array(expected.indices))["id"].to_pylist()
    assert picked.selection.log_det == pytest.approx(expected.log_det)
    assert picked.selection.indices.tolist() == list(range(9))
    assert not picked.interrupted
    assert "title: greedy MAP by the textbook oracle" in caplog.text


def test_partitions_hand_in_to_a_merge(table: str, caplog: pytest.LogCaptureFixture) -> None:
    opened = open_table(table, "gradient")
    groups = partition_files(opened.parts, 3)
    assert len(groups) > 1
    request = Request(Budget(9), Objective(Kernel()), opened.column, oracle="cholesky")
    with caplog.at_level(logging.INFO, "raydpp"):
        picked = distributed_greedy(opened, groups, request, 2.0, "title", exclude=pa.array([], pa.string()))
    assert len(set(picked.rows["id"].to_pylist())) == 9
    assert picked.selection.oracle == "cholesky"
    assert "by the cholesky oracle" in caplog.text
