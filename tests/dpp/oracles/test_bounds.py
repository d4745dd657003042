from __future__ import annotations

import numpy as np
import torch

from raydpp.dpp.oracles.bounds import Bounds, Exact, square_sums


def test_residuals_not_computed_exactly_are_raised_by_the_error() -> None:
    bounds = Bounds(4, 1.0, torch.float32)
    assert (bounds.upper() == 1.0).all()
    bounds.picks = 3
    assert bounds.stale.all()
    bounds.set_approximate(np.array([0, 1]), np.array([0.5, -1e-9]), 3)
    bounds.set_exact(np.array([2, 3]), np.array([0.25, 0.0]), picked=[1])
    np.testing.assert_allclose(bounds.upper(), [0.5 + 1e-6, 1e-6, 0.25, 0.0])
    np.testing.assert_array_equal(bounds.upper(np.array([2, 0])), bounds.upper()[[2, 0]])
    bounds.picks = 5
    assert bounds.stale.tolist() == [True, True, True, False]  # a pick is never out of date


def test_bounds_never_rise_and_what_is_a_pick_stays_one() -> None:
    bounds = Bounds(3, 1.0, torch.float64)
    bounds.picks = 2
    bounds.set_exact(np.array([0, 1, 2]), np.array([0.5, 0.0, 0.25]), picked=[1])
    bounds.picks = 4
    bounds.set_approximate(np.array([0, 1, 2]), np.array([0.7, 0.6, 0.2]), 3)
    np.testing.assert_allclose(bounds.upper(), [0.5, 0.0, 0.2], atol=1e-12)
    assert bounds.stale.tolist() == [True, False, True]
    assert bounds.seen[[0, 2]].tolist() == [3, 3]
    bounds.set_approximate(np.array([0]), np.array([0.1]), 2)  # of fewer picks than are taken into account
    assert bounds.upper()[0] == 0.5


def test_falls_smaller_than_the_error_add_up() -> None:
    bounds = Bounds(1, 1.0, torch.float32)
    row = np.array([0])
    bounds.set_exact(row, np.array([0.5]), picked=[])
    for picks in range(1, 101):
        bounds.picks = picks
        bounds.set_approximate(row, bounds.residuals[row] - 1e-7, picks)
        assert bounds.upper()[0] <= 0.5
    np.testing.assert_allclose(bounds.upper(), 0.5 - 1e-5 + bounds.error)
    assert not bounds.measure(row, np.array([0.5 - 1e-5]))
    assert bounds.error == 1e-6


def test_the_error_is_four_times_the_largest_ever_met() -> None:
    bounds = Bounds(3, 1.0, torch.float32)
    assert not bounds.measure(np.arange(3), np.full(3, 0.9))  # nothing to compare: all are exact
    bounds.picks = 1
    bounds.set_approximate(np.array([0, 1]), np.array([0.5, 0.5]), 1)
    assert not bounds.measure(np.array([0, 1]), np.array([0.5, 0.501]))
    np.testing.assert_allclose(bounds.error, 0.004)
    assert not bounds.measure(np.array([0, 1]), np.array([0.5, 0.5]))
    np.testing.assert_allclose(bounds.error, 0.004)


def test_bounds_that_tell_little_apart_are_noticed_and_kept_by_a_restart() -> None:
    bounds = Bounds(3, 1.0, torch.float32)
    bounds.picks = 2
    bounds.set_approximate(np.array([0, 1]), np.array([1e-5, 2e-5]), 2)
    bounds.set_exact(np.array([2]), np.array([0.0]), picked=[0])
    assert bounds.measure(np.array([0, 1]), np.array([1e-5, 2e-5]))
    before = bounds.upper()
    bounds.restart(torch.float64)
    np.testing.assert_array_equal(bounds.upper(), before)
    assert bounds.seen[:2].tolist() == [0, 0]
    assert bounds.stale.tolist() == [True, True, False]
    assert bounds.error == 1e-13


def test_squares_are_summed_in_float64() -> None:
    block = torch.full((2, 3000), 1e-3, dtype=torch.float32)
    block[0, 0] = 1.0
    np.testing.assert_allclose(square_sums(block), [1.0 + 2999e-6, 3e-3], rtol=3e-7)


def test_exact_residuals_are_split_from_picks() -> None:
    rows, residuals = Exact(np.array([7, 2, 9]), np.array([0.5, 0.0, 0.25]), [1]).unpicked
    assert (rows.tolist(), residuals.tolist()) == ([7, 9], [0.5, 0.25])
    nothing = Exact.empty()
    assert (len(nothing.rows), len(nothing.residuals), nothing.picked) == (0, 0, [])
    assert nothing.rows.dtype == nothing.unpicked[0].dtype == np.int64
