from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.errors import UserError
from raydpp.selection.ordering import check_scores, id_order, rows_of


def test_ids_rank_by_code_point_or_number() -> None:
    assert id_order(["b", "a", "B", "ä"], 4).tolist() == [2, 1, 0, 3]
    assert id_order(np.array([30, 4, 100]), 3).tolist() == [1, 0, 2]
    assert id_order(None, 3).tolist() == [0, 1, 2]


def test_rows_are_found_by_id_or_by_index() -> None:
    assert rows_of(["c", "a"], ["a", "b", "c"], 3, "owned").tolist() == [2, 0]
    assert rows_of(np.array([2, 0]), None, 3, "owned").tolist() == [2, 0]
    assert rows_of(None, None, 3, "owned").tolist() == []
    with pytest.raises(UserError, match=r"2 of the ids in owned are no rows' \(the first: x\)"):
        rows_of(["x", "a", "y"], ["a", "b", "c"], 3, "owned")


def test_scores_are_finite_numbers_one_a_row_or_do_not_count() -> None:
    assert check_scores(None, 0.0, 2) is None
    assert check_scores([1, 2], 0.0, 2) is None
    found = check_scores(torch.tensor([1, 2]), 0.5, 2)
    assert found is not None
    assert found.tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match=r"1 quality scores .*rows \[1\]"):
        check_scores([1, np.nan], 0.0, 2)
