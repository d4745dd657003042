from __future__ import annotations

import re

import numpy as np
import pytest
import torch

from raydpp.dpp.features import Items, UnitRows, id_order, rows_of, unit_rows
from raydpp.errors import UserError


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("as_tensor", [False, True])
def test_unit_rows_normalises_again_in_float64_and_leaves_its_input(dtype: type, as_tensor: bool) -> None:
    stored: np.ndarray = sphere(50, 384).astype(dtype)
    before = stored.copy()
    stored.flags.writeable = as_tensor  # arrays that come out of Arrow are read-only
    rows = unit_rows(torch.from_numpy(stored) if as_tensor else stored)
    assert rows.dtype == torch.float64
    np.testing.assert_allclose(rows.norm(dim=1).numpy(), 1.0, rtol=1e-15)
    np.testing.assert_allclose(rows.numpy(), before, atol=1e-3)
    np.testing.assert_array_equal(stored, before)


def whole(x: np.ndarray) -> np.ndarray:
    return np.rint(x * 2 * x.shape[1] ** 0.5).astype(np.int8)


@pytest.mark.parametrize("as_tensor", [False, True])
def test_whole_numbers_of_any_norm_stand_for_directions(as_tensor: bool) -> None:
    x = whole(sphere(50, 300))
    given = torch.from_numpy(x) if as_tensor else x
    rows, exact = UnitRows(given), x / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    np.testing.assert_allclose(rows.take().numpy(), exact, rtol=1e-15)
    index = torch.tensor([7, 0])
    assert rows.take(index, torch.float32).dtype == torch.float32
    np.testing.assert_allclose(rows.part(index).take().numpy(), exact[[7, 0]], rtol=1e-15)
    assert rows.stored(np.array([7])).dtype == np.int8
    directions = torch.from_numpy(sphere(3, 300, 1).T)
    np.testing.assert_allclose(rows.square_sums(directions), ((exact @ directions.numpy()) ** 2).sum(1), rtol=1e-9)
    both = rows.with_rows(UnitRows(-given))
    np.testing.assert_allclose(both.take().numpy(), np.concatenate([exact, -exact]), rtol=1e-15)
    for one, other in ((rows, UnitRows(exact)), (UnitRows(exact), rows)):
        with pytest.raises(UserError, match="only some are whole numbers"):
            one.with_rows(other)
    x[3] = 0
    with pytest.raises(UserError, match=r"1 of 50 rows of zeros \(ids 3\)"):
        UnitRows(x)


def test_unit_rows_names_the_rows_it_refuses() -> None:
    x = sphere(10, 3)
    x[1, 2] = np.nan
    x[4, 0] = np.inf
    x[5] = 0.0
    x[8] *= 1.003
    ids = [f"id{i}" for i in range(10)]
    with pytest.raises(UserError) as caught:
        unit_rows(x, ids)
    message = str(caught.value)
    assert "2 of 10 rows with NaN or infinite entries (ids id1, id4)" in message
    assert "1 of 10 rows of zeros (ids id5)" in message
    assert "1 of 10 rows without unit norm (ids id8)" in message


def test_unit_rows_names_only_the_first_few() -> None:
    with pytest.raises(UserError, match=re.escape("7 of 7 rows without unit norm (ids 0, 1, 2, 3, 4, ...)")):
        unit_rows(2.0 * sphere(7, 3))


@pytest.mark.parametrize("features", [np.zeros((0, 4)), np.ones(4), np.zeros((2, 2, 2)), np.array([["a", "b"]])])
def test_unit_rows_refuses_what_is_not_a_table_of_numbers(features: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"N rows of D numbers|array of numbers"):
        unit_rows(features)


def test_unit_rows_refuses_another_number_of_ids() -> None:
    with pytest.raises(UserError, match="3 ids for 4 rows"):
        unit_rows(sphere(4, 3), ["a", "b", "c"])


def test_rows_are_not_copied_until_they_are_taken() -> None:
    x = torch.from_numpy(sphere(5000, 8))
    rows = UnitRows(x)
    x[3] = x[4].clone()
    torch.testing.assert_close(rows.take(torch.tensor([3]))[0], rows.take(torch.tensor([4]))[0])
    assert rows.take(torch.tensor([1, 1]), torch.float32).dtype == torch.float32
    assert (len(rows), rows.dimension, rows.device.type) == (5000, 8, "cpu")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_square_sums_are_of_the_projections(dtype: torch.dtype, tolerance: float) -> None:
    x, directions = 1.001 * sphere(5000, 8), np.random.default_rng(0).standard_normal((8, 3))
    rows = UnitRows(x.astype(np.float32))
    expected = ((rows.take().numpy() @ directions) ** 2).sum(axis=1)
    np.testing.assert_allclose(rows.square_sums(torch.from_numpy(directions).to(dtype)), expected, rtol=tolerance)
    part = rows.part(torch.tensor([7, 4321]))
    np.testing.assert_allclose(part.square_sums(torch.from_numpy(directions)), expected[[7, 4321]], rtol=1e-12)
    index = torch.arange(4999, -1, -1)
    np.testing.assert_allclose(rows.square_sums(torch.from_numpy(directions), index), expected[::-1], rtol=1e-12)


