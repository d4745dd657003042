from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raydpp.extraction.rademacher import _BLOCK, RademacherProjection


def project(gradient: torch.Tensor, dimension: int, seed: int = 0, name: str = "layer") -> torch.Tensor:
    """The (D,) projection of one (outputs, inputs) gradient."""
    outputs, inputs = gradient.shape
    projection = RademacherProjection({name: (outputs, inputs)}, dimension, seed)
    total = torch.zeros(1, dimension, dtype=torch.float64)
    eye = torch.eye(inputs, dtype=torch.float64)[None]
    projection.add_layer(total, name, projection.reduce_inputs(name, eye), gradient.T[None].double())
    return total[0]


def test_every_entry_meets_signs_of_its_own() -> None:
    outputs, inputs, dimension = 5, 4, 512
    rows = []
    for entry in range(outputs * inputs):
        one = torch.zeros(outputs * inputs)
        one[entry] = 1
        rows.append(project(one.reshape(outputs, inputs), dimension))
    signs = torch.stack(rows) * math.sqrt(dimension)  # (entries, D)
    torch.testing.assert_close(signs.abs(), torch.ones_like(signs))
    gram = signs @ signs.T / dimension - torch.eye(len(signs), dtype=torch.float64)
    assert gram.abs().max() < 5 / math.sqrt(dimension)
    assert abs(signs.mean()) < 4 / math.sqrt(signs.numel())
    whole = torch.randn(outputs, inputs, dtype=torch.float64)
    torch.testing.assert_close(project(whole, dimension), whole.flatten() @ signs / math.sqrt(dimension))


def test_the_variance_of_an_inner_product_is_that_of_theory() -> None:
    torch.manual_seed(0)
    g, h = torch.randn(2, 12, 8, dtype=torch.float64)
    products = np.array([float(project(g, 32, seed) @ project(h, 32, seed)) for seed in range(2000)])
    squares, product = float((g * g * h * h).sum()), float((g * h).sum())
    theory = (float(g.square().sum() * h.square().sum()) + product**2 - 2 * squares) / 32
    assert products.mean() == pytest.approx(product, abs=4 * math.sqrt(theory / 2000))
    assert products.var() == pytest.approx(theory, rel=0.2)


@pytest.mark.parametrize("entries", [_BLOCK - 1, _BLOCK, 2 * _BLOCK + 3])
def test_layers_larger_than_a_block_are_projected_whole(entries: int) -> None:
    gradient = torch.ones(entries, 1)
    one, two = gradient.clone(), gradient.clone()
    one[entries // 2 :] = 0
    two[: entries // 2] = 0
    whole = project(gradient, 64)
    torch.testing.assert_close(project(one, 64) + project(two, 64), whole)
    assert float(whole.square().sum()) == pytest.approx(entries, rel=4 * math.sqrt(2 / 64))
    last = torch.zeros(entries, 1)
    last[-1] = 1
    assert float(project(last, 64).norm()) == pytest.approx(1)


def test_blocks_have_different_signs() -> None:
    first, second = torch.zeros(2, 2 * _BLOCK, 1)
    first[0], second[_BLOCK] = 1, 1
    assert abs(float(project(first, 1024) @ project(second, 1024))) < 4 / math.sqrt(1024)


def test_the_signs_are_those_of_every_machine() -> None:
    one = torch.zeros(6, 5)
    one[1, 2] = 1
    assert (project(one, 16) * 4).round().int().tolist() == [-1, -1, -1, 1, 1, -1, 1, 1, -1, 1, -1, 1, -1, 1, 1, -1]
