from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp import runs
from raydpp.cli import main
from raydpp.cluster import Here, OnRay
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective, Score
from raydpp.errors import UserError
from raydpp.select import exact as stage
from raydpp.select import shard_actors
from raydpp.select.cut import cut
from raydpp.select.exact import exact_greedy
from raydpp.select.inputs import quality_scales
from raydpp.select.request import Request, parse_score
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import (
    Part,
    gradient_schema,
    open_table,
    parquet_at,
    read_columns,
    vector_array,
    vectors,
    write_table,
)
from tests.faults import faulty_shard
from tests.select.spread import DIMENSION, job_of, make_table, whole

HERE = Path(__file__).parent
SIZE = 150


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_table(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="module")
def expected(table: str) -> tuple[list[str], np.ndarray]:
    """The ids and gains of an undisturbed search with the rbf kernel, by ``greedy_map``."""
    rows, selection = whole(table, Request(Budget(SIZE), Objective(Kernel())))
    return rows["id"].to_pylist(), selection.log_gains


@pytest.mark.parametrize(
    ("count", "kernel", "what"),
    [
        (1, "rbf", ""),
        (2, "rbf", "quality"),
        (5, "rbf", ""),
        (5, "rbf", "quality owned exclude quotas"),
        (2, "rbf", "tokens exclude"),
        (1, "cosine", "quality owned exclude quotas"),
        (2, "cosine", "quotas"),
        (5, "cosine", ""),
        (5, "cosine", "owned exclude"),
    ],
)
def test_the_picks_are_those_of_greedy_over_the_whole_table(
    here: None, table: str, tmp_path: Path, count: int, kernel: Any, what: str
) -> None:
    options: dict[str, Any] = {"size": SIZE}
    scales: tuple[Score, ...] = ()
    weight = 0.0
    owned = exclude = None
    if "quality" in what:
        scales = quality_scales(
            Here(), open_table(table, "gradient"), (parse_score("loss=-1"), parse_score("prompt_tokens=2"))
        )
        weight = 0.3
    if "quotas" in what:
        options |= {"minimum": {"first": 60}, "maximum": {"second": 20}}
    if "tokens" in what:
        options |= {"size": None, "tokens": 900}
    if "owned" in what:
        points = np.random.default_rng(1).normal(size=(40, DIMENSION))
        owned = vectors(pa.chunked_array([vector_array(points, pa.int8())]))
    if "exclude" in what:
        plain, _ = whole(table, Request(Budget(**options), Objective(Kernel(kernel), weight), quality=scales), owned)
        exclude = pa.array(plain["id"].to_pylist()[::3])
    request = Request(Budget(**options), Objective(Kernel(kernel), weight), quality=scales)

    job = job_of(table, count, request, owned=owned, exclude=exclude)
    picked = exact_greedy(job, Part(Folder.at(tmp_path), "picks.parquet"))
    rows, selection = whole(table, request, owned, exclude)
    assert len(rows) > 80
    assert picked.rows["id"].to_pylist() == rows["id"].to_pylist()
    assert picked.rows.column_names[:8] == gradient_schema(DIMENSION).names
    assert picked.rows.equals(rows.select(picked.rows.column_names))
    np.testing.assert_allclose(picked.selection.log_gains, selection.log_gains, rtol=1e-9, atol=1e-12)
    assert picked.selection.log_det == pytest.approx(selection.log_det)
    assert picked.selection.stopped == selection.stopped
    assert not picked.interrupted
    assert (picked.rounds or 0) > (2 if not what else 0)
    if "quotas" in what:
        sources = picked.rows["source"].to_pylist()
        assert sources.count("first") >= 60
        assert sources.count("second") <= 20


def test_a_search_that_ends_early_says_why_as_greedy_does(here: None, table: str, tmp_path: Path) -> None:
    for request in (
        Request(Budget(SIZE, min_log_gain=-0.4), Objective(Kernel())),
        Request(Budget(SIZE, maximum={"first": 10, "second": 10, "third": 10}), Objective(Kernel())),
    ):
        record = Part(Folder.at(tmp_path), f"{len(request.budget.maximum)}.parquet")
        picked = exact_greedy(job_of(table, 2, request), record)
        rows, selection = whole(table, request)
        assert picked.rows.equals(rows)
        assert 20 < len(rows) < SIZE
        assert picked.selection.stopped == selection.stopped
        assert picked.selection.stopped


