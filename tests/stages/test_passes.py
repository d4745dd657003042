from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from raydpp.extraction.model import load_tokenizer
from raydpp.stages import passes
from raydpp.stages.extract import extract
from tests.stages.faults import faulty

HERE = Path(__file__).parent


def found_in(out: str) -> tuple[list[str], dict[str, str]]:
    """The ids of the table, and the rejects with their reasons."""
    rows = pq.read_table(Path(out) / "gradients", columns=["id"])["id"].to_pylist()
    lines = [line for path in (Path(out) / "rejects").glob("*.jsonl") for line in path.read_text().split("\n") if line]
    return rows, {reject["id"]: reject["reason"] for reject in map(json.loads, lines)}


def all_ids(corpus: str) -> list[str]:
    return sorted(pq.read_table(Path(corpus) / "corpus", columns=["id"])["id"].to_pylist())


def test_a_worker_killed_once_costs_nothing(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(passes, "FeatureActor", faulty(tmp_path / "log", dies_once=True))
    run = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=16, rows_per_file=8)
    assert (tmp_path / "log.died").exists()
    assert sorted(found_in(run.out)[0]) == all_ids(corpus)


def test_as_many_actors_as_cpus_leave_a_share_for_what_feeds_them(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    run = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=16, rows_per_file=4, actors=cpus)
    assert run.record["plan"]["least"] == cpus  # all of them hold their CPUs before the first unit is tokenised
    assert sorted(found_in(run.out)[0]) == all_ids(corpus)


@pytest.mark.slow
def test_an_actor_for_every_gpu_is_fed_where_there_are_no_more_cpus(
    corpus: str, tiny_model: str, tmp_path: Path
) -> None:
    arguments = [str(HERE.parents[1]), corpus, str(tmp_path / "out"), tiny_model]
    done = subprocess.run(
        [sys.executable, str(HERE / "gpus_claimed.py"), *arguments], capture_output=True, text=True, timeout=180
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(found_in(str(tmp_path / "out"))[0]) == all_ids(corpus)
    plan = json.loads((tmp_path / "out" / "run.json").read_text())["plan"]
    assert (plan["gpus"], plan["least"]) == (1.0, 2)


def test_rows_that_kill_their_process_every_time_cost_nothing_but_themselves(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_with: dict[str, set[str]] = {}
    for row in pq.read_table(Path(corpus) / "corpus").to_pylist():
        for word in " ".join(message["content"] for message in row["messages"]).split():
            rows_with.setdefault(word, set()).add(row["id"])
    word, ids = min(rows_with.items(), key=lambda item: abs(len(item[1]) - 3))
    deadly, token = sorted(ids), load_tokenizer(tiny_model).convert_tokens_to_ids(word)
    assert 0 < len(deadly) < 8
    monkeypatch.setattr(passes, "FeatureActor", faulty(tmp_path / "log", deadly=token))
    run = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=16, rows_per_file=16)
    rows, rejects = found_in(run.out)
    assert sorted(rejects) == deadly
    assert sorted([*rows, *rejects]) == all_ids(corpus)
    assert all("even alone" in reason for reason in rejects.values())
    assert run.record["counts"]["rejects"] == len(deadly)


DRIVER = """
import sys
from pathlib import Path
import ray
ray.init(address=sys.argv[1], runtime_env={"env_vars": {"PYTHONPATH": sys.argv[2], "HF_HUB_OFFLINE": "1"}})
sys.path.insert(0, sys.argv[2])
from raydpp.stages import passes
from raydpp.stages.extract import extract
from tests.stages.faults import faulty
passes.FeatureActor = faulty(Path(sys.argv[3]), seconds=0.7)
extract(sys.argv[4], sys.argv[5], sys.argv[6], dimension=16, rows_per_file=4)
"""


@pytest.mark.slow
def test_a_driver_killed_at_any_moment_is_taken_up_where_it_was(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    log, out = tmp_path / "log", tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    arguments = [address, str(HERE.parents[1]), str(log), corpus, str(out), tiny_model]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments]) as driver:
        wait_for(lambda: len(list((out / "gradients").glob("*.parquet"))) >= 3, driver)
        driver.send_signal(signal.SIGKILL)
    first = {path: path.stat().st_mtime_ns for path in (out / "gradients").glob("*.parquet")}
    assert not (out / "_SUCCESS").exists()
    monkeypatch.setattr(passes, "FeatureActor", faulty(log))
    run = extract(corpus, str(out), tiny_model, dimension=16, rows_per_file=4)
    rows, rejects = found_in(run.out)
    assert sorted(rows) == all_ids(corpus)
    assert not rejects
    assert run.record["attempt"] == 2
    assert {path: path.stat().st_mtime_ns for path in first} == first
    worked_on = Counter(log.read_text().split())
    assert sum(worked_on.values()) - len(worked_on) <= 4  # one unit of the one actor


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_node_that_goes_costs_nothing(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    arguments = [str(HERE.parents[1]), corpus, str(tmp_path / "out"), tiny_model, str(tmp_path / "log")]
    done = subprocess.run(
        [sys.executable, str(HERE / "node_removed.py"), *arguments], capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "node removed" in done.stdout
    rows, rejects = found_in(str(tmp_path / "out"))
    assert sorted(rows) == all_ids(corpus)
    assert not rejects


def wait_for(condition: Any, process: Any) -> None:
    until = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the driver ended by itself"
        assert time.monotonic() < until
        time.sleep(0.05)
