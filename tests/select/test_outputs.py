from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.cluster import Here
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.objective import Objective, Score
from raydpp.errors import UserError
from raydpp.runs import Run
from raydpp.select.outputs import write_examples, write_selection
from raydpp.select.request import Picked, Request
from raydpp.storage import Folder
from raydpp.tables import SELECTION_SCHEMA, vector_array


def test_a_selection_is_written_in_the_order_of_picking(tmp_path: Path) -> None:
    rows = pa.table({"id": ["c", "a"], "gradient": vector_array(np.eye(2), pa.float32()), "length": [4, 8]})
    picked = Picked(rows, Selection.of([0, 1], [-0.5, -1.0]))
    request = Request(Budget(), Objective(Kernel()), quality=(Score("length", 1.0, 6.0, 2.0),))
    write_selection(Run(Folder.at(tmp_path), {}), picked, request)
    found = pq.read_table(tmp_path / "selection")
    assert found.schema.equals(SELECTION_SCHEMA)
    assert found["rank"].to_pylist() == [1, 2]
    assert found["id"].to_pylist() == ["c", "a"]
    assert found["source"].to_pylist() == [None, None]
    assert found["log_det"].to_pylist() == [-0.5, -1.5]
    assert found["quality"].to_pylist() == [-1.0, 1.0]
    assert pq.read_table(tmp_path / "gradients").equals(rows)
    write_selection(Run(Folder.at(tmp_path / "none"), {}), picked, Request(Budget(), Objective(Kernel())))
    assert pq.read_table(tmp_path / "none" / "selection")["quality"].null_count == 2


def test_examples_come_in_the_order_asked_for_and_missing_ones_are_said(corpus: str, tmp_path: Path) -> None:
    rows = pq.read_table(Path(corpus) / "corpus").to_pylist()
    ids = [rows[n]["id"] for n in (7, 2, 31)]
    write_examples(Here(), Folder.at(tmp_path), Folder.at(corpus), ids)
    lines = [json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == ids
    assert lines[0]["messages"] == rows[7]["messages"]
    with pytest.raises(UserError, match="1 of the selected examples are not in"):
        write_examples(Here(), Folder.at(tmp_path), Folder.at(corpus), [*ids, "gone"])
