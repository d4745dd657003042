"""ShardedGreedy over shards make the picks of one machine, one by one, whatever becomes of the shards."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raydpp.dpp.budget import Budget, BudgetState
from raydpp.dpp.features import Items, UnitRows
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.objective import Objective
from raydpp.dpp.oracles import cholesky, factor, feature_space
from raydpp.dpp.oracles.bounds import Exact
from raydpp.dpp.oracles.choice import OracleName
from raydpp.dpp.oracles.cholesky import CholeskyOracle
from raydpp.dpp.oracles.feature_space import FeatureSpaceOracle
from raydpp.dpp.oracles.working_set import WorkingSet
from raydpp.dpp.sharded import coordinator as rounds_module
from raydpp.dpp.sharded import shard as shard_module
from raydpp.dpp.sharded.coordinator import CandidateCache, ShardedGreedy
from raydpp.dpp.sharded.messages import Candidates, RestSummary, RoundUpdate
from raydpp.dpp.sharded.shard import Shard
from raydpp.errors import UserError

REAL = Path(__file__).parents[4] / "shared/features/minilm_32k.parquet"


def sphere(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return points / np.linalg.norm(points, axis=1, keepdims=True)


def axes(rows: int, dimension: int, seed: int) -> np.ndarray:
    """Unit vectors of the axes: whole classes of rows tie at every pick."""
    return np.eye(dimension)[np.random.default_rng(seed).integers(0, dimension, rows)]


def one_row(rows: int, dimension: int, seed: int) -> np.ndarray:
    return np.repeat(sphere(1, dimension, seed), rows, axis=0)


@contextmanager
def small() -> Iterator[None]:
    """Panels, pools, working sets and summaries so small that little data goes through all of their turns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(factor, "WIDTH", 8)
        patch.setattr(cholesky, "WIDTH", 8)
        patch.setattr(cholesky, "TILE", 3)
        patch.setattr(feature_space, "_COPIED", 0.8)
        patch.setattr(shard_module, "_SUMMARY_SIZE", 3)
        for oracle in (CholeskyOracle, FeatureSpaceOracle):
            patch.setattr(oracle, "working_set_size", 5)
            patch.setattr(oracle, "min_candidates", 2)
            patch.setattr(oracle, "lookahead", 3)
        yield


def sent(thing: Any) -> Any:
    """What arrives where something is sent: a copy, whose arrays cannot be written to."""
    return frozen(pickle.loads(pickle.dumps(thing)))


def frozen(thing: Any) -> Any:
    if isinstance(thing, np.ndarray):
        thing.flags.writeable = False
    elif is_dataclass(thing):
        for one in fields(thing):
            frozen(getattr(thing, one.name))
    return thing


