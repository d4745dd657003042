from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.features import unit_rows
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import RESIDUAL_FLOOR, Kernel, KernelName
from raydpp.dpp.oracles.choice import OracleName
from raydpp.errors import UserError

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
    if weight < 1.0:
        np.testing.assert_array_equal(part.log_gains, whole.log_gains[:size])
    else:  # of one product over all picks, whose rounding depends on their number
        np.testing.assert_allclose(part.log_gains, whole.log_gains[:size], rtol=1e-12)
    assert len(set(whole.indices.tolist())) == len(whole.indices)
    if weight == 0.0:  # submodular: gains never rise
        assert (np.diff(whole.log_gains) <= 1e-9).all()


def test_exact_copies_are_picked_once_and_the_run_says_why_it_ends() -> None:
    x = np.tile(sphere(5, 8).astype(np.float32), (3, 1))
    chosen = greedy_map(x, 12)
    assert sorted(chosen.indices.tolist()) == [0, 1, 2, 3, 4]
    assert chosen.stopped is not None
    assert "stopped at pick 6 of 12" in chosen.stopped
    assert "numerically rank-deficient" in chosen.stopped
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


def test_progress_gets_every_pick() -> None:
    seen: list[tuple[int, float]] = []
    chosen = greedy_map(sphere(10, 4), 4, progress=lambda done, gain: seen.append((done, gain)))
    assert seen == list(zip([1, 2, 3, 4], chosen.log_gains, strict=True))


def test_an_array_a_tensor_and_float16_of_the_same_rows_agree() -> None:
    x = sphere(30, 16).astype(np.float16)
    expected = greedy_map(x, 10).indices.tolist()
    assert greedy_map(torch.from_numpy(x), 10, device="cpu").indices.tolist() == expected
    assert greedy_map(x.astype(np.float64), 10).indices.tolist() == expected


@pytest.mark.parametrize("kernel", ["rbf", "cosine"])
@pytest.mark.parametrize("oracle", ["textbook", "cholesky", "feature-space"])
def test_whole_numbers_are_selected_from_as_directions(kernel: KernelName, oracle: OracleName) -> None:
    if (kernel, oracle) == ("rbf", "feature-space"):
        return
    x = np.rint(12 * sphere(300, 36, 4)).astype(np.int8)
    x[200:210] = x[:10]
    exact = x / np.linalg.norm(x.astype(float), axis=1, keepdims=True)
    expected = greedy_map(exact, 60, kernel=kernel, oracle="textbook")
    found = greedy_map(x, 60, kernel=kernel, oracle=oracle, owned=x[:0])
    assert found.indices.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(found.log_gains, expected.log_gains, atol=1e-9)
    owned = greedy_map(x[20:], 30, kernel=kernel, oracle=oracle, owned=x[:20])
    assert owned.indices.tolist() == greedy_map(exact[20:], 30, kernel=kernel, owned=exact[:20]).indices.tolist()


def test_what_is_owned_counts_as_picked_before() -> None:
    x, kernel = sphere(40, 8), Kernel("rbf", 0.5)
    matrix = kernel.matrix(unit_rows(x)).numpy()
    whole = greedy_map(x, 15, gamma=0.5)
    owned = whole.indices[:6]
    by_id = greedy_map(x, 9, gamma=0.5, owned=owned)
    assert by_id.indices.tolist() == whole.indices[6:].tolist()
    np.testing.assert_allclose(by_id.log_gains, whole.log_gains[6:])
    rest = np.delete(np.arange(40), owned)
    by_features = greedy_map(x[rest], 9, gamma=0.5, owned=x[owned].astype(np.float64))
    assert rest[by_features.indices].tolist() == whole.indices[6:].tolist()
    both = [*owned, *by_id.indices]
    log_dets = [np.linalg.slogdet(matrix[np.ix_(part, part)])[1] for part in (both, owned)]
    assert by_id.log_det == pytest.approx(log_dets[0] - log_dets[1])


def test_owned_features_may_repeat_candidates_and_each_other() -> None:
    x = sphere(12, 6)
    chosen = greedy_map(x, 12, owned=np.concatenate([x[:3], x[:2]]))
    assert sorted(chosen.indices.tolist()) == list(range(3, 12))
    assert chosen.stopped is not None
    assert "stopped at pick 10 of 12" in chosen.stopped


def test_what_is_excluded_is_never_picked() -> None:
    x = sphere(20, 6)
    ids = [f"r{i}" for i in range(20)]
    rest = np.delete(np.arange(20), [0, 7])
    chosen = greedy_map(x, 8, ids=ids, exclude=["r0", "r7"])
    assert chosen.indices.tolist() == rest[greedy_map(x[rest], 8, ids=[ids[i] for i in rest]).indices].tolist()


