from __future__ import annotations

import numpy as np
import pytest

from raydpp.errors import UserError
from raydpp.selection.quality import standardise


def test_scores_have_mean_0_and_standard_deviation_1() -> None:
    lengths = np.array([3, 14, 15, 92, 65], dtype=np.int32)
    scores = standardise(lengths)
    assert scores.dtype == np.float64
    assert scores.mean() == pytest.approx(0.0, abs=1e-15)
    assert scores.std() == pytest.approx(1.0)
    assert (np.argsort(scores) == np.argsort(lengths)).all()


def test_a_part_of_a_corpus_is_scored_by_the_corpus() -> None:
    lengths = np.random.default_rng(0).integers(1, 500, 40)
    whole = standardise(lengths)
    np.testing.assert_allclose(standardise(lengths[:7], lengths.mean(), lengths.std()), whole[:7])


@pytest.mark.parametrize("value", [0.1, 1e9 / 3])  # the mean of 0.1s is not 0.1, nor is their deviation 0
def test_a_constant_column_becomes_zeros(value: float) -> None:
    assert standardise([value] * 7).tolist() == [0.0] * 7


def test_no_spread_in_the_corpus_becomes_zeros() -> None:
    assert standardise([1.0, 2.0], mean=1.0, std=0.0).tolist() == [0.0, 0.0]


@pytest.mark.parametrize(
    ("values", "mean", "std", "words"),
    [
        ([1.0, np.nan, np.inf], None, None, "2 of 3 quality values"),
        ([1.0, 2.0], np.nan, 1.0, "mean nan"),
        ([1.0, 2.0], 0.0, -1.0, "standard deviation -1.0"),
    ],
)
def test_what_is_not_finite_is_refused(values: list[float], mean: float | None, std: float | None, words: str) -> None:
    with pytest.raises(UserError, match=words):
        standardise(values, mean, std)