@pytest.mark.parametrize(("count", "kernel", "deaths"), [(2, "rbf", 1), (3, "cosine", 3)])
def test_workers_killed_in_a_round_cost_nothing(
    cluster: None, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, kernel: Any, deaths: int
) -> None:
    log = tmp_path / "log"
    monkeypatch.setattr(shard_actors, "_ShardActor", faulty_shard(log, dies_in=3, deaths=deaths))
    request = Request(Budget(SIZE), Objective(Kernel(kernel)))
    exclude = pa.array(
        open_table(table, "gradient").read_columns([*open_table(table, "gradient").parts], ["id"])["id"][:9]
    )
    job = job_of(table, count, request, OnRay("select"), exclude=exclude)
    picked = exact_greedy(job, Part(Folder.at(tmp_path), "picks.parquet"))
    rows, selection = whole(table, request, exclude=exclude)
    assert picked.rows.equals(rows)
    np.testing.assert_allclose(picked.selection.log_gains, selection.log_gains, rtol=1e-9, atol=1e-12)
    assert (tmp_path / f"log.died{deaths - 1}").exists()
    processes = {tuple(line.split()[::2]) for line in log.read_text().splitlines()}
    assert len(processes) >= count + 1  # a shard and its process


DRIVER = """
import sys
from pathlib import Path
import ray
ray.init(address=sys.argv[1], runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2]}})
sys.path.insert(0, sys.argv[2])
from raydpp.select import exact, shard_actors
from raydpp.select.stage import select
from tests.faults import faulty_shard
exact.SAVE_EVERY = 0.0
shard_actors._ShardActor = faulty_shard(Path(sys.argv[3]), seconds=0.5)
select(sys.argv[4], sys.argv[5], int(sys.argv[6]), partitions=2, exact=True)
"""