def test_a_fraction_of_the_rows() -> None:
    x = sphere(30, 6)
    assert greedy_map(x, 0.2).indices.tolist() == greedy_map(x, 6).indices.tolist()


@pytest.mark.parametrize("weight", [0.0, 0.4])
def test_a_budget_of_tokens_takes_what_adds_most_per_token_and_still_fits(weight: float) -> None:
    x = sphere(30, 8)
    random = np.random.default_rng(0)
    costs, quality = random.integers(1, 40, 30).astype(float), random.standard_normal(30)
    matrix = Kernel().matrix(unit_rows(x)).numpy()
    picks: list[int] = []
    left = 100.0
    while any(costs[i] <= left for i in set(range(30)) - set(picks)):
        modular = {}
        for i in set(range(30)) - set(picks):
            if costs[i] <= left:
                inner = np.linalg.solve(matrix[np.ix_(picks, picks)], matrix[picks, i]) if picks else np.zeros(0)
                residual = 1.0 - matrix[picks, i] @ inner
                modular[i] = (1 - weight) * np.log(residual / costs[i]) + weight * quality[i]
        picks.append(min(modular, key=lambda i: (-round(modular[i], 9), i)))
        left -= costs[picks[-1]]
    chosen = greedy_map(x, tokens=100, costs=costs, quality=quality, quality_weight=weight)
    assert chosen.indices.tolist() == picks
    assert chosen.stopped is None


def test_quotas_leave_greedy_its_choice_where_they_can() -> None:
    x = sphere(60, 6)
    sources = np.array(list("aab") * 20)
    free = greedy_map(x, 12)
    a = int((sources[free.indices] == "a").sum())
    assert greedy_map(x, 12, sources=sources, minimum={"a": a}).indices.tolist() == free.indices.tolist()
    none = greedy_map(x, 12, sources=sources, maximum={"a": 0})
    only_b = np.flatnonzero(sources == "b")
    assert none.indices.tolist() == only_b[greedy_map(x[only_b], 12).indices].tolist()
    forced = greedy_map(x, 12, sources=sources, minimum={"a": a + 2})
    first = 12 - (a + 2) - int((sources[free.indices] == "b").sum()) + 2
    assert forced.indices[: max(first, 0)].tolist() == free.indices[: max(first, 0)].tolist()
    assert (sources[forced.indices] == "a").sum() == a + 2
    short = greedy_map(x, 12, sources=sources, maximum={"*": 3})
    assert len(short.indices) == 6
    assert short.stopped == "stopped at pick 7 of 12: the maxima of the sources leave nothing to pick"


def test_the_run_ends_before_a_pick_adds_less_than_asked() -> None:
    x = sphere(60, 6)
    whole = greedy_map(x, 30)
    chosen = greedy_map(x, min_log_gain=-0.5)
    count = int((whole.log_gains >= -0.5).argmin())
    assert chosen.indices.tolist() == whole.indices[:count].tolist()
    assert chosen.stopped is not None
    assert f"stopped at pick {count + 1}: the next example adds" in chosen.stopped


@pytest.mark.parametrize("oracle", ["textbook", "cholesky", "feature-space"])
def test_ctrl_c_keeps_the_picks_so_far(oracle: OracleName) -> None:
    x = sphere(300, 8)

    def interrupt(count: int, _gain: float) -> None:
        if count == 17:
            raise KeyboardInterrupt

    chosen = greedy_map(x, 40, kernel="cosine", oracle=oracle, progress=interrupt)
    assert chosen.indices.tolist() == greedy_map(x, 17, kernel="cosine").indices.tolist()
    assert chosen.stopped == "interrupted after 17 picks, which are the selection for that budget"


def test_a_bar_shows_the_picks_and_the_gain(capsys: pytest.CaptureFixture[str]) -> None:
    greedy_map(sphere(30, 4), 9, progress=True)
    shown = capsys.readouterr().err
    assert "9/9" in shown
    assert "log_gain" in shown


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
        ({}, "no budget: give a size"),
        ({"size": 2, "oracle": "lazy"}, "no oracle 'lazy'"),
        ({"size": 2, "oracle": "feature-space"}, "needs kernel='cosine'"),
        ({"size": 2, "owned": [3, 99]}, "ids in owned are no rows'"),
        ({"size": 2, "owned": np.eye(4)}, "have 4 dimensions and the candidates 3"),
        ({"size": 2, "exclude": range(10)}, "nothing to pick from"),
    ],
)
def test_a_mistake_is_refused(arguments: dict, words: str) -> None:
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
