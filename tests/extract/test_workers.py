from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle

from raydpp.cluster import ActorPlan
from raydpp.errors import RowError, UserError
from raydpp.extract import workers
from raydpp.extract.isolation import Features, IsolatedExtractor
from raydpp.extract.sample import choose
from raydpp.extract.stage import extract
from raydpp.extract.units import REJECTS, Piece, Unit
from raydpp.extract.workers import ExtractJob, FeatureActor, tokenize_first, tokenize_row, tokenize_unit
from raydpp.gradients.config import ExampleFeatures, ExtractorConfig, Masking
from raydpp.gradients.model import load_tokenizer
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.ingest.stage import ingest
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import GRADIENTS, Part, gradient_schema, parquet_parts, write_table
from tests.conftest import WORDS, write_rows
from tests.faults import Deadly, Fake, faulty, refusing

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the model's process cannot import tests

DEADLY, HOPELESS = 7, 9

pytestmark = pytest.mark.usefixtures("cluster")


def scored(examples: Sequence[TokenizedExample]) -> ExampleFeatures:
    """Features of 4 dimensions and both scores; an extractor knows none of them where every example is hopeless."""
    first = np.array([example.ids[0] for example in examples], np.float32)
    reasons = ["hopeless" if token == HOPELESS else None for token in first]
    some = None in reasons
    features = np.zeros((len(first), 4), np.float32)
    features[:, 0] = [reason is None for reason in reasons]
    losses, difficulties = (first, 2 * first) if some else (None, None)
    return ExampleFeatures(features, first, losses, difficulties, reasons, len(first))


class Isolated(FeatureActor):
    """An actor whose model is ``scored`` in a process that dies on DEADLY."""

    def loader(self) -> Callable[[], Features]:
        return lambda: Deadly(DEADLY, scored)


def owned_by(owner: str, out: Path) -> None:
    record = {"stage": "extract", "config": {}, "inputs": [], "owner": owner}
    (out / "run.json").write_text(json.dumps(record))


@pytest.fixture
def job(tmp_path: Path) -> ExtractJob:
    owned_by("me", tmp_path)
    plan = ActorPlan(0.0, 1.0, 1, 1, 1)
    return ExtractJob(
        Folder.at(tmp_path),
        Folder.at(tmp_path),
        "me",
        ExtractorConfig("none"),
        Masking(),
        gradient_schema(4, difficulty=True),
        plan,
    )


@pytest.fixture
def actor(job: ExtractJob) -> Any:
    found = Isolated(job)
    yield found
    assert not isinstance(found._extractor, UserError)
    found._extractor.close()


def unit(first: list[int | None]) -> pa.Table:
    """A tokenised unit of examples of two tokens; None is a row the tokenizer refused."""
    rows = [
        {
            "unit": "part",
            "id": f"{row:02d}",
            "source": "s",
            "ids": None if token is None else [token, 1],
            "response": None if token is None else [False, True],
            "cut": 0,
            "reason": "refused" if token is None else None,
        }
        for row, token in enumerate(first)
    ]
    return pa.Table.from_pylist(rows)


def outcome(out: Folder) -> tuple[dict[str, Any], dict[str, str]]:
    """The table's difficulties and the rejects' reasons, by id."""
    tables = [pq.read_table(path) for path in (Path(out.url) / GRADIENTS).glob("*.parquet")]
    lines = [line for path in (Path(out.url) / REJECTS).glob("*") for line in path.read_text().splitlines()]
    rows = [row for table in tables for row in table.to_pylist()]
    return {row["id"]: row["difficulty"] for row in rows}, {one["id"]: one["reason"] for one in map(json.loads, lines)}


def test_a_unit_ends_in_a_table_and_rejects_with_reasons(actor: FeatureActor, job: ExtractJob) -> None:
    (report,) = actor(unit([2, None, HOPELESS, 3])).to_pylist()
    assert (report["rows"], report["rejects"], report["tokens"], report["error"]) == (2, 2, 6, None)
    assert outcome(job.out) == ({"00": 4.0, "03": 6.0}, {"01": "refused", "02": "hopeless"})


