from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

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
from raydpp.select.target import TargetScore, score_by_target, target_tasks
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


def expected(pool: np.ndarray, groups: list[np.ndarray], form: TargetScore = "mean") -> np.ndarray:
    if form == "nearest":
        return np.max([pool @ row for group in groups for row in group], axis=0)
    cosines = np.array([pool @ (group.mean(0) / np.linalg.norm(group.mean(0))) for group in groups])
    against = np.minimum(cosines.min(0), 0) if form == "conflict-aware" else 0
    return cosines.max(0) + against


@pytest.mark.parametrize("form", get_args(TargetScore))
@pytest.mark.parametrize("partitions", [1, 3])
def test_a_score_is_a_cosine_with_the_nearest_of_the_targets(
    pool: str, tmp_path: Path, partitions: int, form: TargetScore
) -> None:
    one, two = sphere(10, 1), sphere(7, 2)
    sources = np.array(["x"] * 4 + ["y"] * 6)  # two tasks in one table of two files
    written(tmp_path / "one", "a", one[::2], source=sources[::2])
    written(tmp_path / "one", "b", one[1::2], source=sources[1::2])
    targets = [str(tmp_path / "one"), written(tmp_path, "two", two)]
    table = open_table(pool, "gradient")
    opened = [open_table(url, "gradient") for url in targets]
    scored = score_by_target(Here(), table, partitioned(table, partitions, False, Here()), opened, form)
    rows = scored.read_columns(scored.parts, ["id", "target"])
    found = dict(zip(rows["id"].to_pylist(), rows["target"].to_pylist(), strict=True))
    scores = expected(sphere(60, 0), [one[:4], one[4:], two], form)
    np.testing.assert_allclose([found[key] for key in sorted(found)], scores, atol=1e-6)
    assert scored.has("target")


def test_the_rows_of_targets_come_by_task_in_the_order_of_ids(tmp_path: Path) -> None:
    one, two = sphere(6, 1), sphere(3, 2)
    sources = np.array(["y", "x"] * 3)
    for name, some in (("c", [0, 3, 4]), ("a", [5, 1, 2])):
        written(tmp_path / "one", name, one[some], source=sources[some])
    opened = [open_table(url, "gradient") for url in (str(tmp_path / "one"), written(tmp_path, "b", two))]
    for targets in (opened, opened[::-1]):
        found = target_tasks(targets)
        assert len(found) == 3
        for rows, expected_rows in zip(found, (one[[5, 1, 3]], one[[2, 0, 4]], two), strict=True):
            np.testing.assert_allclose(rows, expected_rows, atol=1e-6)


@pytest.mark.parametrize("form", ["nearest", "conflict-aware"])
def test_the_form_of_the_score_is_an_option(pool: str, tmp_path: Path, form: TargetScore) -> None:
    aims = [sphere(4, 5), sphere(5, 6)]
    given = [written(tmp_path, f"aim{n}", aim) for n, aim in enumerate(aims)]
    run = select(pool, str(tmp_path / "out"), 8, target=given, target_score=form, quality_weight=1.0)
    ids = [f"{letter}{n:03d}" for letter in "abc" for n in range(20)]
    best = np.argsort(-expected(sphere(60, 0), aims, form))[:8]
    assert pq.read_table(Path(run.out) / "selection")["id"].to_pylist() == [ids[n] for n in best]
    assert set(best) != set(np.argsort(-expected(sphere(60, 0), aims))[:8])


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
    with pytest.raises(UserError, match="--target-score nearest needs something to aim at"):
        select(pool, out, 5, target_score="nearest", quality_weight=1)
    with pytest.raises(UserError, match="--target-score max: use one of mean, nearest"):
        select(pool, out, 5, target=[target], target_score="max", quality_weight=1)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--method round-robin needs something to aim at: give --target"):
        select(pool, out, 5, method="round-robin")
    with pytest.raises(UserError, match=r"has 6 dimensions and .* 64"):
        select(pool, out, 5, target=[table], quality_weight=1)
    both = np.repeat([[1.0, 0, 0, 0, 0, 0], [-1.0, 0, 0, 0, 0, 0]], 2, axis=0)
    with pytest.raises(UserError, match="cancel out"):
        select(pool, out, 5, target=[written(tmp_path, "both", both)], quality_weight=1)
    taken = written(tmp_path, "taken", sphere(9, 5), target=np.arange(9.0))
    with pytest.raises(UserError, match="has a column 'target'"):
        select(taken, out, 5, target=[target], quality_weight=1)
