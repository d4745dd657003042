from __future__ import annotations

from typing import Any, get_args

import numpy as np
import pytest

from raydpp.dpp import BaselineName, baselines
from raydpp.dpp.baselines import baseline
from raydpp.dpp.features import unit_rows
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.errors import UserError

ALL: tuple[BaselineName, ...] = get_args(BaselineName)


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


@pytest.mark.parametrize("method", ALL)
def test_gains_are_those_of_the_picks(method: BaselineName) -> None:
    x = sphere(80, 6)
    numbers = np.arange(80.0) % 7
    found = baseline(method, x, 12, quality=numbers, lengths=numbers, targets=sphere(5, 6, 1), gamma=0.5)
    matrix = Kernel("rbf", 0.5).matrix(unit_rows(x)).numpy()
    assert len(set(found.indices.tolist())) == 12
    assert found.log_det == pytest.approx(np.linalg.slogdet(matrix[np.ix_(found.indices, found.indices)])[1])
    if method != "k-center":  # which is diverse too, and may be lucky
        assert found.log_det < greedy_map(x, 12, gamma=0.5).log_det
    assert found.oracle == method


@pytest.mark.parametrize("method", ALL)
def test_the_order_of_rows_does_not_matter(method: BaselineName) -> None:
    x = sphere(90, 5)
    ids = np.array([f"{i:03d}" for i in range(90)])
    numbers = np.arange(90.0) % 4
    picked = []
    for order in (np.arange(90), np.random.default_rng(1).permutation(90)):
        given: dict[str, Any] = {"ids": ids[order], "quality": numbers[order], "lengths": numbers[order]}
        found = baseline(method, x[order], 9, **given, threshold=0.8, targets=sphere(4, 5, 2))
        picked.append(ids[order][found.indices].tolist())
    assert picked[0] == picked[1]


@pytest.mark.parametrize("method", [name for name in ALL if name != "k-means"])
def test_budgets_quotas_and_excludes_hold(method: BaselineName) -> None:
    x, costs = sphere(60, 8), 1.0 + np.arange(60) % 9
    given: dict[str, Any] = {"quality": costs, "lengths": costs, "exclude": [3, 4, 5], "targets": sphere(3, 8, 1)}
    found = baseline(method, x, tokens=50, costs=costs, **given)
    assert 41 < costs[found.indices].sum() <= 50
    assert not set(found.indices.tolist()) & {3, 4, 5}
    sources = np.array(list("abc") * 20)
    found = baseline(method, x, 0.25, sources=sources, minimum={"a": 7}, maximum={"b": 2}, **given)
    counts = {s: int((sources[found.indices] == s).sum()) for s in "abc"}
    assert sum(counts.values()) == 15
    assert counts["a"] >= 7
    assert counts["b"] <= 2


def test_random_goes_by_its_seed_and_reaches_everyone() -> None:
    x = sphere(30, 4)
    first = [tuple(baseline("random", x, 5, seed=seed).indices.tolist()) for seed in range(60)]
    assert first[0] == tuple(baseline("random", x, 5, seed=0).indices.tolist())
    assert len(set(first)) > 50
    assert {pick for picks in first for pick in picks} == set(range(30))


def test_the_best_and_the_longest_come_first_and_ties_go_by_id() -> None:
    x, numbers = sphere(6, 4), [1.0, 5.0, 3.0, 5.0, 0.0, 9.0]
    assert baseline("quality", x, 4, quality=numbers).indices.tolist() == [5, 1, 3, 2]
    assert baseline("length", x, 4, lengths=numbers, ids=list("fedcba")).indices.tolist() == [5, 3, 1, 2]


def test_k_center_takes_the_farthest_row_each_time() -> None:
    x = sphere(70, 4)
    picks = [0]
    while len(picks) < 20:
        distance = np.linalg.norm(x[:, None] - x[picks], axis=2).min(axis=1)
        picks.append(int(distance.argmax()))
    assert baseline("k-center", x, 20).indices.tolist() == picks