def test_a_driver_killed_in_a_search_is_taken_up_behind_its_picks(
    cluster: None, table: str, expected: tuple[list[str], np.ndarray], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import ray

    out, said = tmp_path / "out", tmp_path / "stderr"
    address = ray.get_runtime_context().gcs_address
    arguments = [address, str(HERE.parents[1]), str(tmp_path / "log"), table, str(out), str(SIZE)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (
        said.open("w") as stream,
        subprocess.Popen([sys.executable, "-c", DRIVER, *arguments], stderr=stream, env=environment) as driver,
    ):
        until = time.monotonic() + 60
        while len(recorded(out)) < 20:
            assert driver.poll() is None, said.read_text()
            assert time.monotonic() < until
            time.sleep(0.05)
        driver.send_signal(signal.SIGKILL)
    done = recorded(out)
    assert 20 <= len(done) < SIZE
    assert done == expected[0][: len(done)]
    assert "constructor arguments" not in said.read_text()  # Ray, of what could be lost to an actor that starts anew
    assert not (out / "_SUCCESS").exists()
    for options in ({"size": SIZE - 1}, {"partitions": 3}, {"gamma": 2.0}, {"exact": False}):
        command: dict[str, Any] = {"size": SIZE, "partitions": 2, "exact": True, **options}
        with pytest.raises(UserError, match=f"holds another run: its {next(iter(options))} was"):
            select(table, str(out), **command)
    with caplog.at_level(logging.INFO, "raydpp"):
        run = select(table, str(out), SIZE, partitions=2, exact=True)
    assert f"resumes after {len(done)} picks" in caplog.text
    assert_picks(run.out, expected)
    assert run.record["rounds"] > 0
    assert run.record["log_det"] == pytest.approx(expected[1].sum())
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert select(table, str(out), SIZE, partitions=2, exact=True).repeated
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    assert alive() == []


def test_ctrl_c_keeps_the_picks_and_the_same_command_goes_on(
    cluster: None,
    table: str,
    expected: tuple[list[str], np.ndarray],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = str(tmp_path / "out")
    real = shard_actors.ShardActors.advance

    def interrupted(self: Any, update: Any, own: Any) -> Any:
        if update.number == 4:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, update, own)

    command = ["select", table, "--out", out, "--size", str(SIZE), "--partitions", "2", "--exact"]
    with monkeypatch.context() as patch:
        patch.setattr(shard_actors.ShardActors, "advance", interrupted)
        assert main(command) == 130
    assert alive() == []
    count = len(recorded(Path(out)))
    assert 0 < count < SIZE
    shown = capsys.readouterr().out
    assert f"interrupted after {count} picks, which are the selection for that budget" in shown
    assert f"raydpp cut {out} --size {count} --out NEW keeps these picks" in shown
    first = expected[0][:count], expected[1][:count]
    assert_picks(out, first)
    with pytest.raises(UserError, match="unfinished"):
        runs.load_finished(["select"], Folder.at(out))
    assert_picks(cut(out, str(tmp_path / "cut"), count).out, first)
    with caplog.at_level(logging.INFO, "raydpp"):
        assert main(command) == 0
    assert f"resumes after {count} picks" in caplog.text
    assert_picks(out, expected)


@pytest.mark.slow
def test_ctrl_c_before_the_first_pick_is_no_selection(
    cluster: None, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        patch.setattr(shard_actors.ShardActors, "advance", interrupted)
        with pytest.raises(KeyboardInterrupt):
            select(table, out, 5, partitions=2, exact=True)
    assert alive() == []
    assert len(select(table, out, 5, partitions=2, exact=True).record["counts"]) > 0


def test_picks_are_recorded_at_a_url_with_options(here: None, table: str, tmp_path: Path) -> None:
    record = Part(Folder.at(f"file://{tmp_path}/rounds?use_mmap=false"), "picks.parquet")
    first = exact_greedy(job_of(table, 1, Request(Budget(5), Objective(Kernel()))), record)
    assert stage._recorded(record) == (first.rows["id"].to_pylist(), first.selection.log_gains.tolist())
    assert stage._recorded(Part(Folder.at(f"file://{tmp_path}/other?use_mmap=false"), "picks.parquet")) is None


def test_a_search_that_fails_leaves_no_actor_behind(cluster: None, table: str, tmp_path: Path) -> None:
    parts = parquet_at(table)
    rows = read_columns(parts, parts[0].columns)
    features = vectors(rows["gradient"]).copy()
    features[700] = 0
    column = rows.column_names.index("gradient")
    rows = rows.set_column(column, "gradient", vector_array(features, rows.schema.field("gradient").type.value_type))
    for start in (0, 500):
        write_table(Folder.at(tmp_path / "long.parquet"), f"{start}.parquet", rows.slice(start, 500))
    with pytest.raises(UserError, match="1 of 500 rows of zeros"):
        select(str(tmp_path / "long.parquet"), str(tmp_path / "out"), 20, gamma=1.0, partitions=2, exact=True)
    assert alive() == []


def test_the_textbook_oracle_has_no_rounds(cluster: None, table: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no textbook oracle"):
        select(table, str(tmp_path / "textbook"), 5, exact=True, partitions=2, oracle="textbook")
    assert alive() == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_shards_on_four_nodes_find_the_same_picks(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    run_script(table, tmp_path, "equal")
    for kernel in ("rbf", "cosine"):
        rows, selection = whole(table, Request(Budget(SIZE), Objective(Kernel(kernel))))
        for count in (5, 16):
            out = str(tmp_path / "out" / f"{kernel}-{count}")
            assert_picks(out, (rows["id"].to_pylist(), selection.log_gains))
            assert json.loads((Path(out) / "run.json").read_text())["counts"]["partitions"] == count


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_goes_costs_nothing_and_one_too_few_ends_the_search_until_there_is_another(tmp_path: Path) -> None:
    table = make_table(tmp_path)
    (tmp_path / "out").mkdir()
    said = run_script(table, tmp_path, "removed")
    rows, selection = whole(table, Request(Budget(SIZE), Objective(Kernel())))
    gone = [line.split()[1] for line in said if line.startswith("removed ")]
    assert len(gone) == 2
    for node, name in zip(gone, ("room", "full"), strict=True):
        assert_picks(str(tmp_path / "out" / name), (rows["id"].to_pylist(), selection.log_gains))
        rounds = [line.split() for line in (tmp_path / "out" / f"{name}.log").read_text().splitlines()]
        moved = {shard for shard, _, _, there in rounds if there == node}
        assert moved
        assert all({there for shard, _, _, there in rounds if shard == one} > {node} for one in moved)
    ended = [line for line in said if line.startswith(("room: ", "full: "))]
    assert len(ended) == 1
    assert "full: 1 of 3 shards have no node to run on: each needs 1 CPU" in ended[0]
    assert "The picks so far are kept: the same command resumes from them" in ended[0]
    on = [line for line in said if "resumes after" in line]
    assert len(on) == 1
    assert 0 < int(on[0].split()[-2]) < SIZE


def run_script(table: str, folder: Path, what: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, str(HERE / "shards_moved.py"), str(HERE.parents[1]), table, str(folder / "out"), what],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout.splitlines()


def recorded(out: Path) -> list[str]:
    """The ids of the picks so far."""
    record = out / "rounds" / "picks.parquet"
    if not record.exists():
        return []
    stored = io.BytesIO(record.read_bytes())  # opened once: it is replaced while a search runs
    ids: list[str] = pq.read_table(stored)["id"].to_pylist()
    return ids


def assert_picks(out: str, expected: tuple[list[str], np.ndarray]) -> None:
    picks = pq.read_table(Path(out) / "selection")
    assert picks["id"].to_pylist() == expected[0]
    np.testing.assert_allclose(picks["log_gain"].to_numpy(), expected[1], rtol=1e-9, atol=1e-12)
    assert pq.read_table(Path(out) / "gradients")["id"].to_pylist() == expected[0]


def alive() -> list[str]:
    """The actors of shards that are still there after a moment."""
    from ray._private.state import state

    until = time.monotonic() + 10
    while True:
        actors = [one for one in state.actor_table(None).values() if "Shard" in one["ActorClassName"]]
        found = [one["ActorID"] for one in actors if one["State"] != "DEAD"]
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)
