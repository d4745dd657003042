from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.cluster import Here
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.objective import standardise
from raydpp.errors import UserError
from raydpp.select.inputs import partitioned
from raydpp.select.stage import select
from raydpp.select.target import score_by_target
from raydpp.storage import Folder
from raydpp.tables import open_table, write_table


def sphere(rows: int, seed: int) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, 6))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def written(folder: Path, name: str, features: np.ndarray, **columns: Any) -> str:
    ids = [f"{name}{n:03d}" for n in range(len(features))]
    rows = pa.table({"id": ids, "gradient": list(features.astype(np.float32)), **columns})
    write_table(Folder.at(folder), f"{name}.parquet", rows)
    return str(folder / f"{name}.parquet")


@pytest.fixture
def pool(tmp_path: Path) -> str:
    """A folder of 60 examples in three files."""
    rows = sphere(60, 0)
    for n in range(3):
        some = {"source": ["s"] * 20, "response_tokens": np.arange(20) + 1}
        written(tmp_path / "pool", "abc"[n], rows[20 * n : 20 * n + 20], **some)
    return str(tmp_path / "pool")


def expected(pool: np.ndarray, groups: list[np.ndarray]) -> np.ndarray:
    means = [group.mean(0) / np.linalg.norm(group.mean(0)) for group in groups]
    return np.max([pool @ mean for mean in means], axis=0)


@pytest.mark.parametrize("partitions", [1, 3])
def test_a_score_is_the_cosine_with_the_nearest_groups_mean(pool: str, tmp_path: Path, partitions: int) -> None:
    one, two = sphere(10, 1), sphere(7, 2)
    targets = [
        written(tmp_path, "one", one, source=["x"] * 4 + ["y"] * 6),  # two tasks in one table
        written(tmp_path, "two", two),
    ]
    table = open_table(pool, "gradient")
    opened = [open_table(url, "gradient") for url in targets]
    scored = score_by_target(Here(), table, partitioned(table, partitions, False, Here()), opened)
    rows = scored.read_columns(scored.parts, ["id", "target"])
    found = dict(zip(rows["id"].to_pylist(), rows["target"].to_pylist(), strict=True))
    scores = expected(sphere(60, 0), [one[:4], one[4:], two])
    np.testing.assert_allclose([found[key] for key in sorted(found)], scores, atol=1e-6)
    assert scored.has("target")


@pytest.mark.parametrize("weight", [1.0, 0.4])
def test_weight_one_takes_the_nearest_and_less_balances_with_diversity(
    pool: str, tmp_path: Path, weight: float
) -> None:
    target = written(tmp_path, "target", sphere(9, 5))
    run = select(pool, str(tmp_path / "out"), 8, target=[target], quality_weight=weight)
    picks = pq.read_table(Path(run.out) / "selection")["id"].to_pylist()
    ids = [f"{letter}{n:03d}" for letter in "abc" for n in range(20)]
    scores = standardise(expected(sphere(60, 0), [sphere(9, 5)]))
    if weight == 1:
        best = np.argsort(-scores)[:8]
    else:
        made = {name: run.record[name] for name in ("gamma", "quality_unit")}
        best = greedy_map(sphere(60, 0), 8, quality=scores, quality_weight=weight, ids=ids, **made).indices
        assert best.tolist() != np.argsort(-scores)[:8].tolist()
    assert picks == [ids[n] for n in best]
    again = {"target": [target], "quality_weight": weight}
    assert select(pool, run.out, 8, **again).repeated  # type: ignore[arg-type]
    written(tmp_path, "target", sphere(8, 6))
    with pytest.raises(UserError, match="input files have changed"):
        select(pool, run.out, 8, **again)  # type: ignore[arg-type]


def test_a_target_counts_beside_other_scores(pool: str, tmp_path: Path) -> None:
    target = written(tmp_path, "target", sphere(9, 5))
    ids = [f"{letter}{n:03d}" for letter in "abc" for n in range(20)]
    rating = np.random.default_rng(3).random(60)
    lines = [f"{one},{value}" for one, value in zip(ids, rating, strict=True)]
    (tmp_path / "ratings.csv").write_text("id,rating\n" + "\n".join(lines))
    quality = ["target=3", "rating=1"]
    given: dict[str, Any] = {"target": [target], "scores": [str(tmp_path / "ratings.csv")], "quality": quality}
    run = select(pool, str(tmp_path / "out"), 6, **given, method="quality")
    scores = expected(sphere(60, 0), [sphere(9, 5)])
    total = 0.75 * standardise(scores) + 0.25 * standardise(rating)
    assert pq.read_table(Path(run.out) / "selection")["id"].to_pylist() == [ids[n] for n in np.argsort(-total)[:6]]


def test_mistakes_are_refused(pool: str, table: str, tmp_path: Path) -> None:
    out, target = str(tmp_path / "out"), written(tmp_path, "target", sphere(9, 5))
    with pytest.raises(UserError, match="counts by --quality-weight, which is 0"):
        select(pool, out, 5, target=[target])
    with pytest.raises(UserError, match=r"has 6 dimensions and .* 64"):
        select(pool, out, 5, target=[table], quality_weight=1)
    both = np.repeat([[1.0, 0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0, 0]], 2, axis=0)
    with pytest.raises(UserError, match="cancel out"):
        select(pool, out, 5, target=[written(tmp_path, "both", both)], quality_weight=1)
    taken = written(tmp_path, "taken", sphere(9, 5), target=np.arange(9.0))
    with pytest.raises(UserError, match="has a column 'target'"):
        select(taken, out, 5, target=[target], quality_weight=1)