def test_k_means_takes_the_row_nearest_to_each_center() -> None:
    centers = np.eye(5)
    random = np.random.default_rng(0)
    labels = np.repeat(np.arange(5), [30, 25, 20, 15, 10])
    x = centers[labels] + 0.02 * random.standard_normal((100, 5))
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    for seed in range(20):  # a bad start of k-means can merge two clusters
        found = baseline("k-means", x, 5, seed=seed)
        if sorted(labels[found.indices]) == [0, 1, 2, 3, 4]:
            break
    assert labels[found.indices].tolist() == [0, 1, 2, 3, 4]  # the largest first
    for cluster, pick in enumerate(found.indices):
        members = np.flatnonzero(labels == cluster)
        middle = x[members].mean(axis=0)
        assert pick == members[np.linalg.norm(x[members] - middle, axis=1).argmin()]


@pytest.mark.parametrize("rows", [60, 700])  # less and more than what is brought up to date together
def test_facility_location_takes_what_covers_most_each_time(rows: int) -> None:
    x = sphere(rows, 5)
    similarity = np.maximum(x @ x.T, 0)
    covered, picks = np.zeros(rows), []
    for _ in range(25):
        gains = np.maximum(similarity - covered[:, None], 0).sum(axis=0)
        picks.append(int(np.flatnonzero(gains > gains.max() - 1e-6)[0]))  # pairs that cover one another tie
        covered = np.maximum(covered, similarity[:, picks[-1]])
    assert baseline("facility-location", x, 25).indices.tolist() == picks


def test_facility_location_refuses_more_rows_than_its_matrix_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST_COVERED", 50)
    assert len(baseline("facility-location", sphere(50, 4), 3).indices) == 3
    with pytest.raises(UserError, match=r"51 x 51 numbers.*at most 50"):
        baseline("facility-location", sphere(51, 4), 3)


@pytest.mark.parametrize("threshold", [0.3, 0.7])
def test_dedup_keeps_a_row_unless_one_like_it_is_kept(threshold: float) -> None:
    x = sphere(2500, 6)  # more than one block
    numbers = np.random.default_rng(0).permutation(2500).astype(float)
    found = baseline("dedup", x, 2500, quality=numbers, threshold=threshold)
    similarity = x @ x.T
    kept: list[int] = []
    for row in np.argsort(-numbers).tolist():
        if not kept or similarity[row, kept].max() < threshold:
            kept.append(row)
    assert found.indices.tolist() == kept
    assert found.stopped == (
        f"stopped at pick {len(kept) + 1} of 2500: all that is left is as near as {threshold:g} to a pick"
    )


def in_turns(scores: np.ndarray, count: int, picks: list[int]) -> list[int]:
    """RDS+'s selection by (turns, N) scores, after these picks."""
    for turn in range(count):
        left = np.setdiff1d(np.arange(scores.shape[1]), picks)
        picks = [*picks, int(left[scores[turn % len(scores), left].argmax()])]
    return picks


@pytest.mark.parametrize("rows", [60, 1100])  # less and more than one block
@pytest.mark.parametrize("tasks", [1, 3])
def test_round_robin_takes_the_nearest_that_is_left_for_each_in_turn(rows: int, tasks: int) -> None:
    x, given = sphere(rows, 5), [sphere(size, 5, size) for size in (7, 1, 4)[:tasks]]
    targets: Any = given[0] if tasks == 1 else given
    scores = given[0] @ x.T if tasks == 1 else np.array([(one @ x.T).max(0) for one in given])
    found = baseline("round-robin", x, 40, targets=targets)
    assert found.indices.tolist() == in_turns(scores, 40, [])
    assert found.indices.tolist() != np.argsort(-scores.max(0))[:40].tolist()
    assert baseline("round-robin", x, rows, targets=targets).stopped is None  # all of them
    whole = np.round(127 * x / np.abs(x).max(1, keepdims=True)).astype(np.int8)
    rounded = whole / np.linalg.norm(whole, axis=1, keepdims=True)
    near = given[0] @ rounded.T
    assert baseline("round-robin", whole, 20, targets=given[0]).indices.tolist() == in_turns(near, 20, [])


