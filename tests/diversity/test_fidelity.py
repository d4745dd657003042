from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raydpp.diversity.fidelity import Fidelity, cosines_of_halves, fidelity
from raydpp.gradients.projection import Projection
from tests.test_tables import directions


def projected(dimension: int, rows: int, seed: int, n: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of one layer that have a part in common, (n, 30 * 200), and their projections, (n, D)."""
    random = torch.Generator().manual_seed(seed)
    a = 2 + torch.randn(n, 3, 200, generator=random)
    g = torch.randn(n, 3, 30, generator=random) + 0.7 * torch.randn(1, 3, 30, generator=random)
    projection = Projection({"layer": (30, 200)}, dimension, rows, seed)
    total = torch.zeros(n, dimension)
    projection.add_layer(total, "layer", projection.reduce_inputs("layer", a), g)
    return (g.transpose(1, 2) @ a).flatten(1).numpy(), total.numpy()


def cosines(x: np.ndarray) -> np.ndarray:
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    return np.asarray((x @ x.T)[np.triu_indices(len(x), 1)])


@pytest.mark.parametrize(("dimension", "rows"), [(256, 64), (1024, 64), (512, 8)])
@pytest.mark.parametrize("whole", [False, True])
def test_the_halves_tell_how_far_cosines_are_off(dimension: int, rows: int, whole: bool) -> None:
    errors, told, spreads = [], [], []
    for seed in range(12):
        exact, found = projected(dimension, rows, seed)
        if whole:
            found = np.rint(found * 2 / found.std(axis=1, keepdims=True)).astype(np.int8)
        one = fidelity(found)
        assert one is not None
        errors.append(np.mean((cosines(found) - cosines(exact)) ** 2))
        told.append(one.error**2)
        spreads.append(one.spread / cosines(exact).std())
    assert math.sqrt(np.mean(told)) == pytest.approx(math.sqrt(np.mean(errors)), rel=0.2)
    assert np.mean(spreads) == pytest.approx(1, abs=0.1)


def test_halves_have_cosines_of_their_own_whatever_the_rows_norms() -> None:
    x = directions(40, 64)
    for features in (x, 3 * x, np.rint(100 * x).astype(np.int8)):
        for half, found in zip((features[:, :32], features[:, 32:]), cosines_of_halves(features), strict=True):
            unit = half / np.linalg.norm(half.astype(float), axis=1, keepdims=True)
            np.testing.assert_allclose(found, unit @ unit.T, atol=1e-5)


def test_noise_alone_has_no_spread_and_few_rows_tell_nothing() -> None:
    found = fidelity(directions(200, 128))
    assert found is not None
    assert found.error == pytest.approx(128**-0.5, rel=0.1)
    assert found.spread < found.error / 2
    assert found.poor
    assert fidelity(directions(2, 128)) is None
    empty = np.eye(4, 8)  # halves of zeros, as short rows of whole numbers may have
    assert fidelity(empty) == Fidelity(0.0, 0.0)


@pytest.mark.parametrize(
    ("error", "spread", "poor", "wanted"),
    [(0.01, 0.06, False, 4096), (0.02, 0.06, False, 16384), (0.04, 0.06, True, 65536), (0.01, 0.0, True, 2**25)],
)
def test_what_would_be_enough_follows_from_the_error(error: float, spread: float, poor: bool, wanted: int) -> None:
    found = Fidelity(error, spread)
    assert found.poor == poor
    assert found.dimension_for(8192) == wanted
