from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from raydpp.cluster import Here
from raydpp.diversity.distance import log_det_curve
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.measure.curves import Measured, example_error, subset_curves
from raydpp.storage import Folder
from raydpp.tables import GradientTable, by_source, open_table, write_table

KERNEL = Kernel("rbf", 0.5)


def written(folder: Path, points: np.ndarray) -> GradientTable:
    rows = pa.table({"id": [f"{n:05d}" for n in range(len(points))], "gradient": list(points)})
    write_table(Folder.at(folder), "t.parquet", rows)
    return open_table(str(folder / "t.parquet"), "gradient")


def drawn(rows: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, 8))
    points[:, 0] += 3
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize(("rows", "size"), [(200, 40), (60, 60), (600, 30)])
def test_the_error_is_what_other_examples_would_have_made_of_it(tmp_path: Path, rows: int, size: int) -> None:
    means = [greedy_map(drawn(rows, seed), size, gamma=0.5).log_det / size for seed in range(20)]
    told = [example_error(Here(), written(tmp_path / str(n), drawn(rows, n)), size, KERNEL) or 0.0 for n in range(3)]
    assert 0.4 < np.mean(told) / np.std(means) < 2.5


def test_greedy_picks_from_a_pool_of_one_size_whatever_the_table_has(tmp_path: Path) -> None:
    points = drawn(300, 1)
    table = written(tmp_path / "whole", points)
    whole, pool, same = (
        subset_curves(Here(), table, Measured("greedy", 30, KERNEL, 1, 0, size), sampling=True)
        for size in (None, 60, 300)
    )
    drawn_ids = np.random.default_rng(0).permutation(300)[:60]
    expected = greedy_map(points[np.sort(drawn_ids)], 30, gamma=0.5).log_gains.cumsum()
    np.testing.assert_allclose(pool.curves[0], expected, atol=1e-9)
    np.testing.assert_array_equal(same.curves, whole.curves)
    assert pool.curves[0, -1] < whole.curves[0, -1]
    assert pool.sampling != whole.sampling


@pytest.mark.parametrize("source", ["a", "b"])
def test_a_source_of_a_table_has_a_pool_of_its_own(tmp_path: Path, source: str) -> None:
    points = drawn(80, 2)
    names = ["a", "b"] * 40
    rows = pa.table({"id": [f"{n:05d}" for n in range(80)], "source": names, "gradient": list(points)})
    write_table(Folder.at(tmp_path), "t.parquet", rows)
    table = next(one for one in by_source(open_table(str(tmp_path / "t.parquet"), "gradient")) if one.name == source)
    found = subset_curves(Here(), table, Measured("greedy", 10, KERNEL, 1, 0, 20))
    own = points[np.array(names) == source][np.sort(np.random.default_rng(0).permutation(40)[:20])]
    np.testing.assert_allclose(found.curves[0], greedy_map(own, 10, gamma=0.5).log_gains.cumsum(), atol=1e-9)


def test_too_few_examples_tell_no_error(tmp_path: Path) -> None:
    assert example_error(Here(), written(tmp_path, drawn(7, 0)), 3, KERNEL) is None
    assert example_error(Here(), written(tmp_path, drawn(8, 0)), 8, KERNEL) is not None


def test_uniform_draws_differ_by_as_much_as_one_of_them_is_off(tmp_path: Path) -> None:
    table = written(tmp_path, drawn(100, 0))
    found = subset_curves(Here(), table, Measured("uniform", 20, KERNEL, 6, 0), sampling=True)
    assert found.curves.shape == (6, 20)
    assert found.sampling == pytest.approx(np.std(found.curves[:, -1], ddof=1) / 20 / 0.8**0.5)
    one = subset_curves(Here(), table, Measured("uniform", 20, KERNEL, 1, 0), sampling=True)
    assert one.sampling is None
    assert subset_curves(Here(), table, Measured("greedy", 20, KERNEL, 2, 0)).sampling is None


@pytest.mark.parametrize("rows", [40, 55, 1_000])  # all of them, most, few
def test_the_error_of_uniform_draws_is_that_of_draws_from_everything(tmp_path: Path, rows: int) -> None:
    size = 40
    means = [log_det_curve(drawn(size, seed), KERNEL)[-1] / size for seed in range(100)]
    how = Measured("uniform", size, KERNEL, 12, 0)
    told = [
        subset_curves(Here(), written(tmp_path / str(n), drawn(rows, n)), how, sampling=True).sampling or 0.0
        for n in range(6)
    ]
    assert 0.5 < np.mean(told) / np.std(means) < 2
