from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.errors import UserError
from raydpp.selection.greedy import Objective, greedy_map, search
from raydpp.selection.kernels import RESIDUAL_FLOOR, Kernel, KernelName, unit_rows
from raydpp.selection.oracles import Textbook

REAL = Path(__file__).parents[3] / "shared/features/minilm_32k.parquet"


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def brute_force(matrix: np.ndarray, size: int, quality: np.ndarray, weight: float) -> list[int]:
    """Greedy by the definition: the objective of every candidate set from scratch."""
    picks: list[int] = []
    for _ in range(size):
        values = np.full(len(matrix), -np.inf)
        for i in set(range(len(matrix))) - set(picks):
            chosen = [*picks, i]
            log_det = np.linalg.slogdet(matrix[np.ix_(chosen, chosen)])[1]
            values[i] = (1 - weight) * log_det + weight * quality[chosen].sum()
        best = values.max()
        picks.append(int(np.flatnonzero(values >= best - 1e-9)[0]))
    return picks


@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_every_pick_is_the_one_that_adds_most(kernel: KernelName, weight: float, seed: int) -> None:
    x = sphere(25, 6, seed)
    quality = np.random.default_rng([seed, 1]).standard_normal(25)
    matrix = Kernel(kernel).matrix(unit_rows(x)).numpy()
    chosen = greedy_map(x, 12, kernel=kernel, quality=quality, quality_weight=weight)
    assert chosen.indices.tolist() == brute_force(matrix, 12, quality, weight)
    assert chosen.indices.dtype == np.int64
    assert chosen.stopped is None
    for size in (1, 5, 12):  # log gains are of the kernel alone, whatever the weight
        part = chosen.indices[:size]
        assert chosen.log_gains[:size].sum() == pytest.approx(np.linalg.slogdet(matrix[np.ix_(part, part)])[1])
    assert chosen.log_det == pytest.approx(chosen.log_gains.sum())


def test_weight_0_takes_no_notice_of_quality() -> None:
    x = sphere(20, 5)
    quality = np.arange(20.0)
    assert (greedy_map(x, 9, quality=quality).indices == greedy_map(x, 9).indices).all()


def test_weight_1_is_the_best_by_quality_even_copies() -> None:
    x = np.repeat(sphere(2, 5), 4, axis=0)
    quality = [0.5, 1e-12, 0.0, 3.0, 3.0, -1.0, 2.0, 7.0]
    chosen = greedy_map(x, 8, quality=quality, quality_weight=1.0)
    assert chosen.indices.tolist() == [7, 3, 4, 6, 0, 1, 2, 5]
    assert chosen.stopped is None
    assert (chosen.log_gains[2:] == math.log(RESIDUAL_FLOOR)).all()
    assert chosen.log_gains[1] > -5


def test_weight_1_may_go_beyond_the_rank() -> None:
    chosen = greedy_map(sphere(9, 2), 9, kernel="cosine", ridge=0.0, quality=np.arange(9.0), quality_weight=1.0)
    assert chosen.indices.tolist() == list(range(8, -1, -1))


