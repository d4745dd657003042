from __future__ import annotations

import numpy as np
import pytest

from raydpp.selection.kernels import Kernel
from raydpp.selection.objective import Objective, worth


def test_what_ties_is_a_matter_of_rounding() -> None:
    objective = Objective(Kernel("rbf"))
    for residuals in ([0.5, 0.5 - 1e-11, 0.5 - 1e-7], [1e-6, 1e-6 - 1e-13, 1e-6 - 1e-11]):
        scores, reach = objective.scores(np.array(residuals))
        assert (reach >= scores.max()).tolist() == [True, True, False]


def test_a_score_is_the_weighted_log_and_the_offset() -> None:
    objective = Objective(Kernel("cosine"), 0.25, np.array([1.0, 2.0, 3.0]))
    scores, reach = objective.scores(np.array([0.5, 0.0]), np.array([2, 0]))
    assert scores[0] == pytest.approx(0.25 * np.log(0.5) + 3.0)
    assert scores[1] == reach[1] == -np.inf
    assert 0 < reach[0] - scores[0] < 1e-8


def test_scores_and_reach_rise_with_residuals() -> None:
    residuals = np.geomspace(1.1e-10, 1.0, 5000)
    for diversity in (1.0, 0.1):
        scores, reach = Objective(Kernel(), diversity).scores(residuals)
        assert (np.diff(scores) > 0).all()
        assert (np.diff(reach) > 0).all()


def test_residuals_are_those_at_which_items_have_a_score() -> None:
    rows = np.array([2, 0])
    for objective in (Objective(Kernel()), Objective(Kernel(), 0.4, np.array([0.5, 0.0, -1.0]))):
        found = objective.residuals(-0.8, rows)
        np.testing.assert_allclose(objective.scores(found, rows)[0], -0.8)


def test_what_an_item_is_worth_is_its_quality_less_what_it_costs() -> None:
    scores, costs = np.array([1.0, -2.0]), np.array([1.0, np.e])
    assert worth(2, 0.0, None, None, 1.0).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(worth(2, 0.25, scores, None, 1.0), [0.25, -0.5])
    np.testing.assert_allclose(worth(2, 0.25, scores, costs, 2.0), [0.25, -2.0])
    np.testing.assert_allclose(worth(2, 0.25, None, costs, 2.0), [0.0, -1.5])
    np.testing.assert_allclose(worth(2, 0.25, scores, costs, 0.0), [0.25, -0.5])
    assert scores.tolist() == [1.0, -2.0]
