from __future__ import annotations

import numpy as np
import torch

from raydpp.gradients.projection import Projection, derived_generator

SHAPES = {"wide": (40, 300), "narrow": (500, 8), "small": (6, 5)}


def draw(seed: int, n: int = 2, s: int = 7) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (
            torch.randn(n, s, inputs, generator=generator, dtype=torch.float64),
            torch.randn(n, s, outputs, generator=generator, dtype=torch.float64),
        )
        for name, (outputs, inputs) in SHAPES.items()
    }


def project(data: dict[str, tuple[torch.Tensor, torch.Tensor]], dimension: int, seed: int) -> torch.Tensor:
    projection = Projection(SHAPES, dimension, seed)
    total = torch.zeros(2, dimension, dtype=torch.float64)
    for name, (a, g) in data.items():
        projection.add_layer(total, name, a, g)
    return total


def full(data: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([(g.transpose(1, 2) @ a).flatten(1) for a, g in data.values()], dim=1)


def test_inner_products_are_preserved_in_expectation_and_the_error_falls_as_one_over_d() -> None:
    data = draw(0)
    data = {name: (a[[0, 0]] + 0.5 * a, g[[0, 0]] + 0.5 * g) for name, (a, g) in data.items()}  # correlated examples
    exact = full(data)
    truth = float(exact[0] @ exact[1] / (exact[0].norm() * exact[1].norm()))
    scale = float(exact[0].norm() * exact[1].norm())
    errors = {}
    for dimension in (64, 256):
        products = np.array([float(p[0] @ p[1]) for p in (project(data, dimension, seed) for seed in range(150))])
        errors[dimension] = products / scale - truth
        assert abs(errors[dimension].mean()) < 4 * errors[dimension].std() / np.sqrt(150)
    assert 2 < errors[64].var() / errors[256].var() < 8  # 4 in theory


def test_the_scale_does_not_depend_on_the_layers_shape() -> None:
    for name, (outputs, inputs) in SHAPES.items():
        a, g = torch.ones(1, 1, inputs) / inputs**0.5, torch.ones(1, 1, outputs) / outputs**0.5  # gradient of norm 1
        squares = []
        for seed in range(200):
            total = torch.zeros(1, 128)
            Projection({name: (outputs, inputs)}, 128, seed).add_layer(total, name, a, g)
            squares.append(float(total.square().sum()))
        assert abs(np.mean(squares) - 1) < 4 * np.std(squares) / np.sqrt(200) + 1e-6


def test_the_same_seed_gives_the_same_numbers_whatever_the_other_layers_are() -> None:
    first = derived_generator(3, "layer", "left").integers(0, 2**32, 4).tolist()
    assert first == derived_generator(3, "layer", "left").integers(0, 2**32, 4).tolist()
    for other in ((4, "layer", "left"), (3, "layer2", "left"), (3, "layer", "right")):
        assert first != derived_generator(*other).integers(0, 2**32, 4).tolist()
    data = draw(1)
    assert torch.equal(project(data, 32, 5), project(data, 32, 5))
    assert not torch.allclose(project(data, 32, 5), project(data, 32, 6))
