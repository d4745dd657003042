"""Conditional variances in a given order: a Cholesky factorisation without pivoting that goes on past copies."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel


def pivot_residuals(features: Tensor, kernel: Kernel, block: int = 128) -> Tensor:
    """The residual of each row given the rows before it: (m, D) float64 unit rows -> (m,), each at least the floor.

    These are the squared pivots of a blocked Cholesky factorisation without pivoting that, unlike the library's, goes
    on past a singular minor: a row at or below the kernel's floor adds no direction, its residual counts as the floor,
    and it is left out of the factor. Costs O(m^2 (D + m)) in matrix products; memory (m, m).
    """
    schur = kernel.matrix(features)  # (m, m): rows and columns from `stop` on are given the rows before
    gains = torch.full_like(schur[0], kernel.floor)  # (m,)
    for start in range(0, len(features), block):
        stop = start + block
        corner = schur[start:stop, start:stop]  # (b, b)
        factor = torch.zeros_like(corner)  # (b, k): a column for each row kept
        keep: list[int] = []
        for j in range(len(corner)):
            pivot = float(corner[j, j])
            if pivot > kernel.floor:
                gains[start + j] = pivot
                column = corner[j:, j] / pivot**0.5
                corner[j:, j:].addr_(column, column, alpha=-1.0)
                factor[j:, len(keep)] = column
                keep.append(j)
        panel = torch.linalg.solve_triangular(
            factor[keep, : len(keep)], schur[start:stop, stop:][keep], upper=False
        )  # (k, m - stop)
        schur[stop:, stop:].addmm_(panel.T, panel, alpha=-1.0)
    return gains


def log_det_error(matrix: Tensor, errors: Tensor) -> float | None:
    """How far the log det of a kernel matrix is off where its entries are: root mean square, in nats.

    (m, m) float64, and the errors of its entries, (m, m), taken as independent pair by pair, with a diagonal of zeros.
    To second order log det moves by ``tr(P dK) - tr(P dK P dK) / 2``, where P is the inverse: the first term is 0 in
    expectation, the second never above. None for a singular matrix.
    """
    factor, failed = torch.linalg.cholesky_ex(matrix)
    if failed:
        return None
    inverse = torch.cholesky_inverse(factor)  # P: (m, m)
    squares, crossed = errors.square(), inverse.square()
    diagonal = inverse.diagonal()
    variance = 2.0 * float((crossed * squares).sum())
    bias = 0.5 * float(((crossed + torch.outer(diagonal, diagonal)) * squares).sum())
    return (variance + bias**2) ** 0.5


def ordered_log_gains(
    rows: UnitRows, picks: Sequence[int], kernel: Kernel, owned: Sequence[int] | np.ndarray = ()
) -> list[float]:
    """The log residual of each pick given what is owned and the picks before it: (m,) in nats."""
    index = torch.tensor([*owned, *picks], dtype=torch.int64, device=rows.device)
    return pivot_residuals(rows.take(index), kernel)[len(owned) :].log().tolist()
