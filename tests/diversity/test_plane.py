from __future__ import annotations

import numpy as np
import pytest

from raydpp.diversity import plane
from raydpp.diversity.plane import principal_plane
from raydpp.errors import UserError
from tests.test_tables import directions


def stretched(n: int, d: int) -> np.ndarray:
    """(n, D) unit rows of which two directions hold more variance than the others, by different amounts."""
    rows = directions(n, d) + 2 * np.random.default_rng(1).standard_normal((n, 2)) @ np.eye(2, d)
    rows[:, 1] *= 0.5
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8])
def test_points_are_the_first_two_principal_components(dtype: type) -> None:
    rows = stretched(300, 20)
    given = np.rint(rows * 100).astype(np.int8) if dtype == np.int8 else rows.astype(dtype)
    unit = given / np.linalg.norm(given.astype(float), axis=1, keepdims=True)
    centred = unit - unit.mean(0)
    left, values, _ = np.linalg.svd(centred, full_matrices=False)
    found = principal_plane([given])
    assert found.points.shape == (300, 2)
    for n in range(2):
        expected = left[:, n] * values[n]
        sign = np.sign(expected @ found.points[:, n])
        np.testing.assert_allclose(sign * found.points[:, n], expected, atol=1e-3)
    assert found.explained == pytest.approx((values[:2] ** 2).sum() / (values**2).sum(), rel=1e-3)


def test_blocks_do_not_matter_and_many_rows_are_fitted_by_some(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = stretched(2_500, 20)  # of several blocks
    whole = principal_plane([rows])
    np.testing.assert_array_equal(principal_plane([rows[:7], rows[7:]]).points, whole.points)
    monkeypatch.setattr(plane, "_FITTED", 500)
    some = principal_plane([rows])
    for n in range(2):
        assert abs(np.corrcoef(whole.points[:, n], some.points[:, n])[0, 1]) > 0.95
    np.testing.assert_array_equal(principal_plane([rows]).points, some.points)


@pytest.mark.parametrize(("rows", "explained"), [(np.eye(3)[:1], 0), (np.eye(3)[[0] * 5], 0), (np.ones((4, 1)), 0)])
def test_what_has_no_plane_lies_in_a_point(rows: np.ndarray, explained: float) -> None:
    found = principal_plane([rows])
    assert found.explained == explained
    np.testing.assert_allclose(found.points, np.zeros((len(rows), 2)), atol=1e-6)


def test_rows_that_are_no_directions_are_refused() -> None:
    with pytest.raises(UserError):
        principal_plane([np.full((2, 3), np.nan)])
