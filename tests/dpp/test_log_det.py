from __future__ import annotations

import numpy as np
import pytest
import torch

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel, KernelName
from raydpp.dpp.log_det import log_det_error, ordered_log_gains, pivot_residuals


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
@pytest.mark.parametrize("block", [1, 7, 128])
def test_gains_are_ratios_of_determinants(kernel: KernelName, block: int) -> None:
    rows, similarity = UnitRows(sphere(30, 9)), Kernel(kernel)
    matrix = similarity.matrix(rows.take()).numpy()
    log_dets = [0.0, *(np.linalg.slogdet(matrix[:m, :m])[1] for m in range(1, 31))]
    np.testing.assert_allclose(
        pivot_residuals(rows.take(), similarity, block).log().numpy(), np.diff(log_dets), atol=1e-9
    )


def test_a_copy_counts_as_the_floor_and_changes_nothing_after_it() -> None:
    x, kernel = sphere(12, 9), Kernel()
    with_copies = np.concatenate([x[:5], x[:2], x[5:]])
    gains = pivot_residuals(UnitRows(with_copies).take(), kernel, block=3)
    assert (gains[5:7] == kernel.floor).all()
    expected = pivot_residuals(UnitRows(x).take(), kernel)
    torch.testing.assert_close(torch.cat([gains[:5], gains[7:]]), expected)


def test_errors_of_the_entries_make_the_error_of_log_det() -> None:
    random = np.random.default_rng(0)
    x = random.standard_normal((12, 40))
    matrix = np.exp(-np.square(x[:, None] - x[None]).sum(-1) / 60)
    for size in (0.002, 0.02):
        moved = []
        for _ in range(400):
            noise = np.triu(size * random.standard_normal((12, 12)), 1)
            moved.append(np.linalg.slogdet(matrix + noise + noise.T)[1] - np.linalg.slogdet(matrix)[1])
        errors = torch.full((12, 12), size, dtype=torch.float64).fill_diagonal_(0)
        told = log_det_error(torch.from_numpy(matrix), errors)
        assert told == pytest.approx(np.sqrt(np.mean(np.square(moved))), rel=0.1)
    assert log_det_error(torch.from_numpy(matrix), torch.zeros(12, 12, dtype=torch.float64)) == 0
    assert log_det_error(torch.ones(3, 3, dtype=torch.float64), errors[:3, :3]) is None


def test_picks_are_conditioned_on_what_is_owned() -> None:
    rows, kernel = UnitRows(sphere(12, 5)), Kernel("cosine")
    matrix = kernel.matrix(rows.take()).numpy()
    gains = ordered_log_gains(rows, [7, 1], kernel, owned=[3, 4])
    log_dets = [np.linalg.slogdet(matrix[np.ix_(s, s)])[1] for s in ([3, 4], [3, 4, 7], [3, 4, 7, 1])]
    np.testing.assert_allclose(gains, np.diff(log_dets), atol=1e-12)