def test_all_rows_tie_at_first_and_the_smallest_id_wins() -> None:
    x = sphere(40, 7).astype(np.float16)
    ids = [f"{i:02d}" for i in np.random.default_rng(3).permutation(40)]
    assert ids[greedy_map(x, 1, ids=ids).indices[0]] == "00"
    assert greedy_map(x, 1).indices.tolist() == [0]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 24),
    dimension=st.integers(2, 9),
    copies=st.integers(0, 6),
    kernel=st.sampled_from(["rbf", "cosine"]),
    weight=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_the_picks_do_not_depend_on_the_order_of_rows(
    seed: int, rows: int, dimension: int, copies: int, kernel: KernelName, weight: float
) -> None:
    random = np.random.default_rng(seed)
    x = sphere(rows, dimension, seed).astype(np.float16)
    x = np.concatenate([x, x[random.integers(0, rows, copies)]])
    quality = random.integers(0, 3, len(x)).astype(float)
    ids = np.array([f"{value:x}" for value in random.permutation(1000)[: len(x)]])
    size = int(random.integers(1, len(x) + 1))

    def picked(order: np.ndarray) -> list[str]:
        chosen = greedy_map(
            x[order],
            size,
            kernel=kernel,
            quality=quality[order],
            quality_weight=weight,
            ids=ids[order],
        )
        return ids[order][chosen.indices].tolist()

    assert picked(np.arange(len(x))) == picked(random.permutation(len(x)))


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(2, 20),
    copies=st.integers(0, 5),
    weight=st.floats(0.0, 1.0),
    data=st.data(),
)
def test_every_prefix_is_the_selection_for_a_smaller_budget(
    seed: int, rows: int, copies: int, weight: float, data: st.DataObject
) -> None:
    x = sphere(rows, 4, seed)
    x = np.concatenate([x, x[np.arange(copies) % rows]])
    quality = np.random.default_rng(seed).standard_normal(len(x))
    size = data.draw(st.integers(1, len(x)))
    whole = greedy_map(x, len(x), quality=quality, quality_weight=weight)
    part = greedy_map(x, size, quality=quality, quality_weight=weight)
    assert part.indices.tolist() == whole.indices[:size].tolist()
    np.testing.assert_array_equal(part.log_gains, whole.log_gains[:size])
    assert len(set(whole.indices.tolist())) == len(whole.indices)
    if weight == 0.0:  # submodular: gains never rise
        assert (np.diff(whole.log_gains) <= 1e-9).all()


def test_exact_copies_are_picked_once_and_the_run_says_why_it_ends() -> None:
    x = np.tile(sphere(5, 8).astype(np.float32), (3, 1))
    chosen = greedy_map(x, 12)
    assert sorted(chosen.indices.tolist()) == [0, 1, 2, 3, 4]
    assert chosen.stopped is not None
    assert "stopped at pick 6 of 12" in chosen.stopped
    assert "copies of picks" in chosen.stopped


def test_quality_does_not_bring_back_a_copy() -> None:
    x = np.tile(sphere(3, 8), (2, 1))
    chosen = greedy_map(x, 6, quality=[0, 0, 0, 100, 100, 100], quality_weight=0.99)
    assert sorted(chosen.indices.tolist()) == [3, 4, 5]


def test_with_a_ridge_copies_are_items_of_their_own() -> None:
    x = np.tile(sphere(3, 8), (2, 1))
    chosen = greedy_map(x, 6, kernel="cosine")
    assert chosen.stopped is None
    assert sorted(chosen.indices.tolist()) == list(range(6))


def test_the_run_ends_where_the_rows_span_less_than_their_dimension() -> None:
    x = np.zeros((10, 6))
    x[:, :3] = sphere(10, 3)
    chosen = greedy_map(x, 5, kernel="cosine", ridge=0.0)
    assert len(chosen.indices) == 3
    assert chosen.stopped is not None
    assert "stopped at pick 4 of 5" in chosen.stopped


def test_a_row_just_above_the_floor_is_picked_and_one_just_below_is_not() -> None:
    def pair(residual: float) -> np.ndarray:  # 1 - cos^2 = residual
        return np.array([[1.0, 0.0], [math.sqrt(1 - residual), math.sqrt(residual)]])

    assert len(greedy_map(pair(2 * RESIDUAL_FLOOR), 2, kernel="cosine", ridge=0.0).indices) == 2
    assert len(greedy_map(pair(RESIDUAL_FLOOR / 2), 2, kernel="cosine", ridge=0.0).indices) == 1


def test_progress_hears_of_every_pick() -> None:
    heard: list[tuple[int, float]] = []
    chosen = greedy_map(sphere(10, 4), 4, progress=lambda done, gain: heard.append((done, gain)))
    assert heard == list(zip([1, 2, 3, 4], chosen.log_gains, strict=True))