def test_a_unit_is_counted_with_the_part_of_the_actors_time_that_the_model_takes(
    actor: FeatureActor, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: Counter[str] = Counter()
    monkeypatch.setattr("raydpp.metrics.count", lambda name, more: counted.update({name: more}))
    work, began = IsolatedExtractor.__call__, time.perf_counter()

    def slow(extractor: IsolatedExtractor, examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        time.sleep(0.2)
        return work(extractor, examples)

    monkeypatch.setattr(IsolatedExtractor, "__call__", slow)
    actor(unit([2, None, HOPELESS, 3]))
    time.sleep(0.2)  # without input
    actor(unit([4]))
    lived = time.perf_counter() - began
    assert {name: counted[name] for name in ("rows", "rejects", "tokens")} == {"rows": 3, "rejects": 2, "tokens": 8}
    assert 0.4 <= counted["model_seconds"] <= counted["actor_seconds"] - 0.2
    assert counted["actor_seconds"] >= lived - 0.05


@pytest.mark.parametrize("bad", [None, HOPELESS, DEADLY])
def test_a_unit_without_a_usable_row_is_all_rejects(actor: FeatureActor, job: ExtractJob, bad: int | None) -> None:
    (report,) = actor(unit([bad, bad])).to_pylist()
    assert (report["rows"], report["rejects"], report["error"]) == (0, 2, None)
    table, rejects = outcome(job.out)
    assert not table
    assert sorted(rejects) == ["00", "01"]


def test_a_half_in_which_nothing_is_usable_takes_no_score_from_the_other(actor: FeatureActor, job: ExtractJob) -> None:
    actor(unit([HOPELESS, DEADLY, 2, 3]))
    table, rejects = outcome(job.out)
    assert table == {"02": 4.0, "03": 6.0}
    assert sorted(rejects) == ["00", "01"]


def test_a_worker_whose_run_was_taken_over_writes_nothing(actor: FeatureActor, job: ExtractJob) -> None:
    owned_by("another", Path(job.out.url))
    (report,) = actor(unit([2])).to_pylist()
    assert "taken over" in report["error"]
    assert outcome(job.out) == ({}, {})


def test_a_worker_whose_run_is_taken_over_while_it_writes_takes_its_files_away(
    actor: FeatureActor, job: ExtractJob, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = workers.write_table

    def meanwhile(*arguments: Any) -> None:
        write(*arguments)
        owned_by("another", Path(job.out.url))

    monkeypatch.setattr(workers, "write_table", meanwhile)
    (report,) = actor(unit([2, HOPELESS])).to_pylist()
    assert "taken over" in report["error"]
    assert outcome(job.out) == ({}, {})


def test_what_one_row_does_to_the_tokenizer_is_its_reason(job: ExtractJob, tiny_model: str, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "yes"}
    good = [{"role": "user", "content": "what is a"}, answer]
    corpus = pa.table({"id": ["a", "b"], "source": ["s", "s"], "messages": [good, [answer]]})
    write_table(Folder.at(tmp_path), "corpus.parquet", corpus)
    strict = refusing(tiny_model, tmp_path / "strict", "messages[0]['role'] != 'user'", "no user")
    config = ExtractJob(job.corpus, job.out, "me", ExtractorConfig(strict), Masking(), job.schema, job.plan)
    unit = Unit("u", (Piece(Part(job.corpus, "corpus.parquet"), np.array([0, 1])),))
    good_row, bad_row = tokenize_unit(unit, config).to_pylist()
    assert good_row["reason"] is None
    assert sum(good_row["response"]) == 2  # the word and the end of turn
    assert bad_row["ids"] is None
    assert "no user" in bad_row["reason"]


def test_a_task_that_tokenises_loads_no_model_library(job: ExtractJob, corpus: str, tiny_model: str) -> None:
    import ray

    @ray.remote(runtime_env={"env_vars": {"PROCESS": "of its own"}}, num_cpus=0.1)
    def loaded(job: ExtractJob, part: Part) -> tuple[set[str], set[str]]:
        """The modules of a process that has begun a task, and those of one that has done it."""
        import sys

        begun = set(sys.modules)
        assert tokenize_unit(Unit("u", (Piece(part, np.array([0])),)), job)["ids"].null_count == 0
        return begun, set(sys.modules)

    part = parquet_parts(Folder.at(corpus).below("corpus"))[0]
    begun, done = ray.get(loaded.remote(replace(job, extractor=ExtractorConfig(tiny_model)), part))
    assert "raydpp.extract.workers" in begun  # as in an actor, whose model has a process of its own
    assert not begun & {"torch", "transformers", "peft"}
    assert not done & {"raydpp.gradients.representations", "peft"}  # transformers imports torch for a tokenizer


HERE = Path(__file__).parent


def found_in(out: str) -> tuple[list[str], dict[str, str]]:
    """The ids of the table, and the rejects with their reasons."""
    rows = pq.read_table(Path(out) / "gradients", columns=["id"])["id"].to_pylist()
    lines = [line for path in (Path(out) / "rejects").glob("*.jsonl") for line in path.read_text().split("\n") if line]
    return rows, {reject["id"]: reject["reason"] for reject in map(json.loads, lines)}


def all_ids(corpus: str) -> list[str]:
    return sorted(pq.read_table(Path(corpus) / "corpus", columns=["id"])["id"].to_pylist())


def test_a_worker_killed_once_and_rows_that_kill_their_process_every_time_cost_no_other_row(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_with: dict[str, set[str]] = {}
    for row in pq.read_table(Path(corpus) / "corpus").to_pylist():
        for word in " ".join(message["content"] for message in row["messages"]).split():
            rows_with.setdefault(word, set()).add(row["id"])
    word, deadly = min(rows_with.items(), key=lambda item: abs(len(item[1]) - 3))
    assert 0 < len(deadly) < 8
    token = load_tokenizer(tiny_model).convert_tokens_to_ids(word)
    log = tmp_path / "log"
    monkeypatch.setattr(workers, "FeatureActor", faulty(log, deadly=token, dies_once=True))
    run = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=16, rows_per_file=16)
    rows, rejects = found_in(run.out)
    assert log.with_suffix(".died").exists()
    assert max(Counter(log.read_text().split()).values()) > 1  # the unit on which the actor was killed
    assert sorted([*rows, *rejects]) == all_ids(corpus)
    assert rejects.keys() == deadly
    assert all("even alone" in reason for reason in rejects.values())
    assert run.record["counts"]["rejects"] == len(deadly)


def test_ray_has_nothing_to_say_against_how_actors_are_made(table: str) -> None:
    import ray

    logs = Path(vars(ray.get_runtime_context().worker)["node"].get_logs_dir_path())
    (log,) = logs.glob(f"python-core-driver-*_{os.getpid()}.log")  # whatever this process's core prints is there too
    assert "constructor arguments" not in log.read_text()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_actor_for_every_gpu_is_fed_where_there_are_no_more_cpus(
    corpus: str, tiny_model: str, tmp_path: Path
) -> None:
    run_script("gpus_claimed.py", corpus, tmp_path, tiny_model)
    assert sorted(found_in(str(tmp_path / "out"))[0]) == all_ids(corpus)
    plan = json.loads((tmp_path / "out" / "run.json").read_text())["plan"]
    assert (plan["gpus"], plan["least"]) == (1.0, 2)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_node_that_goes_costs_nothing(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    assert "node removed" in run_script("node_removed.py", corpus, tmp_path, tiny_model)
    rows, rejects = found_in(str(tmp_path / "out"))
    assert sorted(rows) == all_ids(corpus)
    assert not rejects
    begun = (tmp_path / "log").read_text().split()
    assert len(begun) > len(set(begun))  # what was at work on the node was begun again


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_cluster_without_workers_gets_them_and_gives_them_back(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    printed = run_script("autoscaled.py", corpus, tmp_path, tiny_model)
    history = json.loads(printed.rpartition("workers: ")[2])
    assert (history[0], history[-1]) == (0, 0)
    assert max(history) >= 2  # one more for a moment, where a node that is gone is not yet known to be
    assert sorted(found_in(str(tmp_path / "out"))[0]) == all_ids(corpus)
    plan = json.loads((tmp_path / "out" / "run.json").read_text())["plan"]
    assert (plan["gpus"], plan["least"], plan["most"]) == (1.0, 2, 2)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nodes_and_actors_that_die_all_the_time_cost_no_row_and_change_no_pick(
    cluster: None, tiny_model: str, tmp_path: Path
) -> None:
    words = WORDS.split()
    rows = [
        {"prompt": f"what is {words[n % 22]} {words[n // 22 % 22]}", "completion": " ".join(words[n // 484 : 12])}
        for n in range(3_200)
    ]
    large = ingest([write_rows(tmp_path / "raw.jsonl", rows)], str(tmp_path / "corpus")).out
    printed = run_script("soak.py", large, tmp_path, tiny_model)
    print(printed)
    kept, rejects = found_in(str(tmp_path / "out"))
    assert sorted(kept) == all_ids(large)
    assert len(kept) == 3_200
    assert not rejects
    deaths = [json.loads(found) for found in re.findall(r"^deaths: (.*)", printed, re.MULTILINE)]
    assert all(found["nodes"] + found["actors"] > 2 for found in deaths)
    assert len(deaths) == 2
    alone = select(str(tmp_path / "out"), str(tmp_path / "alone"), 200, partitions=1, redundancy="never").out
    found = [pq.read_table(Path(out) / "selection")["id"].to_pylist() for out in (tmp_path / "subset", alone)]
    assert found[0] == found[1]


def run_script(name: str, corpus: str, folder: Path, model: str) -> str:
    """What a script beside this file prints, which starts a cluster of its own."""
    arguments = [sys.executable, str(HERE / name), str(HERE.parents[1]), corpus, str(folder), model]
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


DRIVER = """
import sys
from dataclasses import replace
from pathlib import Path
import ray
address, root, folder, corpus, model = sys.argv[1:]
ray.init(address=address, runtime_env={"env_vars": {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}}, log_to_driver=False)
sys.path.insert(0, root)
from raydpp.extract import workers
from raydpp.extract.stage import extract
from tests.faults import faulty
workers.FeatureActor = faulty(Path(folder, "log"), gate=Path(folder, "never"), free=3)
extract(corpus, folder + "/out", model, dimension=16, rows_per_file=4)
"""


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_driver_killed_at_any_moment_is_taken_up_where_it_was(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    log, out = tmp_path / "log", tmp_path / "out"
    address = ray.get_runtime_context().gcs_address
    arguments = [address, str(HERE.parents[1]), str(tmp_path), corpus, tiny_model]
    with subprocess.Popen([sys.executable, "-c", DRIVER, *arguments]) as driver:
        try:
            while not log.with_suffix(".waiting").exists():  # three units are done, and the fourth is begun
                assert driver.poll() is None, "the driver ended by itself"
                time.sleep(0.05)
        finally:
            driver.kill()
    first = {path: path.stat().st_mtime_ns for path in (out / "gradients").glob("*.parquet")}
    assert len(first) == 3
    assert not (out / "_SUCCESS").exists()
    monkeypatch.setattr(workers, "FeatureActor", faulty(log))
    run = extract(corpus, str(out), tiny_model, dimension=16, rows_per_file=4)
    rows, rejects = found_in(run.out)
    assert sorted(rows) == all_ids(corpus)
    assert not rejects
    assert {path: path.stat().st_mtime_ns for path in first} == first
    begun = Counter(log.read_text().split())
    assert begun.total() - len(begun) == 4  # the fourth unit


class Unreliable(FeatureActor):
    """Its storage does not answer at first."""

    def loader(self) -> Callable[[], Features]:
        fake = Fake(self._job.extractor.dimension)
        return lambda: fake

    def __call__(self, table: pa.Table) -> pa.Table:
        tried = Path(self._job.out.url + ".tried")
        count = len(tried.read_text()) if tried.exists() else 0
        tried.write_text("x" * (count + 1))
        if count < 1:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject")
        return super().__call__(table)


def test_what_passes_is_tried_again(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FeatureActor", Unreliable)
    run = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=16)
    rows, rejects = found_in(run.out)
    assert sorted(rows) == all_ids(corpus)
    assert not rejects


@pytest.mark.parametrize(
    ("gpus", "loaded"), [(0.0, ("cpu", 1)), (0.5, ("cuda", 1)), (1.0, ("cuda", 1)), (4.0, ("cuda", 4))]
)
def test_an_actors_gpus_hold_one_model(gpus: float, loaded: tuple[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raydpp.gradients.representations.load_extractor", lambda config, *where: where)
    assert workers._load(ExtractorConfig("none"), ActorPlan(gpus, 1.0, 1, 1, 1)) == loaded


def test_a_sample_is_tokenised_to_know_what_will_be_cut(corpus: str, tiny_model: str) -> None:
    chosen = choose(Folder.at(corpus), {"first": 20, "second": 20})
    examples, reasons = tokenize_first(chosen, ExtractorConfig(tiny_model), Masking(max_length=12))
    whole, _ = tokenize_first(chosen, ExtractorConfig(tiny_model), Masking())
    assert not reasons
    assert [example.cut for example in examples] == [max(0, len(example.ids) - 12) for example in whole]
    assert len(tokenize_first(chosen, ExtractorConfig(tiny_model), Masking(), most=7)[0]) == 7


def test_a_token_that_the_model_has_no_embedding_for_costs_its_row(tiny_model: str, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(tiny_model, folder)
    tokenizer = load_tokenizer(str(folder))
    tokenizer.add_tokens(["hello"])
    tokenizer.save_pretrained(folder)
    asks, answer = {"role": "user", "content": "what is a"}, {"role": "assistant", "content": "b"}
    tokenize_row([asks, answer], ExtractorConfig(str(folder)), Masking())
    with pytest.raises(RowError, match=r"the tokenizer has the token 'hello' \(id 122\), the model embeddings for 122"):
        tokenize_row([{**asks, "content": "hello"}, answer], ExtractorConfig(str(folder)), Masking())
