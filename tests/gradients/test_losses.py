from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from raydpp.gradients.batches import pad
from raydpp.gradients.losses import ResponseLoss, _ChunkedCrossEntropy
from raydpp.gradients.tokenization import TokenizedExample

CHUNKED = ["llama", "gpt_neox", "qwen2", "gpt2", "phi"]
WHOLE = ["gemma2", "granite", "cohere"]
Build = Callable[..., Any]

every_architecture = pytest.mark.parametrize("architecture", CHUNKED + WHOLE)


@pytest.fixture
def given(examples: Build) -> list[TokenizedExample]:
    """Different lengths, an answer in two turns, and a single response token among them."""
    several, first, second = examples(12, 5, 9)
    turns = np.isin(np.arange(12), [3, 4, 8, 9, 10])
    return [TokenizedExample(several.ids, turns, False), first, TokenizedExample(second.ids, np.arange(9) == 8, False)]


def with_hidden_gradient(model: Any, losses: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
    """The (n,) losses, and the gradient of 1, 2, ... times them at the decoder's (n, s, H) output."""
    model.requires_grad_(False)
    states: list[Tensor] = []

    def start(_module: Any, _inputs: Any, output: Any) -> None:
        states.append(output.last_hidden_state.requires_grad_(True))

    handle = model.base_model.register_forward_hook(start)
    found = losses()
    handle.remove()
    (gradient,) = torch.autograd.grad((found * torch.arange(1, len(found) + 1)).sum(), states)
    return found, gradient


def plain(model: Any, ids: Tensor, response: Tensor) -> Tensor:
    logits = model(input_ids=ids).logits[:, :-1]
    target = torch.where(response[:, 1:], ids[:, 1:], -100)
    nats = torch.nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none")  # (n, s - 1)
    return nats.sum(1) / response[:, 1:].sum(1)


@pytest.mark.parametrize("rows", [1, 3, 8, None])
@every_architecture
def test_the_loss_and_its_gradient_are_those_of_the_models_own_logits(
    architecture: str,
    rows: int | None,
    model_folder: Build,
    load: Build,
    given: list[TokenizedExample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if rows is not None:
        monkeypatch.setattr("raydpp.gradients.losses._CHUNK_BYTES", rows * 4 * 64)
    model = load(model_folder(architecture))
    ids, response = pad(given, torch.device("cpu"))
    loss = ResponseLoss(model)
    found, found_gradient = with_hidden_gradient(model, lambda: loss(ids, response)[0])
    expected, gradient = with_hidden_gradient(model, lambda: plain(model, ids, response))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(found_gradient, gradient, rtol=1e-9, atol=1e-12)
    assert found.std() > 1e-3


@every_architecture
def test_a_model_that_does_more_to_its_logits_than_its_head_is_called_as_it_is(
    architecture: str, model_folder: Build, load: Build
) -> None:
    assert (ResponseLoss(load(model_folder(architecture))).parts is not None) == (architecture in CHUNKED)


@every_architecture
def test_what_the_losses_were_predicted_from_comes_with_them(
    architecture: str, model_folder: Build, load: Build, given: list[TokenizedExample]
) -> None:
    model = load(model_folder(architecture))
    ids, response = pad(given, torch.device("cpu"))
    with torch.no_grad():
        loss, hidden = ResponseLoss(model)(ids, response)
        states = model(input_ids=ids, output_hidden_states=True).hidden_states[-1]
        torch.testing.assert_close(loss, plain(model, ids, response), rtol=1e-9, atol=0)
    assert not loss.requires_grad
    if architecture in WHOLE:
        assert hidden is None
    else:
        torch.testing.assert_close(hidden, states, rtol=1e-9, atol=1e-12)


class AllLogits(torch.nn.Module):
    """A model that gives the logits of all positions, whatever it is asked for."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, logits_to_keep: Any = None, use_cache: bool = False) -> Any:
        return self.model(input_ids=input_ids, use_cache=use_cache)


def test_a_model_that_gives_more_logits_than_asked_for_has_the_same_losses(
    model_folder: Build, load: Build, given: list[TokenizedExample]
) -> None:
    model = load(model_folder("llama"))
    ids, response = pad(given, torch.device("cpu"))
    assert not response[:, 1:].any(0).all()  # some positions are not asked for
    with torch.no_grad():
        loss, hidden = ResponseLoss(AllLogits(model))(ids, response)
        torch.testing.assert_close(loss, plain(model, ids, response), rtol=1e-9, atol=0)
    assert hidden is None


class ScaledHead(torch.nn.Linear):
    """A head that does more than its weight, though model and parts agree."""

    def forward(self, hidden: Tensor) -> Tensor:
        return 3 * super().forward(hidden)


def test_a_head_that_does_more_than_its_weight_is_called(
    model_folder: Build, load: Build, given: list[TokenizedExample]
) -> None:
    model = load(model_folder("llama"))
    head = ScaledHead(model.lm_head.in_features, model.lm_head.out_features, bias=False, dtype=torch.float64)
    head.weight = model.lm_head.weight
    model.lm_head = head
    ids, response = pad(given, torch.device("cpu"))
    with torch.no_grad():
        loss, _ = ResponseLoss(model)(ids, response)
        torch.testing.assert_close(loss, plain(model, ids, response), rtol=1e-9, atol=0)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "lm_head"]])
def test_an_adapter_counts_on_the_head_too(
    targets: list[str], model_folder: Build, load: Build, saved_adapter: Build, given: list[TokenizedExample]
) -> None:
    from peft import PeftModel

    folder = model_folder("llama")
    base = load(folder)
    ids, response = pad(given, torch.device("cpu"))
    without = plain(base, ids, response)
    model = PeftModel.from_pretrained(base, saved_adapter(folder, target_modules=targets)).eval()
    loss = ResponseLoss(model)
    assert (loss.parts is not None) == ("lm_head" not in targets)
    found, _ = loss(ids, response)
    torch.testing.assert_close(found, plain(model, ids, response), rtol=1e-9, atol=0)
    assert (found - without).abs().min() > 1e-6


@pytest.mark.parametrize("architecture", ["llama", "granite"])
def test_the_sum_is_in_float32_whatever_the_models_precision(
    architecture: str, model_folder: Build, load: Build, given: list[TokenizedExample]
) -> None:
    exact = load(model_folder(architecture))
    rounded = load(model_folder(architecture), torch.bfloat16)
    ids, response = pad(given, torch.device("cpu"))
    loss = ResponseLoss(rounded)
    found, gradient = with_hidden_gradient(rounded, lambda: loss(ids, response)[0])
    expected, expected_gradient = with_hidden_gradient(exact, lambda: plain(exact, ids, response))
    assert found.dtype == torch.float32
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=0.02, atol=0)
    assert (gradient - expected_gradient).norm() < 0.03 * expected_gradient.norm()


def test_the_gradient_of_few_tokens_is_as_exact_as_that_of_many() -> None:
    torch.manual_seed(0)
    head, hidden, target = torch.randn(50_000, 64), 0.2 * torch.randn(24, 64), torch.randint(50_000, (24,))

    def gradient(size: int, dtype: torch.dtype) -> Tensor:
        parts = [part.to(dtype).requires_grad_(True) for part in hidden.split(size)]
        for part, wanted in zip(parts, target.split(size), strict=True):
            nats: Any = _ChunkedCrossEntropy.apply(part, head.to(dtype), None, wanted)
            nats.sum().backward()
        return torch.cat([part.grad for part in parts if part.grad is not None]).double()

    exact = gradient(24, torch.float64)
    errors = {size: (gradient(size, torch.float32) - exact).norm() for size in (1, 3, 24)}
    assert max(errors.values()) < 2 * errors[24] < 1e-5 * exact.norm()


def test_losses_count_response_tokens_only(model_folder: Build, load: Build, examples: Build) -> None:
    (one,) = examples(12)
    later = TokenizedExample(one.ids, np.arange(12) >= 9, False)
    swapped = TokenizedExample(np.where(np.arange(12) == 11, 5 + one.ids[11] % 3, one.ids), later.response, False)
    asked = TokenizedExample(one.ids, np.arange(12) == 9, False)
    asked_swapped = TokenizedExample(swapped.ids, asked.response, False)
    with torch.no_grad():
        loss, _ = ResponseLoss(load(model_folder("llama")))(
            *pad([one, later, swapped, asked, asked_swapped], torch.device("cpu"))
        )
    assert len(set(loss[:4].tolist())) == 4
    assert loss[3] == loss[4]  # the changed token is not asked for
