"""Every oracle gives the picks of the textbook one: what a search finds does not depend on how gains are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.selection.budget import Budget
from raydpp.selection.features import UnitRows
from raydpp.selection.kernels import Kernel
from raydpp.selection.objective import Objective
from raydpp.selection.oracles import cholesky_pool, factor, feature_space
from raydpp.selection.oracles.choice import make_oracle
from raydpp.selection.oracles.cholesky_pool import CholeskyPool
from raydpp.selection.oracles.feature_space import FeatureSpace
from raydpp.selection.oracles.textbook import Textbook
from raydpp.selection.search import Search

REAL = Path(__file__).parents[3] / "shared/features/minilm_32k.parquet"


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@contextmanager
def small() -> Iterator[None]:
    """Panels, pools and fronts so small that little data goes through all of their turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor, "WIDTH", 8)
        patch.setattr(cholesky_pool, "WIDTH", 8)
        patch.setattr(cholesky_pool, "TILE", 3)
        patch.setattr(feature_space, "_COPIED", 0.8)
        for oracle in (CholeskyPool, FeatureSpace):
            patch.setattr(oracle, "front_size", 5)
            patch.setattr(oracle, "enough", 2)
            patch.setattr(oracle, "lookahead", 3)
            patch.setattr(oracle, "scout_size", 9)
        yield


def found(oracle: Any, kernel: Kernel, size: int, **options: Any) -> tuple[list[int], list[float], str | None]:
    n = len(oracle.bounds)
    order = options.get("order", np.arange(n))
    objective = Objective(kernel, options.get("diversity", 1.0), options.get("offsets"))
    search = Search(oracle, objective, order)
    search.condition(options.get("owned", np.empty(0, dtype=np.int64)))
    stopped = search.run(Budget(size, exclude=options.get("owned")).ledger(n))
    return search.indices, search.log_gains, stopped


def everyone(rows: UnitRows, kernel: Kernel, size: int) -> dict[str, Any]:
    oracles: dict[str, Any] = {
        "float32": CholeskyPool(rows, kernel, size),
        "float64": CholeskyPool(rows, kernel, size, torch.float64),
    }
    if kernel.name == "cosine" and (kernel.ridge or 0) >= feature_space.MIN_RIDGE:
        oracles["feature space"] = FeatureSpace(rows, kernel)
    return oracles


def agree(x: np.ndarray, kernel: Kernel, size: int, **options: Any) -> None:
    rows, owned = UnitRows(x), options.get("owned", ())
    most = size + len(owned)
    expected = found(Textbook(rows, kernel, most), kernel, size, **options)
    for name, oracle in everyone(rows, kernel, most).items():
        picks, gains, stopped = found(oracle, kernel, size, **options)
        assert picks == expected[0], name
        residuals = np.exp(expected[1])
        rounding = 1e-6 + 1e-15 / np.minimum.accumulate(residuals) / residuals  # what small pivots make of 1e-16
        assert (np.abs(np.subtract(gains, expected[1])) <= rounding).all(), name
        assert (stopped is None) == (expected[2] is None), name


