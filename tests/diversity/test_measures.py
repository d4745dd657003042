from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest

from raydpp.diversity.measures import Measures, measures
from raydpp.errors import UserError
from tests.test_tables import directions


def groups(rows: int, dimension: int, centres: int, spread: float, seed: int = 0) -> np.ndarray:
    points = directions(centres, dimension, seed)[np.arange(rows) % centres] + spread * directions(rows, dimension, 9)
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True))


def by_brute_force(rows: np.ndarray, near: float = 0.95, reference: np.ndarray | None = None) -> dict[str, float]:
    """All but the clusters, row by row from the whole matrix of cosines."""
    cosines, n = rows @ rows.T, len(rows)
    shares = np.linalg.eigvalsh(cosines / n).clip(1e-300)
    density = [_density(row, reference) for row in rows]
    nearest, novelty = np.empty((n, n - 1)), []
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: 1 - cosines[i, j])
        nearest[i] = cosines[i, others]
        weights = [1 / rank for rank in range(1, n)]
        parts = [w * density[j] * (1 - cosines[i, j]) for w, j in zip(weights, others, strict=True)]
        novelty.append(sum(parts) / sum(weights))
    return {
        "vendi_1": math.exp(-float(np.sum(shares * np.log(shares)))),
        "vendi_2": 1 / float(np.sum(shares**2)),
        "vendi_inf": 1 / float(shares.max()),
        "cosine_distance": float(np.mean((1 - cosines)[~np.eye(n, dtype=bool)])),
        "nearest_cosine": float(nearest[:, 0].mean()),
        "tenth_cosine": float(nearest[:, 9].mean()),
        "near_duplicates": float(np.mean(nearest[:, 0] >= near)),
        "novel_sum": float(np.mean(novelty)),
    }


def _density(row: np.ndarray, reference: np.ndarray | None) -> float:
    if reference is None:
        return 1.0
    distances = [1 - float(row @ other) for other in np.unique(reference, axis=0)]
    return float(np.mean(sorted(d for d in distances if d > 1e-6)[:10]) ** -0.5)


def as_stored(rows: np.ndarray, kind: str) -> np.ndarray:
    """Rows as a table of that type holds them."""
    return np.rint(rows * 100).astype(np.int8) if kind == "int8" else rows.astype(kind)


def normalised(stored: np.ndarray) -> np.ndarray:
    rows = stored.astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def numbers(found: Measures, *without: str) -> dict[str, Any]:
    return {name: value for name, value in dataclasses.asdict(found).items() if name not in without}


@pytest.mark.parametrize("kind", ["int8", "float16", "float32", "float64"])
@pytest.mark.parametrize(("rows", "dimension"), [(30, 48), (120, 24)])
@pytest.mark.parametrize("with_reference", [False, True])
def test_each_is_what_the_whole_matrix_gives(kind: str, rows: int, dimension: int, with_reference: bool) -> None:
    stored = as_stored(groups(rows, dimension, 11, 0.4), kind)
    stored[5] = stored[17]  # a copy
    more = as_stored(groups(70, dimension, 11, 0.3), kind)
    reference = np.concatenate([stored, stored, more]) if with_reference else None
    found = measures([stored], near=0.9, reference=reference)
    expected = by_brute_force(normalised(stored), 0.9, None if reference is None else normalised(reference))
    assert (found.rows, found.sampled) == (rows, rows)
    assert 0 < found.near_duplicates < 1  # type: ignore[operator]
    assert {name: getattr(found, name) for name in expected} == pytest.approx(expected, rel=2e-5, abs=1e-6)


def test_blocks_and_the_order_of_rows_make_no_difference() -> None:
    stored = as_stored(groups(400, 32, 9, 0.1), "float16")
    whole = numbers(measures([stored]))
    for block in (1, 150, 399):
        found = numbers(measures(stored[start : start + block] for start in range(0, 400, block)))
        assert found == pytest.approx(whole, rel=1e-5)
    mixed = numbers(measures([stored[np.random.default_rng(1).permutation(400)]]), "cluster_entropy")
    assert mixed == pytest.approx({name: whole[name] for name in mixed}, rel=1e-5)


