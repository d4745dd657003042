from __future__ import annotations

import numpy as np

from raydpp.dpp.oracles.working_set import LazyWorkingSet, WorkingSet


def test_a_working_set_is_conditioned_on_its_picks() -> None:
    root = np.random.default_rng(0).standard_normal((9, 12))
    covariance = root @ root.T / 12
    before = covariance.copy()
    working_set = WorkingSet(np.arange(100, 109), covariance)
    for count, pick in enumerate((4, 0, 7), start=1):
        working_set.pick(pick)
        picks = working_set.picked
        inner = np.linalg.solve(before[np.ix_(picks, picks)], before[picks])
        expected = np.diag(before) - (before[picks] * inner).sum(axis=0)
        expected[picks] = 0.0
        np.testing.assert_allclose(working_set.residuals, expected, atol=1e-13)
        assert working_set.columns.shape == (9, count)
    factor = np.tril(working_set.columns[working_set.picked])
    np.testing.assert_allclose(factor @ factor.T, before[np.ix_(working_set.picked, working_set.picked)], atol=1e-13)
    np.testing.assert_array_equal(covariance, before)


def test_residuals_are_never_negative() -> None:
    covariance = np.ones((3, 3))
    covariance[0, 0] = -1e-17
    working_set = WorkingSet(np.arange(3), covariance)
    assert (working_set.residuals >= 0).all()
    working_set.pick(1)
    assert working_set.residuals.tolist() == [0.0, 0.0, 0.0]


def test_a_lazy_working_set_asks_only_for_the_covariances_that_picks_need() -> None:
    root = np.random.default_rng(0).standard_normal((9, 12))
    covariance = root @ root.T / 12
    asked: list[int] = []

    def covariances(places: np.ndarray) -> np.ndarray:
        asked.extend(places.tolist())
        return covariance[:, places]

    dense = WorkingSet(np.arange(9), covariance)
    lazy = LazyWorkingSet(np.arange(9), covariance.diagonal(), covariances, block=2)
    picks = np.argsort(covariance.diagonal())[[0, 8, 3]]
    for pick in picks:
        dense.pick(pick)
        lazy.pick(pick)
        np.testing.assert_allclose(lazy.residuals, dense.residuals, atol=1e-14)
    assert len(asked) == len(set(asked)) <= 6
    assert set(picks.tolist()) <= set(asked)