@st.composite
def problems(draw: st.DrawFn) -> tuple[np.ndarray, Kernel, int, dict[str, Any]]:
    """Features with copies, near copies and rows that tie; a kernel; a size; weights, an order, a set owned."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    dimension = draw(st.sampled_from([2, 3, 8, 24]))
    x = draw(st.sampled_from([sphere, _axes]))(draw(st.integers(2, 60)), dimension, seed)
    near = x[random.integers(0, len(x), draw(st.integers(0, 12)))]
    near = near + draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2])) * random.standard_normal(near.shape)
    x = np.concatenate([x, near / np.linalg.norm(near, axis=1, keepdims=True)])
    x = np.concatenate([x, x[random.integers(0, len(x), draw(st.integers(0, 12)))]])
    x = np.concatenate([x, np.repeat(x[:1], draw(st.sampled_from([0, 0, 20])), axis=0)])
    kernel = draw(
        st.sampled_from(
            [
                *(Kernel("rbf", gamma) for gamma in (0.05, 0.3, 1.0, 4.0, 20.0)),
                *(Kernel("rbf", 1.0, ridge) for ridge in (1e-3, 0.3)),
                *(Kernel("cosine", ridge=ridge) for ridge in (1e-3, 0.1, 1.0)),
            ]
        )
    )
    options: dict[str, Any] = {"order": random.permutation(len(x))}
    if draw(st.booleans()):
        options["diversity"] = draw(st.sampled_from([0.9, 0.5, 0.05]))
        options["offsets"] = (1 - options["diversity"]) * random.integers(0, 3, len(x)).astype(float)
    if draw(st.booleans()):
        options["owned"] = random.permutation(len(x))[: draw(st.integers(1, max(1, len(x) // 3)))]
    rest = len(x) - len(options.get("owned", ()))
    return x, kernel, draw(st.integers(1, rest)), options


def _axes(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Unit vectors of the axes: whole classes of rows tie at every pick."""
    return np.eye(dimension)[np.random.default_rng(seed).integers(0, dimension, rows)]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_every_oracle_makes_the_textbooks_picks(problem: tuple[np.ndarray, Kernel, int, dict[str, Any]]) -> None:
    x, kernel, size, options = problem
    agree(x, kernel, size, **options)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_so_do_those_that_see_little_at_a_time(problem: tuple[np.ndarray, Kernel, int, dict[str, Any]]) -> None:
    x, kernel, size, options = problem
    with small():
        agree(x, kernel, size, **options)


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.2), Kernel("rbf", 2.0), Kernel("cosine")])
def test_so_do_pools_and_panels_of_the_usual_size(kernel: Kernel) -> None:
    x = sphere(3000, 48, 1)
    x[2000:2300] = x[:300]
    agree(x, kernel, 1100, order=np.random.default_rng(0).permutation(3000))


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("cosine")])
def test_more_copies_of_a_row_than_a_front_holds_are_one_row_or_many(kernel: Kernel) -> None:
    x = np.concatenate([np.repeat(sphere(1, 8, 1), 1300, axis=0), sphere(40, 8)])
    agree(x, kernel, 60, order=np.random.default_rng(0).permutation(len(x)))


def test_rows_are_stored_as_float64_once_float32_tells_too_little_apart() -> None:
    rows, kernel = UnitRows(sphere(800, 3)), Kernel("rbf", 0.05)
    oracle = CholeskyPool(rows, kernel, 60)
    assert oracle.storage == torch.float32
    picks = found(oracle, kernel, 60)
    assert oracle.storage == torch.float64
    assert picks[0] == found(Textbook(rows, kernel, 60), kernel, 60)[0]


def test_float32_stays_where_it_suffices_and_is_not_far_off() -> None:
    rows, kernel = UnitRows(sphere(3000, 48, 1)), Kernel("rbf")
    oracle = CholeskyPool(rows, kernel, 500)
    found(oracle, kernel, 500)
    assert oracle.storage == torch.float32
    exact = Textbook(rows, kernel, 500)
    picks = found(exact, kernel, 500)[0]
    residuals = exact.residuals
    assert (oracle.bounds >= residuals - 1e-12).all()  # stale or not, bounds are bounds
    fresh = ~oracle.stale
    fresh[picks] = False
    assert fresh.sum() > 100
    np.testing.assert_allclose(oracle.bounds[fresh], residuals[fresh], atol=3e-6)


@pytest.mark.parametrize("name", ["cholesky", "feature-space"])
def test_few_rows_are_brought_up_to_date(name: Any) -> None:
    """Lazy: away from the first picks, most bounds are left as they are at most rounds."""
    rows, kernel = UnitRows(sphere(3000, 24, 1)), Kernel("cosine")
    with small():
        oracle: Any = make_oracle(name, rows, kernel, 200)
        brought: list[int] = []
        refine = oracle.refine

        def counted(wanted: np.ndarray, lowest: np.ndarray) -> None:
            brought.append(len(wanted))
            refine(wanted, lowest)

        oracle.refine = counted
        search = Search(oracle, Objective(kernel), np.arange(3000))
        search.run(Budget(200).ledger(3000))
        assert 0 < sum(brought) < 0.5 * 3000 * search.rounds


@pytest.mark.slow
@pytest.mark.skipif(not REAL.exists(), reason="the sentence embeddings are not here")
@pytest.mark.parametrize("kernel", [*(Kernel("rbf", gamma) for gamma in (0.2, 1.0, 3.0)), Kernel("cosine")], ids=str)
def test_every_oracle_makes_the_textbooks_picks_on_real_features(kernel: Kernel) -> None:
    column = pq.read_table(REAL, columns=["embedding"])["embedding"].combine_chunks()
    x = column.flatten().to_numpy().reshape(len(column), -1)  # (N, D) float16
    x = x[np.random.default_rng(0).permutation(len(x))[:8000]]
    agree(x, kernel, 600)