def test_a_sample_depends_on_its_seed_and_not_on_the_blocks() -> None:
    rows = groups(1_000, 16, 60, 0.3)
    whole, sampled = measures([rows], sample=1_000), measures([rows], sample=300)
    assert (sampled.rows, sampled.sampled) == (1_000, 300)
    of_all = ("vendi_1", "vendi_2", "vendi_inf", "cosine_distance")
    assert [getattr(sampled, name) for name in of_all] == [getattr(whole, name) for name in of_all]
    assert numbers(measures(np.split(rows, [1, 77, 800]), sample=300)) == pytest.approx(numbers(sampled), rel=1e-5)
    drawn = [measures([rows], sample=300, seed=seed) for seed in range(1, 5)]
    assert len({one.nearest_cosine for one in (sampled, *drawn)}) == 5
    # Any row may be drawn: the nearest of 300 are as near as those of any 300 rows.
    chosen = [np.random.default_rng(seed).permutation(rows)[:300] for seed in range(2)]
    expected = [by_brute_force(some)["nearest_cosine"] for some in chosen]
    assert np.mean([one.nearest_cosine for one in drawn]) == pytest.approx(np.mean(expected), abs=0.02)


def test_copies_are_seen_by_every_measure() -> None:
    distinct = np.eye(20, 40)
    once, twice = measures([distinct]), measures([np.tile(distinct, (5, 1))])
    assert (once.vendi_1, once.cosine_distance, once.nearest_cosine, once.near_duplicates) == pytest.approx(
        (20, 1, 0, 0)
    )
    assert (twice.vendi_1, twice.vendi_2, twice.vendi_inf) == pytest.approx((20, 20, 20))
    assert (twice.nearest_cosine, twice.tenth_cosine, twice.near_duplicates) == pytest.approx((1, 0, 1))
    assert twice.cosine_distance == pytest.approx(1 - 4 / 99)
    assert twice.novel_sum < 0.7  # type: ignore[operator]


def test_clusters_of_one_size_have_full_entropy_and_one_cluster_none() -> None:
    def found(sizes: list[int]) -> float:
        entropy = measures([np.repeat(np.eye(len(sizes), 16), sizes, axis=0)]).cluster_entropy
        assert entropy is not None
        return entropy

    assert found([16] * 16) == pytest.approx(1)
    assert found([50]) == pytest.approx(0)
    shares = np.array([90, 10]) / 100  # of ten clusters eight are empty
    assert found([90, 10]) == pytest.approx(-float(np.sum(shares * np.log(shares))) / math.log(10))


def test_few_rows_have_no_pairs() -> None:
    one = numbers(measures([np.eye(1, 8)]))
    assert {name for name, value in one.items() if value is None} == {
        "cosine_distance", "nearest_cosine", "tenth_cosine", "near_duplicates", "novel_sum", "cluster_entropy",
    }  # fmt: skip
    assert one["vendi_1"] == pytest.approx(1)
    three = measures([np.eye(3, 8)])
    assert (three.nearest_cosine, three.tenth_cosine, three.cluster_entropy) == (0, None, None)
    assert measures([directions(11, 8)]).tenth_cosine is not None


@pytest.mark.parametrize(
    ("blocks", "options", "said"),
    [
        ([], {}, "no rows"),
        ([np.eye(3, 4), np.eye(3, 5)], {}, "4 and 5 dimensions"),
        ([2 * np.eye(3)], {}, "without unit norm"),
        ([np.eye(3)], {"sample": 1}, "at least 2"),
        ([np.eye(3)], {"seed": -1}, "seed"),
        ([np.eye(3)], {"reference": np.eye(3)}, "3 distinct rows of 3 dimensions: give more than 10 of 3"),
        ([np.eye(3)], {"reference": np.eye(20)}, "give more than 10 of 3"),
    ],
)
def test_mistakes_are_named(blocks: list[np.ndarray], options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        measures(blocks, **options)
