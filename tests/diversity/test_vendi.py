from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from raydpp.diversity.vendi import Spectrum, vendi_score
from tests.test_tables import directions

ORDERS = (0.5, 1.0, 2.0, 3.0, math.inf)


def spectrum(rows: np.ndarray, block: int) -> np.ndarray:
    found = Spectrum()
    for some in torch.from_numpy(rows).float().split(block):
        found.add(some)
    return found.eigenvalues


def expected(rows: np.ndarray, order: float) -> float:
    """From the whole kernel, (n, n)."""
    shares = np.linalg.eigvalsh(rows @ rows.T / len(rows)).clip(1e-300)
    if order == 1:
        return math.exp(-float(np.sum(shares * np.log(shares))))
    if order == math.inf:
        return 1 / float(shares.max())
    return math.exp(math.log(float(np.sum(shares**order))) / (1 - order))


@pytest.mark.parametrize(("rows", "dimension"), [(1, 8), (20, 64), (64, 64), (65, 64), (300, 24)])
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_the_score_is_that_of_the_whole_kernel_on_both_sides_of_the_dual(rows: int, dimension: int, block: int) -> None:
    points = directions(rows, dimension)
    values = spectrum(points, block)
    assert values.shape == (min(rows, dimension),)
    assert values.sum() == pytest.approx(1)
    assert values.min() >= 0
    for order in ORDERS:
        assert vendi_score(values, order) == pytest.approx(expected(points, order), rel=1e-4 if order >= 1 else 1e-2)


def test_copies_of_orthogonal_rows_count_once() -> None:
    for copies in (1, 5, 40):
        values = spectrum(np.repeat(np.eye(6, 32), copies, axis=0), 13)
        assert [vendi_score(values, order) for order in ORDERS] == pytest.approx([6.0] * 5)
    uneven = spectrum(np.repeat(np.eye(3, 4), [6, 3, 1], axis=0), 4)
    assert vendi_score(uneven, math.inf) == pytest.approx(10 / 6)
    assert vendi_score(uneven, 2.0) == pytest.approx(100 / (36 + 9 + 1))
    scores = [vendi_score(uneven, order) for order in ORDERS]
    assert scores == sorted(scores, reverse=True)


def test_the_package_of_the_authors_agrees() -> None:
    vendi = pytest.importorskip("vendi_score.vendi", exc_type=ImportError)
    points = directions(50, 20)
    values = spectrum(points, 8)
    for order in (1.0, 2.0, 3.0):
        assert vendi_score(values, order) == pytest.approx(vendi.score_dual(points, order), rel=1e-5)
    assert vendi_score(values, math.inf) == pytest.approx(vendi.score_dual(points, "inf"), rel=1e-5)
