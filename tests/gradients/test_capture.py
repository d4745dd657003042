from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from raydpp.gradients.adapters import TargetLayer
from raydpp.gradients.capture import GradientCapture
from raydpp.gradients.config import Adapter, ExtractorConfig
from raydpp.gradients.projection import Projection
from raydpp.gradients.representations import load_extractor
from raydpp.gradients.tokenization import TokenizedExample
from tests.gradients.dense_reference import RademacherProjection

ARCHITECTURES = ["llama", "gpt_neox", "qwen2", "gpt2"]
DIMENSION, RANK, SEED = 48, 4, 3
Build = Callable[..., Any]

architectures = pytest.mark.parametrize("architecture", ARCHITECTURES)
Kind = type[Projection] | type[RademacherProjection]


@pytest.fixture(params=[Projection, RademacherProjection])
def projection(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Kind:
    """What the extractor projects with: the product's projection, then the dense reference in its place."""
    monkeypatch.setattr("raydpp.gradients.representations.Projection", request.param)
    kind: Kind = request.param
    return kind


def project(projection: Projection | RademacherProjection, gradients: Mapping[str, Tensor]) -> Tensor:
    """The (D,) projection of gradients that are there in full."""
    total = torch.zeros(1, projection.dimension, dtype=torch.float64)
    for name, gradient in gradients.items():
        eye = torch.eye(gradient.shape[1], dtype=torch.float64)[None]  # sum_s (column s of G) e_s^T = G
        projection.add_layer(total, name, projection.reduce_inputs(name, eye), gradient.T[None])
    return total[0]


def assert_captured(
    folder: str,
    adapter: Adapter,
    projection: Kind,
    given: list[TokenizedExample],
    gradients_alone: Callable[[TokenizedExample], Mapping[str, Tensor]],
) -> None:
    """Every feature is the projection of the gradients that autograd gives for its example alone."""
    config = ExtractorConfig(folder, "gradient", adapter, DIMENSION, RANK, SEED, dtype="float64", batch_tokens=40)
    extractor: Any = load_extractor(config)
    found = extractor(given)
    # transformers computes norms and rotations in float32, whatever the model's type; GPT-2 has neither.
    tolerance = 1e-9 if extractor.model.config.model_type == "gpt2" else 1e-6
    for row, example in enumerate(given):
        gradients = gradients_alone(example)
        shapes = {name: (gradient.shape[0], gradient.shape[1]) for name, gradient in gradients.items()}
        expected = project(projection(shapes, DIMENSION, RANK, SEED), gradients).numpy()
        error = np.linalg.norm(found.features[row] * found.norms[row] - expected)
        assert error <= tolerance * np.linalg.norm(expected)


def test_a_fresh_adapters_gradient_is_that_of_b_where_a_is_the_map_of_the_inputs(
    model_folder: Build, load: Build, examples: Build, loss_alone: Build
) -> None:
    from peft import LoraConfig, get_peft_model

    folder, rank = model_folder("llama"), RANK
    config = ExtractorConfig(folder, dimension=DIMENSION, rank=rank, projection_seed=SEED, dtype="float64")
    extractor: Any = load_extractor(config)
    projection = Projection({layer.name: layer.shape for layer in extractor.target_layers}, DIMENSION, rank, SEED)
    reference = get_peft_model(load(folder), LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear"))
    a, b = {}, {}
    for name, module in reference.named_modules():
        if hasattr(module, "lora_A"):
            plain = name.removeprefix("base_model.model.")
            a[plain], b[plain] = module.lora_A.default.weight, module.lora_B.default.weight
            eye = torch.eye(a[plain].shape[1], dtype=torch.float64)[None]
            a[plain].data.copy_(projection.reduce_inputs(plain, eye)[0].T)
    assert a.keys() == {layer.name for layer in extractor.target_layers}
    for example in examples(5, 20):
        assert not any(
            gradient.any() for gradient in torch.autograd.grad(loss_alone(reference, example), [*a.values()])
        )
        total = torch.zeros(1, DIMENSION, dtype=torch.float64)
        gradients = torch.autograd.grad(loss_alone(reference, example), [*b.values()])  # (outputs, r) each
        for name, gradient in zip(b, gradients, strict=True):
            projection.add_layer(total, name, torch.eye(rank, dtype=torch.float64)[None], gradient.T[None])
        found = extractor([example])
        expected = total[0].numpy()
        assert np.linalg.norm(found.features[0] * found.norms[0] - expected) <= 1e-6 * np.linalg.norm(expected)


@architectures
def test_a_trained_adapters_gradient_is_that_of_both_a_and_b(
    architecture: str,
    projection: Kind,
    model_folder: Build,
    load: Build,
    saved_adapter: Build,
    examples: Build,
    loss_alone: Build,
) -> None:
    from peft import PeftModel

    folder = model_folder(architecture)
    adapter = saved_adapter(folder)
    reference = PeftModel.from_pretrained(load(folder), adapter, is_trainable=True).eval()
    weights = {
        name.removeprefix("base_model.model.").removesuffix(".default.weight"): parameter
        for name, parameter in reference.named_parameters()
        if parameter.requires_grad
    }
    assert {name[-7:] for name in weights} == {".lora_A", ".lora_B"}

    def gradients_alone(example: TokenizedExample) -> Mapping[str, Tensor]:
        gradients = torch.autograd.grad(loss_alone(reference, example), list(weights.values()))
        assert all(gradient.any() for gradient in gradients)
        return dict(zip(weights, gradients, strict=True))

    assert_captured(folder, Adapter(adapter), projection, examples(5, 13, 7, 20), gradients_alone)


@pytest.mark.parametrize(("layers", "part"), [("all", ""), ("last:1", ".1."), (r"\.0\.mlp", ".0.mlp.")])
@architectures
def test_a_fresh_adapters_gradient_is_that_of_the_weights_of_every_linear_layer_but_the_head(
    architecture: str,
    layers: str,
    part: str,
    projection: Kind,
    model_folder: Build,
    load: Build,
    examples: Build,
    loss_alone: Build,
) -> None:
    from transformers.pytorch_utils import Conv1D

    folder = model_folder(architecture)
    reference = load(folder)
    linear = {
        name: module
        for name, module in reference.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and name not in ("lm_head", "embed_out") and part in name
    }
    assert len(linear) in {"": (14, 8), ".1.": (7, 4), ".0.mlp.": (3, 2)}[part]

    def gradients_alone(example: TokenizedExample) -> Mapping[str, Tensor]:
        weights = [module.weight for module in linear.values()]
        gradients = torch.autograd.grad(loss_alone(reference, example), weights)
        return {
            name: gradient.T if isinstance(module, Conv1D) else gradient
            for (name, module), gradient in zip(linear.items(), gradients, strict=True)
        }

    adapter = Adapter(layers=layers)
    assert_captured(folder, adapter, projection, examples(5, 13, 7, 20), gradients_alone)


@pytest.mark.parametrize("kind", ["fresh", "trained"])
def test_the_backward_pass_ends_at_the_first_captured_block(
    kind: str, model_folder: Build, saved_adapter: Build, examples: Build
) -> None:
    folder = model_folder("llama")
    adapter = Adapter(saved_adapter(folder) if kind == "trained" else kind, layers="last:1")
    extractor: Any = load_extractor(ExtractorConfig(folder, adapter=adapter, dimension=8))
    assert {layer.name.split(".")[2] for layer in extractor.target_layers} == {"1"}
    differentiated: dict[str, bool] = {}
    for name, module in extractor.model.named_modules():
        if name.endswith(("layers.0", "layers.1")):
            module.register_forward_hook(
                lambda _module, _inputs, output, name=name: differentiated.update({name[-1]: output.requires_grad})
            )
    assert extractor(examples(9)).reasons == [None]
    assert differentiated == {"0": False, "1": True}


@pytest.fixture
def layers() -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    return {name: nn.Linear(*shape, bias=False).double() for name, shape in {"first": (5, 6), "second": (6, 4)}.items()}


@pytest.fixture
def capture(layers: dict[str, nn.Linear]) -> GradientCapture:
    targets = [TargetLayer(name, layer, (layer.out_features, layer.in_features)) for name, layer in layers.items()]
    projection = Projection({"first": (6, 5), "second": (4, 6)}, 50, 4)
    return GradientCapture(targets, projection, torch.float64)


def test_hooks_and_gradients_are_gone_with_the_context(layers: dict[str, nn.Linear], capture: GradientCapture) -> None:
    model = nn.Sequential(layers["first"], nn.Tanh(), layers["second"]).requires_grad_(False)
    inputs = torch.randn(3, 7, 5, dtype=torch.float64)
    with suppress(KeyError), capture(3):
        model(inputs).sum().backward()
        raise KeyError
    with pytest.raises(RuntimeError, match="no backward pass"):
        capture.projected()
    assert not any(layer._forward_hooks for layer in layers.values())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model(inputs).requires_grad


def test_backward_passes_add_up_until_they_are_asked_for_and_passes_without_gradients_are_unnoticed(
    layers: dict[str, nn.Linear], capture: GradientCapture
) -> None:
    model = nn.Sequential(layers["first"], nn.Tanh(), layers["second"]).requires_grad_(False)
    inputs = torch.randn(3, 7, 5, dtype=torch.float64)
    with capture(3):
        model(inputs).square().sum().backward()
        once = capture.projected()
        for _ in range(2):
            model(inputs).square().sum().backward()
            with torch.no_grad():
                assert not model(inputs[:2]).requires_grad
        twice = capture.projected()
    torch.testing.assert_close(twice, 2 * once)
    assert once.shape == (3, 50)