class Local:
    """Shards in this process; ``mishap`` may do something to one, by its number, before it is asked."""

    def __init__(self, makers: Sequence[Callable[[], Shard]], mishap: Callable[[Local, int], bool] | None = None):
        self.makers = makers
        self.shards = [make() for make in makers]
        self._mishap = mishap
        self.resent = 0
        self.sent: list[int] = []  # how many picks, in each round
        self.answers: list[Candidates] = []

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def available(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for one in self.shards:
            for source, count in one.available.items():
                found[source] = found.get(source, 0) + count
        return found

    def restart(self, i: int) -> None:
        self.shards[i] = self.makers[i]()

    def advance(self, update: RoundUpdate, own: Mapping[int, Exact]) -> dict[int, Candidates | None]:
        answers = {}
        self.sent.append(len(update.features))
        for i, exact in own.items():
            if self._mishap is not None and self._mishap(self, i):
                self.shards[i].advance(sent(update), sent(exact))  # the reply is lost
            answer = answers[i] = sent(self.shards[i].advance(sent(update), sent(exact)))
            self.resent += answer is None
            self.answers += [] if answer is None else [answer]
        return answers

    def find(self, ids: Sequence[str]) -> list[Candidates]:
        return [sent(one.find(list(ids))) for one in self.shards]


def accidents(seed: int) -> Callable[[Local, int], bool]:
    """Every fifth time a shard is restarted; every fifth time its reply is lost, and it may be restarted then."""
    random = np.random.default_rng(seed)

    def mishap(shards: Local, i: int) -> bool:
        what = random.integers(10)
        if what < 2:
            shards.restart(i)
        return bool(1 <= what < 4)

    return mishap


@dataclass(frozen=True, eq=False)
class Problem:
    """Rows in shards and what to pick: ``options`` are those of ``greedy_map``."""

    x: np.ndarray
    kernel: Kernel
    size: int | None
    shards: int = 1
    oracle: OracleName = "cholesky"
    seed: int = 0
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def ids(self) -> list[str]:
        return [f"{name:x}" for name in np.random.default_rng(self.seed).permutation(5 * len(self.x))[: len(self.x)]]

    @property
    def owned(self) -> Any:
        return self.options.get("owned")

    def alone(self) -> Selection:
        """On one machine."""
        kernel = self.kernel
        return greedy_map(
            self.x,
            self.size,
            kernel=kernel.name,
            gamma=kernel.gamma,
            ridge=kernel.ridge,
            ids=self.ids,
            oracle="textbook",
            **self.options,
        )

    @property
    def parts(self) -> list[np.ndarray]:
        place = np.random.default_rng([self.seed, 1]).integers(0, self.shards, len(self.x))
        return [part for i in range(self.shards) if len(part := np.flatnonzero(place == i))]

    @property
    def most(self) -> int:
        return (self.size or len(self.x)) + (0 if self.owned is None else len(self.owned))

    def items(self, part: np.ndarray) -> Items:
        options, ids, n = self.options, self.ids, len(self.x)
        costs, sources = options.get("costs"), options.get("sources")
        excluded = [row for row, i in enumerate(part) if ids[i] in options.get("exclude", ())]
        return Items(
            self.x[part],
            [ids[i] for i in part],
            self.objective.modular(n, options.get("quality"), costs)[part],
            None if costs is None else costs[part],
            None if sources is None else sources[part],
            np.array(excluded, dtype=np.int64),
        )

    def maker(self, part: np.ndarray) -> Callable[[], Shard]:
        return lambda: Shard(self.items(part), self.objective, self.oracle, self.most)

    @property
    def objective(self) -> Objective:
        return Objective(self.kernel, self.options.get("quality_weight", 0.0))

    def local(self, mishap: Callable[[Local, int], bool] | None = None) -> Local:
        return Local([self.maker(part) for part in self.parts], mishap)

    def search(self, shards: Local) -> ShardedGreedy:
        names = ("size", "tokens", "minimum", "maximum", "min_log_gain")
        given = {"size": self.size, **self.options}
        budget = Budget(**{name: given[name] for name in names if name in given})
        found = ShardedGreedy(shards, self.objective, self.oracle, self.most, budget, len(self.x), shards.available)
        if self.owned is not None:
            found.condition_on(self.owned)
        return found


def plain(stopped: str | None) -> str | None:
    """Without the largest residual left: where it is at or below the floor it is rounding."""
    return stopped and re.sub(r"variance [-+.e\d]+", "variance", stopped)


def same(problem: Problem, found: ShardedGreedy, stopped: str | None, expected: Selection) -> None:
    ids = problem.ids
    assert found.ids == [ids[i] for i in expected.indices]
    residuals = np.exp(expected.log_gains)
    rounding = 1e-6 + 1e-15 / np.minimum.accumulate(residuals) / residuals  # what small pivots make of 1e-16
    assert (np.abs(found.picks.log_gains - expected.log_gains) <= rounding).all()
    assert plain(stopped) == plain(expected.stopped)
    parts = problem.parts
    assert [ids[parts[i][row]] for i, row in found.where] == found.ids


def agree(problem: Problem, mishap: Callable[[Local, int], bool] | None = None) -> ShardedGreedy:
    found = problem.search(problem.local(mishap))
    stopped = found.run()
    same(problem, found, stopped, problem.alone())
    return found


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Features with copies, near copies and rows that tie, over shards; a kernel; a budget of any kind; weights."""
    seed = draw(st.integers(0, 2**32 - 1))
    random = np.random.default_rng(seed)
    dimension = draw(st.sampled_from([2, 3, 8, 24]))
    x = draw(st.sampled_from([sphere, sphere, axes, one_row]))(draw(st.integers(2, 60)), dimension, seed)
    near = x[random.integers(0, len(x), draw(st.integers(0, 12)))]
    near = near + draw(st.sampled_from([0.0, 1e-7, 1e-4, 1e-2])) * random.standard_normal(near.shape)
    x = np.concatenate([x, near / np.linalg.norm(near, axis=1, keepdims=True)])
    x = np.concatenate([x, x[random.integers(0, len(x), draw(st.integers(0, 12)))]])
    x = np.concatenate([x, np.repeat(x[:1], draw(st.sampled_from([0, 0, 20])), axis=0)])
    kernels = [
        *(Kernel("rbf", gamma) for gamma in (0.05, 0.3, 1.0, 4.0, 20.0)),
        *(Kernel("rbf", 1.0, ridge) for ridge in (1e-3, 0.3)),
        *(Kernel("cosine", ridge=ridge) for ridge in (1e-3, 0.1, 1.0)),
    ]
    kernel = draw(st.sampled_from(kernels))
    oracle: OracleName = "feature-space" if kernel.name == "cosine" and draw(st.booleans()) else "cholesky"
    size: int | None = draw(st.integers(1, len(x)))
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        options["quality_weight"] = draw(st.sampled_from([0.1, 0.5, 0.95]))
        options["quality"] = random.integers(0, 3, len(x)).astype(float)
    if draw(st.booleans()):
        options["owned"] = draw(st.sampled_from([x, sphere(9, dimension, 7)]))[: draw(st.integers(1, 9))]
    ids = Problem(x, kernel, size, seed=seed).ids
    if draw(st.booleans()):
        options["exclude"] = [ids[i] for i in random.permutation(len(x))[: draw(st.integers(1, len(x) - 1))]]
    if draw(st.integers(0, 3)) == 0:
        options["min_log_gain"] = draw(st.sampled_from([-0.05, -1.0, -5.0]))
    limit = draw(st.sampled_from(["size", "tokens", "quotas"]))
    if limit == "tokens":
        options["costs"] = random.integers(1, 9, len(x)).astype(float)
        options["tokens"] = draw(st.floats(0.5, 3.0 * len(x)))
        size = size if draw(st.booleans()) else None
    if limit == "quotas" and size is not None:
        sources = options["sources"] = random.choice(["a", "b", "c"], len(x))
        blocked = np.isin(ids, options.get("exclude", []))
        room = size
        options["minimum"], options["maximum"] = {}, {}
        for source in np.unique(sources).tolist():
            count = int(((sources == source) & ~blocked).sum())
            options["minimum"][source] = draw(st.integers(0, min(room, count)))
            room -= options["minimum"][source]
            if draw(st.booleans()):
                options["maximum"][source] = draw(st.integers(options["minimum"][source], count))
    return Problem(x, kernel, size, draw(st.sampled_from([1, 2, 5, 16])), oracle, seed, options)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_rounds_make_the_picks_of_one_machine(problem: Problem) -> None:
    agree(problem)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(problem=problems())
def test_so_do_those_that_see_little_at_a_time(problem: Problem) -> None:
    with small():
        agree(problem)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(problem=problems(), seed=st.integers(0, 99))
def test_so_do_shards_that_are_restarted_or_whose_replies_are_lost(problem: Problem, seed: int) -> None:
    with small():
        agree(problem, accidents(seed))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems(), seed=st.integers(0, 99), data=st.data())
def test_a_search_goes_on_behind_the_picks_of_an_earlier_one(problem: Problem, seed: int, data: st.DataObject) -> None:
    expected = problem.alone()
    count = data.draw(st.integers(0, len(expected.indices)))
    ids = problem.ids
    with small():
        found = problem.search(problem.local(accidents(seed)))
        found.resume_from([ids[i] for i in expected.indices[:count]], expected.log_gains[:count].tolist())
        assert len(found.where) == count
        same(problem, found, found.run(), expected)


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("cosine")], ids=["rbf", "cosine"])
@pytest.mark.parametrize("owned", [False, True])
def test_it_goes_on_behind_whole_panels_of_picks(kernel: Kernel, owned: bool) -> None:
    """At first nobody has anything up to date to send."""
    options = {"owned": sphere(5, 12, 9)} if owned else {}
    problem = Problem(sphere(900, 12), kernel, 330, 2, options=options)
    expected, ids = problem.alone(), problem.ids
    local = problem.local()
    found = problem.search(local)
    found.resume_from([ids[i] for i in expected.indices[:300]], expected.log_gains[:300].tolist())
    same(problem, found, found.run(), expected)
    assert local.sent[0] == 300 + (5 if owned else 0)
    assert found.rounds < 60


def test_a_pick_to_go_on_from_that_no_shard_has_is_named() -> None:
    problem = Problem(sphere(9, 3), Kernel(), 3)
    with pytest.raises(UserError, match="the pick nobody of the run to go on with is in no shard"):
        problem.search(problem.local()).resume_from([problem.ids[2], "nobody"], [0.0, -1.0])


@pytest.mark.parametrize("kernel", [Kernel("rbf", 0.2), Kernel("rbf", 2.0), Kernel("cosine")], ids=str)
@pytest.mark.parametrize("shards", [1, 16])
def test_so_do_pools_and_panels_of_the_usual_size(kernel: Kernel, shards: int) -> None:
    x = sphere(2000, 48, 1)
    x[1500:1700] = x[:200]
    oracle: OracleName = "cholesky" if kernel.name == "rbf" else "feature-space"
    agree(Problem(x, kernel, 600, shards, oracle))


def test_of_copies_in_all_shards_one_is_picked_and_the_search_says_why_it_ends() -> None:
    problem = Problem(np.tile(sphere(40, 8), (12, 1)), Kernel(), 100, 5)
    found = problem.search(problem.local())
    stopped = found.run()
    assert len(found.ids) == 40
    assert stopped is not None
    assert "stopped at pick 41 of 100: numerically rank-deficient, as nothing that is left adds to the picks" in stopped
    same(problem, found, stopped, problem.alone())


def test_the_search_ends_where_the_rank_is_used_up() -> None:
    x = np.zeros((60, 9))
    x[:, :4] = sphere(60, 4)
    problem = Problem(x, Kernel("cosine", ridge=0.0), 8, 3)
    found = problem.search(problem.local())
    stopped = found.run()
    assert len(found.ids) == 4
    assert stopped is not None
    assert "numerically rank-deficient" in stopped
    same(problem, found, stopped, problem.alone())


def test_a_budget_that_is_used_up_is_no_reason_to_tell() -> None:
    costs = np.full(30, 3.0)
    problem = Problem(sphere(30, 5), Kernel(), None, 3, options={"tokens": 10.0, "costs": costs})
    found = problem.search(problem.local())
    assert found.run() is None
    assert len(found.ids) == 3


def test_maxima_that_leave_nothing_are_named() -> None:
    sources = np.array(list("aab") * 10)
    options = {"sources": sources, "maximum": {"*": 3}}
    problem = Problem(sphere(30, 6), Kernel(), 12, 4, options=options)
    found = problem.search(problem.local())
    assert found.run() == "stopped at pick 7 of 12: the maxima of the sources leave nothing to pick"


def test_one_that_was_restarted_gets_the_whole_history_and_only_that_one() -> None:
    problem = Problem(sphere(200, 6), Kernel(), 60, 4, options={"owned": sphere(7, 6, 3)})
    calls = []

    def mishap(shards: Local, i: int) -> bool:
        calls.append(i)
        if i == 2 and calls.count(2) in (3, 4, 9):
            shards.restart(2)
        return False

    with small():
        local = problem.local(mishap)
        found = problem.search(local)
        same(problem, found, found.run(), problem.alone())
    assert local.resent == 2  # once it was restarted even before it got the history
    assert calls.count(2) == calls.count(0) + 2
    assert local.shards[2].picks == local.shards[0].picks


def test_one_that_restarts_again_and_again_ends_the_search() -> None:
    class Restarted(Shard):
        def advance(self, update: RoundUpdate, own: Exact) -> Candidates | None:
            return None if update.number > 2 else super().advance(update, own)

    problem = Problem(sphere(200, 6), Kernel(), 60, 2)
    first, second = problem.parts
    with small():
        restarted = Restarted(problem.items(second), problem.objective, "cholesky", 60)
        found = problem.search(Local([problem.maker(first), lambda: restarted]))
        with pytest.raises(RuntimeError, match="shard 1 does not follow"):
            found.run()
    assert 0 < len(found.ids) < 60
    assert found.ids == [problem.ids[i] for i in problem.alone().indices[: len(found.ids)]]


@pytest.mark.parametrize("candidates", [np.float16, np.float32])
@pytest.mark.parametrize("owned", [np.float16, np.float32])
def test_what_is_owned_counts_as_if_it_were_stored_as_the_candidates_are(candidates: type, owned: type) -> None:
    x: np.ndarray = sphere(200, 24, 1).astype(candidates)
    have: np.ndarray = sphere(30, 24, 5).astype(owned)
    problem = Problem(x, Kernel(), 80, 3, options={"owned": have})
    found = agree(problem)
    np.testing.assert_allclose(found.picks.log_gains, problem.alone().log_gains, atol=1e-12)


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("cosine")], ids=["rbf", "cosine"])
def test_whole_numbers_are_searched_and_sent_as_they_are_stored(kernel: Kernel) -> None:
    x, have = (np.rint(10 * sphere(rows, 24, rows)).astype(np.int8) for rows in (200, 30))
    problem = Problem(x, kernel, 80, 3, options={"owned": have})
    found = agree(problem)
    np.testing.assert_allclose(found.picks.log_gains, problem.alone().log_gains, atol=1e-12)
    with pytest.raises(UserError, match="only some are whole numbers"):
        agree(Problem(x, kernel, 10, 3, options={"owned": sphere(5, 24)}))


def test_progress_gets_every_pick_and_the_search_ends_before_one_that_adds_too_little() -> None:
    seen: list[tuple[int, float]] = []
    problem = Problem(sphere(60, 6), Kernel(), 30, 3, options={"min_log_gain": -0.5})
    found = problem.search(problem.local())
    stopped = found.run(lambda count, gain: seen.append((count, gain)))
    assert seen == list(enumerate(found.picks.log_gains, start=1))
    assert stopped is not None
    assert f"stopped at pick {len(seen) + 1}: the next example adds" in stopped
    whole = Problem(sphere(60, 6), Kernel(), 30).alone()
    assert found.ids == [problem.ids[i] for i in whole.indices[: int((whole.log_gains >= -0.5).argmin())]]


@pytest.mark.parametrize("kernel", [Kernel("rbf"), Kernel("cosine")], ids=["rbf", "cosine"])
@pytest.mark.parametrize("oracle", ["cholesky", "feature-space"])
def test_more_shards_need_few_rounds_more_and_send_few_items_more(kernel: Kernel, oracle: OracleName) -> None:
    if kernel.name == "rbf" and oracle == "feature-space":
        return
    rounds, items = {}, {}
    for shards in (1, 16):
        problem = Problem(sphere(2000, 24, 1), kernel, 300, shards, oracle)
        local = problem.local()
        found = problem.search(local)
        assert found.run() is None
        rounds[shards] = found.rounds
        items[shards] = sum(len(one.new) for one in local.answers)
        assert all(len(one.new) == len(one.features) == len(one.ids) for one in local.answers)
    assert 0 < rounds[1] < 60
    assert rounds[16] <= 1.5 * rounds[1]
    assert items[16] <= 1.5 * items[1]
    assert items[16] < 2000


@pytest.mark.parametrize("kernel", [Kernel("rbf", ridge=0.3), Kernel("cosine")], ids=["rbf", "cosine"])
@pytest.mark.parametrize("shards", [1, 16])
def test_a_search_over_copies_of_one_row_does_not_stall(kernel: Kernel, shards: int) -> None:
    problem = Problem(np.repeat(sphere(1, 8), 3000, axis=0), kernel, 50, shards)
    found = problem.search(problem.local())
    assert found.run() is None
    assert found.ids == sorted(problem.ids)[:50]
    assert found.rounds < 12


@pytest.mark.parametrize("shards", [1, 4])
def test_nor_does_one_over_more_copies_than_are_ever_solved_together(
    shards: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds_module, "_LARGEST", 60)
    solved: list[int] = []
    commit = ShardedGreedy.commit

    def counted(self: ShardedGreedy, working_set: WorkingSet) -> None:
        solved.append(len(working_set.rows))
        commit(self, working_set)

    monkeypatch.setattr(ShardedGreedy, "commit", counted)
    problem = Problem(np.repeat(sphere(1, 8), 300, axis=0), Kernel("cosine"), 12, shards)
    with small():
        found = agree(problem)
    assert found.rounds < 12 * 12
    assert 40 < max(solved) <= 60


@pytest.mark.parametrize("shards", [1, 16])
def test_nor_does_one_where_what_is_left_is_far_below_the_picks(shards: int) -> None:
    """A few axes and many near copies of them: what the next picks reach falls by far more than it did."""
    x = np.repeat(np.eye(8), 40, axis=0)
    x = x + 1e-3 * np.random.default_rng(0).standard_normal(x.shape)
    problem = Problem(x / np.linalg.norm(x, axis=1, keepdims=True), Kernel("rbf", 5.0), 60, shards)
    with small():
        assert agree(problem).rounds < 150


@pytest.fixture(scope="module")
def real() -> np.ndarray:
    if not REAL.exists():
        pytest.skip("the sentence embeddings are not here")
    column = pq.read_table(REAL, columns=["embedding"])["embedding"].slice(0, 4000).combine_chunks()
    x = column.flatten().to_numpy().reshape(len(column), -1)  # (4000, D) float16
    return np.concatenate([x, x[np.random.default_rng(0).permutation(4000)[:200]]])


@pytest.mark.parametrize(("kernel", "oracle"), [(Kernel("rbf"), "cholesky"), (Kernel("cosine"), "feature-space")])
def test_rounds_make_the_picks_of_one_machine_on_real_features(
    real: np.ndarray, kernel: Kernel, oracle: OracleName
) -> None:
    expected = None
    for shards in (1, 2, 5, 16):
        problem = Problem(real, kernel, 300, shards, oracle)
        expected = expected or problem.alone()
        found = problem.search(problem.local())
        same(problem, found, found.run(), expected)
        assert found.rounds < 60


AXES = np.eye(5, dtype=np.float32)


def sending(rows: list[int], new: list[int], **other: Any) -> Candidates:
    """Of a shard whose rows are the axes, named by letters."""
    some = [rows[place] for place in new]
    return Candidates(
        np.array(rows, dtype=np.int64),
        RestSummary.empty(),
        1.0,
        np.array(new, dtype=np.int64),
        AXES[some],
        [other.get("names", "abcde")[row] for row in some],
        other.get("modular", np.zeros(5))[some],
        other.get("costs", np.full(5, np.inf))[some],
        [other.get("sources", [""] * 5)[row] for row in some],
    )


def account(**budget: Any) -> BudgetState:
    return Budget(4, **budget).streaming_state(10, {"x": 5, "y": 5})


def test_an_item_comes_once_however_often_it_is_sent() -> None:
    cache, state = CandidateCache(["x", "y"]), account()
    assert cache.add(0, sending([3, 1], [0, 1]), state).tolist() == [0, 1]
    assert cache.add(1, sending([1], [0], names="ABCDE"), state).tolist() == [2]
    again = cache.add(0, sending([1, 0, 3], [1]), state)  # only what is new comes with its features
    assert again.tolist() == [1, 3, 0]
    whole = cache.add(0, sending([0, 4, 3], [0, 1, 2]), state)  # a restarted shard does not know what it sent
    assert whole.tolist() == [3, 4, 0]
    assert cache.order.tolist() == ["d", "b", "B", "a", "e"]
    assert cache.origin == [(0, 3), (0, 1), (1, 1), (0, 0), (0, 4)]
    np.testing.assert_array_equal(cache.rows.take().numpy(), AXES[[3, 1, 1, 0, 4]])
    assert state.eligible.tolist() == [True] * 5


def test_an_id_of_two_shards_is_refused() -> None:
    cache, state = CandidateCache([""]), account()
    cache.add(0, sending([3, 1], [0, 1]), state)
    with pytest.raises(UserError, match="the id b is in two partitions"):
        cache.add(1, sending([1], [0]), state)


def test_nothing_may_come() -> None:
    cache, state = CandidateCache([""]), account()
    assert cache.add(0, sending([], []), state).tolist() == []
    with pytest.raises(RuntimeError, match="no item was sent"):
        _ = cache.rows
    assert len(cache.stored(np.empty(0, dtype=np.int64))) == 0


def test_the_budget_takes_costs_and_sources_into_account() -> None:
    cache = CandidateCache(["x", "y"])
    state = Budget(4, tokens=10.0, maximum={"y": 1}).streaming_state(10, {"x": 5, "y": 5})
    costs, sources = np.array([1.0, 7.0, 2.0, 3.0, 4.0]), list("xyyxx")
    cache.add(0, sending([0, 1], [0, 1], costs=costs, sources=sources), state)
    cache.add(0, sending([0, 2, 4, 3], [1, 2, 3], costs=costs, sources=sources), state)
    state.spend(1)  # 3 tokens are left, and nothing of y
    assert state.eligible.tolist() == [True, False, False, False, True]


def test_what_is_owned_is_stored_first_and_cannot_be_picked() -> None:
    cache, state = CandidateCache([""]), account()
    cache.add_owned(UnitRows(AXES[2:4]), state)
    found = cache.add(0, sending([1], [0], modular=np.arange(5.0)), state)
    assert found.tolist() == [2]
    assert state.eligible.tolist() == [False, False, True]
    assert cache.modular.tolist() == [0.0, 0.0, 1.0]
    stored = cache.stored(np.array([2, 0]))
    assert stored.dtype == np.float32
    np.testing.assert_array_equal(stored, AXES[[1, 2]])


def test_exact_residuals_go_to_the_shards_that_items_are_from() -> None:
    cache, state = CandidateCache([""]), account()
    cache.add(0, sending([3, 1], [0, 1]), state)
    cache.add(2, sending([1], [0], names="ABCDE"), state)
    found = cache.by_shard([1, 2, 0], np.array([0.5, 0.0, 0.0]), [1, 2], 3)
    assert {shard: exact.rows.tolist() for shard, exact in found.items()} == {0: [1, 3], 1: [], 2: [1]}
    assert {shard: exact.picked for shard, exact in found.items()} == {0: [1], 1: [], 2: [0]}
    assert found[0].residuals.tolist() == [0.5, 0.0]
    assert found[1].rows.dtype == np.int64


def test_owned_features_of_another_kind_are_refused() -> None:
    cache, state = CandidateCache([""]), account()
    cache.add_owned(UnitRows(np.eye(3)), state)
    cache.add(0, sending([1], [0]), state)
    with pytest.raises(UserError, match="features of the same kind"):
        cache.stored(np.array([1]))
