from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.dpp.features import unit_rows
from raydpp.dpp.kernels import Kernel, KernelName
from raydpp.errors import UserError


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def test_the_ridge_defaults_by_kernel() -> None:
    assert Kernel("rbf").ridge == 0.0
    assert Kernel("cosine").ridge == 0.1
    assert Kernel("cosine", ridge=0.0).ridge == 0.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "linear"}, "no kernel 'linear'"),
        ({"gamma": 0.0}, "gamma is 0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"ridge": -0.1}, "ridge is -0.1"),
        ({"ridge": float("inf")}, "ridge is inf"),
    ],
)
def test_parameters_out_of_range_are_refused(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Kernel(**arguments)


@pytest.mark.parametrize("gamma", [0.3, 1.0, 20.0])
def test_rbf_is_the_gaussian_of_the_distance(gamma: float) -> None:
    x = sphere(12, 5)
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    np.testing.assert_allclose(
        Kernel("rbf", gamma).matrix(torch.from_numpy(x)).numpy(), np.exp(-gamma * squared), rtol=1e-12
    )


def test_cosine_is_the_inner_product_and_the_ridge_is_on_the_diagonal_alone() -> None:
    x = sphere(12, 5)
    matrix = Kernel("cosine", ridge=0.25).matrix(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(matrix, x @ x.T + 0.25 * np.eye(12), atol=1e-14)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 3.0), Kernel("rbf", ridge=0.5), Kernel("cosine")])
def test_column_variance_and_cross_are_parts_of_the_matrix(kernel: Kernel) -> None:
    x = torch.from_numpy(sphere(9, 4))
    matrix = kernel.matrix(x)
    torch.testing.assert_close(kernel.column(x, 6), matrix[:, 6], rtol=0, atol=1e-14)
    assert (matrix.diagonal() == kernel.variance).all()
    torch.testing.assert_close(kernel.cross(x[:4], x[4:]), matrix[:4, 4:], rtol=0, atol=1e-14)


@pytest.mark.parametrize("name", ["rbf", "cosine"])
def test_equal_rows_are_exactly_1_apart_from_the_ridge(name: KernelName) -> None:
    row = unit_rows(sphere(1, 777).astype(np.float16))  # its inner product with itself is not 1 in floating point
    kernel = Kernel(name, gamma=50.0, ridge=0.5)
    matrix = kernel.matrix(row.repeat(37, 1))
    assert torch.equal(matrix, torch.ones(37, 37, dtype=torch.float64) + 0.5 * torch.eye(37))
    assert torch.equal(kernel.column(row.repeat(37, 1), 3), matrix[3])


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.7), Kernel("cosine")], ids=["rbf", "cosine"])
def test_the_slope_is_the_change_of_similarity_with_the_cosine(kernel: Kernel) -> None:
    cosines = torch.linspace(-0.9, 0.9, 7, dtype=torch.float64)

    def similarity(cosine: torch.Tensor) -> torch.Tensor:
        points = torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)
        return kernel.cross(points, torch.tensor([[1.0, 0.0]], dtype=torch.float64))[:, 0]

    changed = (similarity(cosines + 1e-5) - similarity(cosines - 1e-5)) / 2e-5
    torch.testing.assert_close(kernel.slope(cosines), changed, rtol=1e-6, atol=0)


def test_only_cosine_without_ridge_limits_the_budget() -> None:
    Kernel("cosine", ridge=0.0).check_budget(8, 8)
    Kernel("cosine").check_budget(9, 8)
    Kernel("rbf").check_budget(9, 8)
    with pytest.raises(UserError, match=r"rank at most 8.*9 items.*set a ridge.*or lower the size"):
        Kernel("cosine", ridge=0.0).check_budget(9, 8)