def test_an_array_a_tensor_and_float16_of_the_same_rows_agree() -> None:
    x = sphere(30, 16).astype(np.float16)
    expected = greedy_map(x, 10).indices.tolist()
    assert greedy_map(torch.from_numpy(x), 10, device="cpu").indices.tolist() == expected
    assert greedy_map(x.astype(np.float64), 10).indices.tolist() == expected


def test_search_takes_the_tied_candidate_first_in_order() -> None:
    rows, kernel = unit_rows(np.eye(5)), Kernel("cosine")
    order = torch.tensor([4, 2, 0, 3, 1])
    assert search(Textbook(rows, kernel, 5), 5, Objective(kernel), order).indices.tolist() == [2, 4, 1, 3, 0]


def test_what_ties_is_a_matter_of_rounding() -> None:
    objective = Objective(Kernel("rbf"))
    residuals = torch.tensor([0.5, 0.5 - 1e-11, 0.5 - 1e-7], dtype=torch.float64)
    scores, slack = objective.scores(residuals, None)
    assert (scores + slack >= scores.max()).tolist() == [True, True, False]
    small = torch.tensor([1e-6, 1e-6 - 1e-13, 1e-6 - 1e-11], dtype=torch.float64)
    scores, slack = objective.scores(small, None)
    assert (scores + slack >= scores.max()).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"size": 0}, "at least 1"),
        ({"size": 11}, "a budget of 11 is larger than the pool of 10"),
        ({"size": 2.5}, "whole number"),
        ({"size": 4, "kernel": "cosine", "ridge": 0.0}, "rank at most 3"),
        ({"size": 2, "quality_weight": 1.5, "quality": [0.0] * 10}, "between 0"),
        ({"size": 2, "quality_weight": float("nan"), "quality": [0.0] * 10}, "between 0"),
        ({"size": 2, "quality_weight": 0.5}, "needs quality scores"),
        ({"size": 2, "quality": [0.0] * 9}, "one score for each of 10 rows"),
        ({"size": 2, "quality": [0.0] * 8 + [np.nan, np.inf]}, r"2 quality scores .*rows \[8, 9\]"),
        ({"size": 2, "ids": list("abcdefghii")}, "rows 8 and 9 have the same id i"),
        ({"size": 2, "ids": ["a", *range(9)]}, "all strings or all integers"),
        ({"size": 2, "ids": ["a"]}, "1 ids for 10 rows"),
    ],
)
def test_a_mistake_is_refused_in_words(arguments: dict, words: str) -> None:
    with pytest.raises(UserError, match=words):
        greedy_map(sphere(10, 3), **arguments)


def test_rows_that_are_not_unit_are_refused_by_id() -> None:
    x = sphere(4, 3)
    x[2] *= 2
    with pytest.raises(UserError, match="ids third"):
        greedy_map(x, 2, ids=["first", "second", "third", "fourth"])


@pytest.mark.skipif(not REAL.exists(), reason="the sentence embeddings are not here")
@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
def test_greedy_beats_random_subsets_of_real_features(kernel: KernelName) -> None:
    column = pq.read_table(REAL, columns=["embedding"])["embedding"].slice(0, 2000).combine_chunks()
    x = column.flatten().to_numpy().reshape(len(column), -1)  # (2000, D) float16
    matrix = Kernel(kernel).matrix(unit_rows(x)).numpy()
    random = np.random.default_rng(0)
    subsets = [random.permutation(len(x))[:100] for _ in range(20)]
    best = max(np.linalg.slogdet(matrix[np.ix_(part, part)])[1] for part in subsets)
    chosen = greedy_map(x, 100, kernel=kernel)
    assert chosen.log_det > best
    direct = np.linalg.slogdet(matrix[np.ix_(chosen.indices, chosen.indices)])[1]
    assert chosen.log_det == pytest.approx(direct)
