from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.selection.kernels import Kernel, unit_rows
from raydpp.selection.oracles import Oracle, Textbook


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.5), Kernel("cosine"), Kernel("cosine", ridge=0.0)])
def test_residuals_are_the_schur_complements_diagonal(kernel: Kernel) -> None:
    x = unit_rows(sphere(30, 12))
    oracle: Oracle = Textbook(x, kernel, 8)
    matrix = kernel.matrix(x).numpy()
    picks: list[int] = []
    for index in (7, 0, 29, 13, 14, 3, 21, 8):  # any order, not the greedy one
        oracle.add(index)
        picks.append(index)
        inside = matrix[np.ix_(picks, picks)]
        schur = matrix - matrix[:, picks] @ np.linalg.solve(inside, matrix[picks])
        np.testing.assert_allclose(oracle.residuals.numpy(), np.diag(schur), atol=1e-12)
        assert (oracle.residuals[picks] == 0).all()


def test_without_picks_residuals_are_the_diagonal() -> None:
    oracle = Textbook(unit_rows(sphere(4, 3)), Kernel("cosine"), 2)
    assert oracle.residuals.tolist() == [1.1] * 4


def test_a_pick_determines_its_copies() -> None:
    x = sphere(6, 3)
    x[4] = x[1]
    oracle = Textbook(unit_rows(x), Kernel("rbf"), 3)
    oracle.add(1)
    assert oracle.residuals[4] <= Kernel("rbf").floor
    assert oracle.residuals[[0, 2, 3, 5]].min() > 0.01


def test_a_pick_at_the_floor_changes_only_its_own_residual() -> None:
    kernel = Kernel("cosine", ridge=0.0)
    x = sphere(6, 3)
    sideways = np.cross(x[1], x[0]) / np.linalg.norm(np.cross(x[1], x[0]))
    x[4] = np.sqrt(1 - kernel.floor / 2) * x[1] + np.sqrt(kernel.floor / 2) * sideways
    oracle = Textbook(unit_rows(x), kernel, 3)
    oracle.add(1)
    assert 0 < oracle.residuals[4] < kernel.floor
    before = oracle.residuals.clone()
    oracle.add(4)
    before[4] = 0.0
    assert torch.equal(oracle.residuals, before)