def test_rows_of_another_dimension_cannot_stand_behind() -> None:
    rows = UnitRows(sphere(4, 3))
    assert torch.equal(rows.with_rows(UnitRows(sphere(2, 3, 1))).take()[4:], UnitRows(sphere(2, 3, 1)).take())
    with pytest.raises(UserError, match="have 5 dimensions and the candidates 3"):
        rows.with_rows(UnitRows(sphere(2, 5)))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_rows_are_given_as_they_are_stored(dtype: type) -> None:
    x: np.ndarray = (1.001 * sphere(20, 5)).astype(dtype)
    stored = UnitRows(x).stored(np.array([7, 0, 7]))
    assert stored.dtype == dtype
    np.testing.assert_array_equal(stored, x[[7, 0, 7]])
    stored[:] = 0.0
    np.testing.assert_array_equal(UnitRows(x).stored(np.array([7])), x[[7]])
    assert (x[7] != 0).all()
    assert UnitRows(x).stored(np.empty(0, dtype=np.int64)).shape == (0, 5)


def test_rows_behind_others_are_stored_as_these_are_and_have_norms_of_their_own() -> None:
    first, more = 0.9995 * sphere(4, 3), (1.001 * sphere(3, 3, 1)).astype(np.float32)
    rows = UnitRows(first)
    both = rows.with_rows(UnitRows(more))
    assert (len(rows), len(both)) == (4, 7)
    assert both.stored(np.array([6])).dtype == np.float64
    torch.testing.assert_close(both.take().norm(dim=1), torch.ones(7, dtype=torch.float64), rtol=0, atol=1e-15)
    expected = np.concatenate([unit_rows(first).numpy(), unit_rows(more).numpy()])
    np.testing.assert_array_equal(both.take().numpy(), expected)
    np.testing.assert_array_equal(
        both.with_rows(rows, rows).take().numpy(), expected[[*range(7), *range(4), *range(4)]]
    )
    half = UnitRows(sphere(4, 3).astype(np.float16)).with_rows(UnitRows(more))
    np.testing.assert_array_equal(half.take().numpy()[4:], unit_rows(more.astype(np.float16)).numpy())


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


def test_items_have_a_modular_term_and_one_cost_and_source_each() -> None:
    items = Items(sphere(3, 4), ["b", "a", "c"], costs=np.array([1.0, 2.0, 0.5]), sources=np.array(["x", "y", "x"]))
    assert len(items) == 3
    assert items.modular.tolist() == [0.0, 0.0, 0.0]
    assert items.order.tolist() == [1, 0, 2]
    assert items.excluded.tolist() == []
    np.testing.assert_array_equal(items.unit_rows().take().numpy(), unit_rows(sphere(3, 4)).numpy())
    with pytest.raises(UserError, match="2 costs for 3 items"):
        Items(sphere(3, 4), costs=np.array([1.0, 2.0]))
    with pytest.raises(UserError, match=r"2 costs are not numbers above 0 \(rows \[0, 2\]\)"):
        Items(sphere(3, 4), costs=np.array([0.0, 1.0, np.inf]))
    with pytest.raises(UserError, match="1 sources for 3 items"):
        Items(sphere(3, 4), sources=np.array(["x"]))


def test_rows_of_any_library_are_rows() -> None:
    import pandas as pd
    import pyarrow as pa

    points = np.eye(6, 4, dtype=np.float32) + np.eye(6, 4, -3, dtype=np.float32)  # (6, 4)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    listed = pa.FixedSizeListArray.from_arrays(pa.array(points.reshape(-1)), 4)
    held: list[object] = [points.tolist(), np.asfortranarray(points), points[::-1][::-1], pd.Series(list(points))]
    held += [pd.DataFrame(points), listed, pa.chunked_array([listed[:2], listed[2:]]), pa.array(points.tolist())]
    held += [pa.FixedShapeTensorArray.from_numpy_ndarray(points), np.repeat(points, 2, axis=0)[::2]]
    for rows in held:
        np.testing.assert_array_equal(UnitRows(rows).take(), UnitRows(points).take())  # type: ignore[arg-type]
    backwards = UnitRows(points[::-1], ids=pa.array(list("abcdef"))).take()
    np.testing.assert_array_equal(backwards, UnitRows(points).take().flip(0))
    for ids in (pd.Series(list("fedcba")), pa.array(list("fedcba")), pa.chunked_array([list("fed"), list("cba")])):
        assert id_order(ids, 6).tolist() == [5, 4, 3, 2, 1, 0]
    with pytest.raises(UserError, match="not an \\(N, D\\) array"):
        UnitRows(pd.Series([[1.0], [1.0, 0.0]]))
