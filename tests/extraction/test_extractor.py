from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydpp.corpus.tokenization import TokenizedExample
from raydpp.extraction.extractor import Extractor, ExtractorConfig, Representation

NAN, INF = float("nan"), float("inf")
FEATURES = [[3.0, 4.0], [0.0, -0.5], [NAN, 1.0], [INF, 1.0], [0.0, 0.0], [1.0, 1.0], [1.0, 1.0], [1e-3, 0.0]]
LOSSES = [1.0, 2.0, 1.0, 1.0, 0.0, NAN, INF, 3.0]


class Given(Extractor):
    """Gives the rows that it was made with."""

    dimension = 2

    def __init__(self, columns: Mapping[str, list[Any]], representation: Representation = "gradient") -> None:
        super().__init__(ExtractorConfig("no model", representation, batch_tokens=8))
        self.columns = {name: torch.tensor(values) for name, values in columns.items()}

    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        places = [int(example.ids[0]) for example in examples]
        if 99 in places:
            raise ArithmeticError("not this one")
        return {name: values[places] for name, values in self.columns.items()}


def numbered(*places: int) -> list[TokenizedExample]:
    return [TokenizedExample(np.array([n, 1, 1], np.int32), np.array([False, True, True]), False) for n in places]


def test_features_have_unit_norm_and_come_with_their_lengths() -> None:
    found = Given({"feature": FEATURES, "loss": LOSSES})(numbered(0, 1, 7))
    np.testing.assert_allclose(found.features, [[0.6, 0.8], [0.0, -1.0], [1.0, 0.0]], rtol=1e-6)
    np.testing.assert_allclose(found.norms, [5, 0.5, 1e-3], rtol=1e-6)
    np.testing.assert_array_equal(found.losses, [1, 2, 3])
    assert found.reasons == [None] * 3
    assert found.features.dtype == found.norms.dtype == np.float32
    assert found.difficulties is None


def test_what_is_not_finite_or_zero_becomes_a_reason_and_a_row_of_zeros() -> None:
    found = Given({"feature": FEATURES, "loss": LOSSES})(numbered(*range(8)))
    expected = [None, None, "not finite", "not finite", "is zero", "not finite", "not finite", None]
    for reason, words in zip(found.reasons, expected, strict=True):
        assert reason is None if words is None else words in str(reason)
    bad = [words is not None for words in expected]
    assert not found.features[bad].any()
    np.testing.assert_allclose(np.linalg.norm(found.features, axis=1), np.where(bad, 0, 1), rtol=1e-6)


@pytest.mark.parametrize("representation", ["gradient", "hidden", "embedding"])
def test_a_reason_names_what_is_wrong_with_which_view(representation: Representation) -> None:
    found = Given({"feature": FEATURES}, representation)(numbered(2, 4))
    assert found.losses is None
    assert str(found.reasons[0]).startswith(f"the {representation} is not finite")
    assert str(found.reasons[1]).startswith(f"the {representation} is zero")
    assert ("certain of this response" in str(found.reasons[1])) == (representation == "gradient")


def test_an_example_that_the_model_fails_on_has_a_row_of_zeros_among_the_others() -> None:
    found = Given({"feature": FEATURES, "loss": LOSSES, "difficulty": LOSSES})(numbered(0, 99, 1))
    assert [reason is None for reason in found.reasons] == [True, False, True]
    assert "ArithmeticError: not this one" in str(found.reasons[1])
    np.testing.assert_allclose(found.features, [[0.6, 0.8], [0.0, 0.0], [0.0, -1.0]], rtol=1e-6)
    assert found.difficulties is not None
    np.testing.assert_array_equal(found.difficulties[[0, 2]], [1, 2])


@pytest.mark.parametrize("places", [(), (99,), (99, 99)])
def test_where_no_example_has_a_feature_there_are_zeros(places: tuple[int, ...]) -> None:
    found = Given({"feature": FEATURES})(numbered(*places))
    assert found.features.shape == (len(places), 2)
    assert not found.features.any()
    assert all(found.reasons)


@pytest.mark.parametrize(("given", "device", "budget"), [(None, "cpu", 512), (None, "meta", 16_384), (77, "cpu", 77)])
def test_the_budget_is_as_asked_or_as_the_device_likes(given: int | None, device: str, budget: int) -> None:
    class Nothing(Extractor):
        def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
            raise NotImplementedError

    assert Nothing(ExtractorConfig("no model", batch_tokens=given), device).batches.budget == budget


def test_the_budget_learned_is_kept(examples: Callable[..., list[TokenizedExample]]) -> None:
    class Small(Given):
        def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
            if len(examples) > 1:
                raise torch.OutOfMemoryError("out of memory")
            return {"feature": torch.ones(1, 2)}

    extractor = Small({})
    assert extractor(examples(2, 2, 2, 2)).reasons == [None] * 4
    assert extractor(examples(2, 2, 2, 2)).padded_tokens == 8
