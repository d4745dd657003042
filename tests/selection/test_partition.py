from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raydpp import store
from raydpp.errors import UserError
from raydpp.selection.kernels import Kernel
from raydpp.selection.partition import Request, budget, merge, select_rows, share


def rows(n: int, seed: int = 0, copies: int = 0) -> pa.Table:
    points = np.random.default_rng(seed).standard_normal((n, 6))
    points[n - copies :] = points[:copies]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    return pa.table(
        {
            "id": [f"{index:04d}" for index in range(n)],
            "gradient": store.vector_array(points, pa.float64()),
            "response_tokens": np.arange(n),
        }
    )


def test_a_budget_is_a_count_or_a_fraction() -> None:
    assert budget(7, 100) == 7
    assert budget(0.1, 100) == 10
    assert budget(0.001, 100) == 1
    assert budget(12.0, 100) == 12
    for size, words in ((0, "at least one"), (-3, "at least one"), (1.5, "whole number"), (101, "larger budget")):
        with pytest.raises(UserError, match=words):
            budget(size, 100)


def test_partitions_hand_in_more_than_their_share() -> None:
    assert share(100, 1, 2.0) == 100
    assert share(100, 8, 2.0) == 25
    assert share(3, 2, 4.0) == 3


def test_rows_are_picked_whatever_their_order() -> None:
    table, request = rows(40), Request(Kernel())
    picks, selection = select_rows(table, 10, request)
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(40)))
    assert select_rows(shuffled, 10, request)[0]["id"].to_pylist() == picks["id"].to_pylist()
    assert table.take(pa.array(selection.indices)).equals(picks)


def test_merging_comes_close_to_one_machine_and_drops_copies() -> None:
    table, request = rows(120, copies=30), Request(Kernel())
    whole = select_rows(table, 20, request)[1].log_det
    order = np.random.default_rng(0).permutation(120)
    parts = [table.take(pa.array(order[i::4])) for i in range(4)]
    handed = [select_rows(part, share(20, 4, 2.0), request)[0] for part in parts]
    picks, selection = merge(handed, 20, request)
    assert len(picks) == 20
    assert whole - 20 * 0.05 < selection.log_det <= whole + 1e-9
    single = select_rows(table.take(pa.array(order[:20])), 20, request)[1]
    assert len(single.indices) < 20 or single.log_det < selection.log_det


def test_quality_is_standardised_by_the_whole_tables_numbers() -> None:
    table = rows(30)
    request = Request(Kernel(), quality="response_tokens", weight=1.0, mean=14.5, std=8.0)
    picks, _ = select_rows(table, 3, request)
    assert picks["id"].to_pylist() == ["0029", "0028", "0027"]
    scores = request.scores(table.slice(29))
    assert scores is not None
    assert scores[0] == pytest.approx((29 - 14.5) / 8)
    holes = table.set_column(2, "response_tokens", pa.array([None] * 30, pa.int64()))
    with pytest.raises(UserError, match="30 rows have no 'response_tokens'"):
        request.scores(holes)
