from __future__ import annotations

import numpy as np
import pytest

from raydpp.dpp import OracleName
from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.choice import bounded_oracle, choose_oracle, choose_sharded_oracle, make_oracle
from raydpp.dpp.oracles.factor import Factor
from raydpp.dpp.oracles.feature_space import Posterior
from raydpp.errors import UserError


@pytest.mark.parametrize(
    ("kernel", "rows", "size", "expected"),
    [
        (Kernel("rbf"), 200, 50, "textbook"),
        (Kernel("rbf"), 30_000, 1_000, "cholesky"),
        (Kernel("cosine"), 30_000, 1_000, "feature-space"),
        (Kernel("cosine"), 30_000, 20, "cholesky"),
        (Kernel("cosine", ridge=0.0), 30_000, 300, "cholesky"),
        (Kernel("cosine", ridge=1e-6), 30_000, 1_000, "cholesky"),
    ],
)
def test_the_oracle_goes_by_kernel_and_size(kernel: Kernel, rows: int, size: int, expected: str) -> None:
    assert choose_oracle("auto", kernel, rows, 384, size) == expected
    assert choose_oracle("textbook", kernel, rows, 384, size) == "textbook"


@pytest.mark.parametrize(
    ("rows", "dimension", "size", "expected"),
    [
        (16_000, 1024, 250, "cholesky"),
        (16_000, 1024, 2_000, "feature-space"),
        (16_000, 4096, 2_000, "cholesky"),
        (16_000, 8192, 2_000, "cholesky"),
        (1_000_000, 8192, 2_000, "cholesky"),
        (1_000_000, 8192, 10_000, "feature-space"),
        (1_000_000, 512, 10_000, "feature-space"),
    ],
)
def test_with_cosine_and_a_ridge_it_goes_by_the_cost(rows: int, dimension: int, size: int, expected: str) -> None:
    assert choose_oracle("auto", Kernel("cosine"), rows, dimension, size) == expected


@pytest.mark.parametrize("name", ["textbook", "cholesky", "feature-space"])
def test_each_can_be_made(name: OracleName) -> None:
    oracle = make_oracle(name, UnitRows(np.eye(5)), Kernel("cosine"), 3)
    assert (oracle.bounds == 1.1).all()


def test_what_cannot_run_is_refused() -> None:
    with pytest.raises(UserError, match="no oracle 'lazy': use one of auto, textbook"):
        choose_oracle("lazy", Kernel(), 10, 3, 2)  # type: ignore[arg-type]
    for kernel in (Kernel("rbf"), Kernel("cosine", ridge=0.0), Kernel("cosine", ridge=1e-5)):
        with pytest.raises(UserError, match="feature-space oracle needs kernel='cosine' with a ridge"):
            make_oracle("feature-space", UnitRows(np.eye(5)), kernel, 3)


def test_rounds_take_the_cholesky_oracle_where_one_machine_would_take_the_textbook_one() -> None:
    assert choose_oracle("auto", Kernel("rbf"), 200, 384, 50) == "textbook"
    assert choose_sharded_oracle("auto", Kernel("rbf"), 200, 384, 50) == "cholesky"
    assert choose_sharded_oracle("auto", Kernel("cosine"), 30_000, 384, 1_000) == "feature-space"
    assert choose_sharded_oracle("cholesky", Kernel("cosine"), 30_000, 384, 1_000) == "cholesky"
    with pytest.raises(UserError, match="no textbook oracle: use cholesky"):
        choose_sharded_oracle("textbook", Kernel(), 200, 384, 50)
    with pytest.raises(UserError, match="no oracle 'lazy'"):
        choose_sharded_oracle("lazy", Kernel(), 200, 384, 50)  # type: ignore[arg-type]


def test_what_solves_working_sets_goes_by_the_oracle() -> None:
    rows = UnitRows(np.eye(5))
    assert isinstance(bounded_oracle("cholesky").posterior_type(rows, Kernel("cosine"), 3), Factor)
    assert isinstance(bounded_oracle("feature-space").posterior_type(rows, Kernel("cosine"), 3), Posterior)
