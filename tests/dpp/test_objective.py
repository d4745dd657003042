from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import (
    Objective,
    Score,
    check_scores,
    combine,
    quantile_scale,
    robust_scale,
    standardise,
)
from raydpp.errors import UserError

NONE = np.zeros(3)


def test_what_ties_is_a_matter_of_rounding() -> None:
    objective = Objective(Kernel("rbf"))
    for residuals in ([0.5, 0.5 - 1e-11, 0.5 - 1e-7], [1e-6, 1e-6 - 1e-13, 1e-6 - 1e-11]):
        scores, tie_bound = objective.scores(np.array(residuals), NONE)
        assert (tie_bound >= scores.max()).tolist() == [True, True, False]


def test_a_score_is_the_weighted_log_and_the_modular_term() -> None:
    objective = Objective(Kernel("cosine"), 0.75)
    scores, tie_bound = objective.scores(np.array([0.5, 0.0]), np.array([3.0, 1.0]))
    assert scores[0] == pytest.approx(0.25 * np.log(0.5) + 3.0)
    assert scores[1] == tie_bound[1] == -np.inf
    assert 0 < tie_bound[0] - scores[0] < 1e-8


def test_scores_and_tie_bounds_rise_with_residuals() -> None:
    residuals = np.geomspace(1.1e-10, 1.0, 5000)
    for weight in (0.0, 0.9):
        scores, tie_bound = Objective(Kernel(), weight).scores(residuals, np.zeros(5000))
        assert (np.diff(scores) > 0).all()
        assert (np.diff(tie_bound) > 0).all()


def test_residuals_are_those_at_which_items_have_a_score() -> None:
    for weight, modular in ((0.0, np.zeros(2)), (0.6, np.array([-1.0, 0.5]))):
        objective = Objective(Kernel(), weight)
        found = objective.residuals(-0.8, modular)
        np.testing.assert_allclose(objective.scores(found, modular)[0], -0.8)


def test_the_modular_term_is_quality_less_what_an_item_costs() -> None:
    quality, costs = np.array([1.0, -2.0]), np.array([1.0, np.e])
    assert Objective(Kernel()).modular(2, None).tolist() == [0.0, 0.0]
    np.testing.assert_allclose(Objective(Kernel(), 0.25).modular(2, quality), [0.25, -0.5])
    np.testing.assert_allclose(Objective(Kernel(), 0.25).modular(2, quality, costs), [0.25, -1.25])
    np.testing.assert_allclose(Objective(Kernel()).modular(2, quality, costs), [0.0, -1.0])
    np.testing.assert_allclose(Objective(Kernel(), 0.25, 0.1).modular(2, quality, costs), [0.025, -0.8])
    assert quality.tolist() == [1.0, -2.0]
    with pytest.raises(UserError, match="needs quality scores"):
        Objective(Kernel(), 0.25).modular(2, None, costs)


def test_bounded_scores_are_zero_to_one_between_two_quantiles() -> None:
    values = np.random.default_rng(0).permutation(np.arange(101.0))
    low, width = quantile_scale(values)
    assert (low, width) == pytest.approx((1.0, 98.0))
    scores = combine([values, values], [Score("a", 1.0, low, width, True), Score("b", -3.0, low, width, True)])
    np.testing.assert_allclose(scores, -0.5 * np.clip((values - 1) / 98, 0, 1), atol=1e-12)
    assert combine([np.full(3, 7.0)], [Score("a", 1.0, *quantile_scale(np.full(3, 7.0)), True)]).tolist() == [0, 0, 0]
    assert quantile_scale(np.empty(0)) == (0.0, 0.0)


def test_an_objective_says_what_it_is() -> None:
    assert str(Objective(Kernel("rbf", 0.25))) == "rbf kernel, gamma 0.25"
    assert str(Objective(Kernel("cosine"), 0.5, 0.03)) == (
        "cosine kernel, ridge 0.1, quality weight 0.5, a score of 1 worth 0.03 nats"
    )


def test_a_weight_out_of_range_is_refused() -> None:
    for weight in (-0.1, 1.5, np.nan):
        with pytest.raises(UserError, match=r"the quality weight is .* between 0"):
            Objective(Kernel(), weight)


def test_scores_are_finite_numbers_one_a_row_or_do_not_count() -> None:
    assert check_scores(None, 0.0, 2) is None
    assert check_scores([1, 2], 0.0, 2) is None
    found = check_scores(torch.tensor([1, 2]), 0.5, 2)
    assert found is not None
    assert found.tolist() == [1.0, 2.0]
    with pytest.raises(UserError, match=r"1 quality scores .*rows \[1\]"):
        check_scores([1, np.nan], 0.0, 2)


def test_scores_are_on_the_scale_of_a_normal_distribution() -> None:
    values = np.random.default_rng(0).normal(50.0, 7.0, 100_000)
    scores = standardise(values)
    assert scores.dtype == np.float64
    assert np.median(scores) == pytest.approx(0.0, abs=1e-12)
    assert scores.std() == pytest.approx(1.0, abs=0.02)
    assert (np.argsort(scores) == np.argsort(values)).all()


def test_a_few_outliers_move_nothing() -> None:
    values = np.random.default_rng(0).normal(50.0, 7.0, 1000)
    center, scale = robust_scale(values)
    wild = np.concatenate([values, [1e9] * 20])
    moved = robust_scale(wild)
    assert moved[0] == pytest.approx(center, abs=0.5)
    assert moved[1] == pytest.approx(scale, rel=0.05)
    assert wild.std() > 1e6


def test_a_part_of_a_corpus_is_scored_by_the_corpus() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 40)
    whole = standardise(lengths)
    np.testing.assert_allclose(standardise(lengths[:7], *robust_scale(lengths)), whole[:7])


def test_where_most_are_the_same_the_standard_deviation_counts() -> None:
    assert robust_scale(np.array([3.0] * 9 + [13.0])) == (3.0, pytest.approx(3.0))


@pytest.mark.parametrize("value", [0.1, 1e9 / 3])  # the mean of 0.1s is not 0.1, nor is their deviation 0
def test_a_constant_column_becomes_zeros(value: float) -> None:
    assert standardise([value] * 7).tolist() == [0.0] * 7
    assert standardise([1.0, 2.0], center=1.0, scale=0.0).tolist() == [0.0, 0.0]


def test_columns_are_combined_by_their_weights() -> None:
    scores = (Score("a", 3.0, 1.0, 2.0), Score("b", -1.0, 0.0, 1.0))
    np.testing.assert_allclose(combine([np.array([1.0, 5.0]), np.array([2.0, -4.0])], scores), [-0.5, 2.5])


@pytest.mark.parametrize(
    ("values", "center", "scale", "words"),
    [
        ([1.0, np.nan, np.inf], None, None, "2 of 3 quality values"),
        ([1.0, 2.0], np.nan, 1.0, "center nan"),
        ([1.0, 2.0], 0.0, -1.0, "scale -1.0"),
    ],
)
def test_what_is_not_finite_is_refused(
    values: list[float], center: float | None, scale: float | None, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        standardise(values, center, scale)