def test_round_robin_passes_over_what_may_not_be_picked() -> None:
    x, targets, sources = sphere(60, 5), sphere(4, 5, 1), np.array(list("ab") * 30)
    scores, shut = targets @ x.T, [0, 7, 9, 30]
    found = baseline("round-robin", x, 30, targets=targets, exclude=shut)
    assert found.indices.tolist() == in_turns(scores, 30, shut)[4:]
    found = baseline("round-robin", x, 60, targets=targets, sources=sources, maximum={"a": 0})
    assert found.indices.tolist() == in_turns(scores, 30, np.flatnonzero(sources == "a").tolist())[30:]
    assert found.stopped == "stopped at pick 31 of 60: the maxima of the sources leave nothing to pick"
    copies = np.tile(x[:3], (4, 1))
    ids = np.random.default_rng(0).permutation(12)
    found = baseline("round-robin", copies, 2, targets=copies[:2], ids=ids)
    assert ids[found.indices].tolist() == [ids[0::3].min(), ids[1::3].min()]  # ties go by id


def test_round_robin_refuses_more_cosines_than_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(baselines, "MOST_COVERED", 10)
    assert len(baseline("round-robin", sphere(25, 4), 3, targets=sphere(4, 4)).indices) == 3
    assert len(baseline("round-robin", sphere(25, 4), 3, targets=[sphere(4, 4), sphere(9, 4)]).indices) == 3
    with pytest.raises(UserError, match=r"5 x 25 numbers, at most 100: give fewer targets"):
        baseline("round-robin", sphere(25, 4), 3, targets=sphere(5, 4))


def test_copies_end_a_run() -> None:
    x = np.tile(sphere(5, 8), (3, 1))
    for method, words in (
        ("k-center", "copies of picks"),
        ("k-means", "no more clusters"),
        ("dedup", "as near as"),
        ("facility-location", "copies of picks"),
    ):
        found = baseline(method, x, 12)  # type: ignore[arg-type]
        assert len(found.indices) == 5
        assert found.stopped is not None
        assert "stopped at pick 6 of 12" in found.stopped
        assert words in found.stopped


def test_progress_gets_every_pick() -> None:
    for method in ALL:
        seen: list[tuple[int, float]] = []
        numbers = np.arange(30.0)
        report = lambda count, gain, to=seen: to.append((count, gain))  # noqa: E731
        given: dict[str, Any] = {"quality": numbers, "lengths": numbers, "targets": sphere(3, 5, 1)}
        baseline(method, sphere(30, 5), 7, **given, progress=report)
        assert [count for count, _ in seen] == list(range(1, 8))


@pytest.mark.parametrize(
    ("method", "arguments", "words"),
    [
        ("best", {"size": 2}, "no baseline 'best': use one of random"),
        ("random", {}, "no budget"),
        ("quality", {"size": 2}, "needs quality scores"),
        ("length", {"size": 2}, "needs lengths"),
        ("k-means", {"tokens": 5, "costs": [1.0] * 9}, "neither tokens nor quotas"),
        ("dedup", {"size": 2, "threshold": 1.5}, "threshold is 1.5"),
        ("random", {"size": 10}, "larger than the pool of 9"),
        ("round-robin", {"size": 2}, "give targets"),
        ("round-robin", {"size": 2, "targets": []}, "give targets"),
        ("round-robin", {"size": 2, "targets": np.eye(3)}, "targets have 3 dimensions and the rows 4"),
        ("round-robin", {"size": 2, "targets": [np.eye(4), 2 * np.eye(4)]}, "without unit norm"),
    ],
)
def test_a_mistake_is_refused(method: Any, arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        baseline(method, sphere(9, 4), **arguments)
