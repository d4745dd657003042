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
from raydpp.tables import GradientTable, open_table, write_table

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
