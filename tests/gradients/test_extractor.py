from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.corpus.tokenization import TokenizedExample
from raydpp.gradients.extractor import ExtractorConfig, GradientExtractor, pad, response_losses, token_batches
from raydpp.gradients.model import lora_layers


def example(seed: int, length: int) -> TokenizedExample:
    ids = np.random.default_rng(seed).integers(3, 60, length).astype(np.int32)
    response = np.arange(length) >= length // 2
    return TokenizedExample(ids, response, False)


@pytest.fixture(scope="module")
def extractor(tiny_model: str) -> GradientExtractor:
    return GradientExtractor(ExtractorConfig(tiny_model, dimension=64, batch_tokens=64))


def test_a_gradient_is_the_projection_of_what_autograd_gives_for_the_example_alone(
    extractor: GradientExtractor,
) -> None:
    given = [example(seed, 6 + 3 * seed) for seed in range(4)]
    found = extractor(given)
    layers = lora_layers(extractor._model)
    weights = [layer.weight.requires_grad_(True) for layer in layers.values()]
    try:
        for row, one in enumerate(given):
            ids = torch.from_numpy(one.ids.astype(np.int64))[None]
            logits = extractor._model(input_ids=ids).logits[0]
            targets = torch.where(torch.from_numpy(one.response[1:]), ids[0, 1:], -100)
            loss = torch.nn.functional.cross_entropy(logits[:-1], targets)
            total = torch.zeros(1, 64)
            for (name, layer), grad in zip(layers.items(), torch.autograd.grad(loss, weights), strict=True):
                eye = torch.eye(layer.in_features)[None]
                extractor._capture._projection.add_layer(total, name, eye, grad.T[None])
            assert found.losses[row] == pytest.approx(loss.item(), rel=1e-5)
            assert found.norms[row] == pytest.approx(total.norm().item(), rel=1e-4)
            np.testing.assert_allclose(found.gradients[row], (total / total.norm())[0].detach(), atol=2e-5)
    finally:
        for weight in weights:
            weight.requires_grad_(False)


def test_neighbours_padding_and_order_do_not_change_a_gradient(extractor: GradientExtractor) -> None:
    given = [example(seed, length) for seed, length in enumerate((4, 30, 9, 17, 60, 5))]
    together = extractor(given).gradients
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(extractor(given[::-1]).gradients[::-1], together, atol=1e-5)
    for row, one in enumerate(given):
        np.testing.assert_allclose(extractor([one]).gradients[0], together[row], atol=1e-5)


def test_a_gradient_that_is_not_finite_or_zero_is_given_with_a_reason(
    extractor: GradientExtractor, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = iter([torch.tensor([1.0, float("nan"), 0.0])])
    real = response_losses
    monkeypatch.setattr("raydpp.gradients.extractor.response_losses", lambda *given: real(*given) * next(factors))
    found = extractor([example(seed, 10) for seed in range(3)])
    assert found.reasons[0] is None
    assert "not finite" in str(found.reasons[1])
    assert "zero" in str(found.reasons[2])
    assert not found.gradients[1:].any()


def test_losses_count_response_tokens_only(extractor: GradientExtractor) -> None:
    one = example(0, 12)
    changed = TokenizedExample(one.ids, np.arange(12) >= 9, False)
    ids, response = pad([one, changed], torch.device("cpu"))
    with torch.no_grad():
        both = response_losses(extractor._model, ids, response)
    assert both[0] != both[1]


def test_batches_hold_every_example_once_within_the_budget() -> None:
    lengths = [5, 90, 7, 30, 5, 31, 200]
    batches = list(token_batches(lengths, 100))
    assert sorted(index for batch in batches for index in batch) == list(range(7))
    assert all(len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 100 for batch in batches)
    assert list(token_batches([], 100)) == []
