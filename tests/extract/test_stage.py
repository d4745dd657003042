from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.diversity.fidelity import fidelity
from raydpp.dpp.features import unit_rows
from raydpp.errors import UserError
from raydpp.extract import workers
from raydpp.extract.stage import cuts_expected, extract
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking
from raydpp.gradients.optimizer import learning_rate
from raydpp.gradients.representations import load_extractor
from raydpp.runs import RunResult
from raydpp.select.stage import select
from raydpp.tables import STEP, gradient_schema, open_table, vectors
from tests.faults import faulty, refusing

pytestmark = pytest.mark.usefixtures("cluster")


def test_every_conversation_becomes_a_vector_in_plain_parquet(table: str, corpus: str) -> None:
    found = pq.read_table(Path(table) / "gradients")
    assert found.num_rows == 40
    assert found.schema.equals(gradient_schema(64, difficulty=True))
    assert min(found["difficulty"].to_pylist()) > 0
    features = vectors(found["gradient"])
    assert features.dtype == np.int8
    np.testing.assert_allclose(np.linalg.norm(features.astype(float), axis=1), math.sqrt(64) / STEP, rtol=0.05)
    assert sorted(found["id"].to_pylist()) == pq.read_table(Path(corpus) / "corpus")["id"].to_pylist()
    assert min(found["response_tokens"].to_pylist()) >= 2  # a word and the end of turn
    assert min(found["loss"].to_pylist()) > 0
    record = json.loads((Path(table) / "run.json").read_text())
    assert record["counts"]["in"] == record["counts"]["rows"] == 40
    told = fidelity(features)
    assert told is not None
    assert record["fidelity"]["error"] == pytest.approx(told.error, rel=0.1)
    assert {"model", "revision", "adapter", "tokenizer", "masking", "projection", "dtype"} <= record[
        "fingerprint"
    ].keys()
    assert record["plan"]["gpus"] == 0


def test_as_many_workers_as_cpus_and_smaller_files_change_nothing(
    corpus: str, table: str, tiny_model: str, tmp_path: Path
) -> None:
    import ray

    cpus = int(ray.cluster_resources()["CPU"])
    run = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=64, rows_per_file=5, actors=cpus)
    assert run.record["plan"]["least"] == cpus  # all of them hold their CPUs, and leave a share for what feeds them
    first, second = (pq.read_table(Path(out) / "gradients").sort_by("id") for out in (table, run.out))
    assert first["id"].equals(second["id"])
    whole, parts = (vectors(found["gradient"]).astype(int) for found in (first, second))
    assert np.abs(whole - parts).max() <= 1  # rounding in another batch may lift a number over the edge of the next
    assert (whole != parts).mean() < 1e-3


def of_source(corpus: str, source: str) -> list[dict[str, Any]]:
    """The conversations of a source, in the order of their ids."""
    rows = pq.read_table(Path(corpus) / "corpus").to_pylist()
    return sorted((row for row in rows if row["source"] == source), key=lambda row: row["id"])


def test_a_limited_run_takes_the_smallest_ids_of_the_sources_and_says_why_it_rejects(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = of_source(corpus, "second")[:6]
    prompt = expected[5]["messages"][0]["content"]
    strict = refusing(tiny_model, tmp_path / "strict", f"messages[0]['content'] == {prompt!r}", "not this one")
    monkeypatch.setattr(workers, "FeatureActor", faulty(tmp_path / "log"))
    run = extract(corpus, str(tmp_path / "out"), strict, sources=["second"], limit=6, store_as="float32")
    found = pq.read_table(Path(run.out) / "gradients")
    assert sorted(found["id"].to_pylist()) == [row["id"] for row in expected[:5]]
    assert found.schema.field("gradient").type == pa.list_(pa.float32(), 8192)
    (reject,) = [json.loads(path.read_text()) for path in (Path(run.out) / "rejects").iterdir()]
    assert reject["id"] == expected[5]["id"]
    assert "not this one" in reject["reason"]
    counts = run.record["counts"]
    assert (counts["in"], counts["rows"], counts["rejects"]) == (6, 5, 1)
    assert extract(corpus, run.out, strict, sources=["second"], limit=6, store_as="float32", actors=2).repeated


def test_mistakes_are_refused(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="could not be loaded"):
        extract(corpus, out, "no/such-model")
    with pytest.raises(UserError, match="no source 'third'"):
        extract(corpus, out, tiny_model, sources=["third"])
    with pytest.raises(UserError, match="this cluster has 0"):
        extract(corpus, out, tiny_model, gpus_per_actor=1)
    with pytest.raises(UserError, match="no folder"):
        extract(str(tmp_path / "nowhere"), out, tiny_model)
    with pytest.raises(UserError, match="limit 0"):
        extract(corpus, out, tiny_model, limit=0)


def test_adams_step_is_taken_with_the_moments_of_a_checkpoint(
    warmed_up: RunResult, corpus: str, tiny_model: str, tmp_path: Path
) -> None:
    checkpoint = warmed_up.record["paths"][1]
    options: dict[str, Any] = {"limit": 6, "dimension": 64, "adapter": checkpoint, "optimizer": "adam"}
    run = extract(corpus, str(tmp_path / "out"), tiny_model, **options, store_as="float32")
    rows = pq.read_table(Path(run.out) / "gradients").sort_by("id")
    conversations = pq.read_table(Path(corpus) / "corpus").sort_by("id")["messages"].slice(0, 6).to_pylist()
    config = ExtractorConfig(tiny_model, adapter=Adapter(checkpoint), dimension=64, optimizer="adam")
    examples = [workers.tokenize_row(messages, config, Masking()) for messages in conversations]
    np.testing.assert_allclose(vectors(rows["gradient"]), load_extractor(config)(examples).features, atol=1e-4)
    assert run.record["fingerprint"]["optimizer"]["kind"] == "adam"
    assert run.record["learning_rate"] == open_table(run.out, "gradient").learning_rate == learning_rate(checkpoint)
    estimate = extract(corpus, str(tmp_path / "dry"), tiny_model, **options, dry_run=True).record["estimate"]
    assert estimate["examples"] == 6
    with pytest.raises(UserError, match="its optimizer was 'adam' and now is 'sgd'"):
        extract(corpus, run.out, tiny_model, **{**options, "optimizer": "sgd"}, store_as="float32")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "a fresh adapter has none"),
        ({"adapter": "nowhere"}, "nowhere has no optimizer.pt"),
        ({"representation": "hidden"}, "--representation hidden has none"),
    ],
)
def test_what_has_no_moments_is_refused_before_a_model_is_looked_for(
    options: dict[str, Any], words: str, corpus: str, tmp_path: Path
) -> None:
    for dry_run in (False, True):
        with pytest.raises(UserError, match=words):
            extract(corpus, str(tmp_path / "out"), "no/such-model", optimizer="adam", dry_run=dry_run, **options)


@pytest.mark.parametrize("dry_run", [False, True])
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gpus_per_actor": 1.5}, "--gpus-per-actor 1.5: give 0, a part of one GPU such as 0.5, or a whole number"),
        ({"quantization": "8bit", "representation": "embedding"}, "leave it out for a text encoder"),
        ({"quantization": "4bit", "dtype": "float64"}, "--quantization and --dtype float64"),
        ({"quantization": "4bit", "model": "some.gguf"}, "would round the weights of some.gguf a second time"),
    ],
)
def test_what_no_model_can_be_loaded_as_is_refused_before_one_is_looked_for(
    options: dict[str, Any], words: str, dry_run: bool, corpus: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=words):
        extract(corpus, str(tmp_path / "out"), **{"model": "no/such-model", **options}, dry_run=dry_run)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_quantised_already_and_gpus_that_are_not_there_are_refused_in_a_sentence(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raydpp.extract.stage.check_quantization", lambda *_: None)  # bitsandbytes need not be there
    folder, out = shutil.copytree(tiny_model, tmp_path / "model"), str(tmp_path / "out")
    config = json.loads((folder / "config.json").read_text())
    quantised = {"quant_method": "gptq", "bits": 4}
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantised}))
    for dry_run in (False, True):
        with pytest.raises(UserError, match="are quantised already; leave it out"):
            extract(corpus, out, str(folder), quantization="4bit", dry_run=dry_run)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match=r"spread over 2 GPUs, and this process sees 1: give a lower --gpus-per-actor"):
        extract(corpus, out, tiny_model, gpus_per_actor=2, dry_run=True)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_model_through_the_real_ray(corpus: str, smollm2: str, tmp_path: Path) -> None:
    run = extract(corpus, str(tmp_path / "out"), smollm2, per_source=2, dimension=256)
    found = pq.read_table(Path(run.out) / "gradients")
    assert sorted(found["source"].to_pylist()) == ["first", "first", "second", "second"]
    gram = unit_rows(vectors(found["gradient"])).numpy()
    gram = gram @ gram.T
    assert gram[np.triu_indices(4, 1)].max() < 0.98
    assert 0 < min(found["loss"].to_pylist()) < 12


def test_weights_that_break_on_the_workers_are_refused(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in Path(tiny_model).iterdir():
        (broken / file.name).write_bytes(b"no" if file.suffix == ".safetensors" else file.read_bytes())
    with pytest.raises(UserError, match="could not be loaded"):
        extract(corpus, str(tmp_path / "out"), str(broken))


def test_a_corpus_that_grew_costs_only_its_new_conversations(
    corpus: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "FeatureActor", faulty(tmp_path / "log"))
    small = part_of_corpus(corpus, tmp_path / "small", 15)
    out = Path(extract(small, str(tmp_path / "out"), tiny_model, dimension=16).out)
    before = {path: path.stat().st_mtime_ns for path in (out / "gradients").iterdir()}
    run = extract(corpus, str(out), tiny_model, dimension=16)
    assert run.record["counts"]["rows"] == 40
    assert run.record["timings"]["rows"] == 25
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found, wanted = (pq.read_table(folder)["id"].to_pylist() for folder in (out / "gradients", Path(corpus) / "corpus"))
    assert sorted(found) == sorted(wanted)
    with pytest.raises(UserError, match="not among the conversations"):
        extract(small, str(out), tiny_model, dimension=16)
    assert (out / "_SUCCESS").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    (out / "rejects").mkdir()
    run = extract(small, str(out), tiny_model, dimension=16, prune=True)
    assert (run.record["counts"]["in"], run.record["counts"]["rows"], run.record["timings"]["rows"]) == (15, 15, 0)
    kept = pq.read_table(out / "gradients")
    assert sorted(kept["id"].to_pylist()) == pq.read_table(Path(small) / "corpus")["id"].to_pylist()
    run = extract(corpus, str(out), tiny_model, dimension=16, prune=True)
    assert (run.record["counts"]["rows"], run.record["timings"]["rows"]) == (40, 25)
    with pytest.raises(UserError, match="its dimension was 16 and now is 32"):
        extract(corpus, str(out), tiny_model, dimension=32)
    with pytest.raises(UserError, match="its seed was 0 and now is 1"):
        extract(corpus, str(out), tiny_model, dimension=16, seed=1)


def test_a_shortlist_costs_only_its_conversations(
    corpus: str, table: str, tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr(workers, "FeatureActor", faulty(tmp_path / "log"))
    shortlist = select(table, str(tmp_path / "shortlist"), size=6).out
    listed = pq.read_table(Path(shortlist) / "selection")["id"].to_pylist()
    more = tmp_path / "more.txt"
    more.write_text("nowhere\n" + listed[0])
    options: dict[str, Any] = {"dimension": 16, "only": [shortlist, str(more)]}
    run = extract(corpus, str(tmp_path / "out"), tiny_model, **options)
    assert sorted(pq.read_table(Path(run.out) / "gradients")["id"].to_pylist()) == sorted(listed)
    assert run.record["counts"]["in"] == 6
    assert "1 of the ids of --only are not in" in caplog.text
    assert extract(corpus, run.out, tiny_model, **options).repeated
    everything = pq.read_table(Path(corpus) / "corpus")["id"].to_pylist()
    more.write_text("\n".join(sorted(set(everything) - set(listed))[:2]))  # the shortlist grows
    run = extract(corpus, run.out, tiny_model, **options)
    assert (run.record["counts"]["rows"], run.record["timings"]["rows"]) == (8, 2)


def part_of_corpus(corpus: str, out: Path, rows: int) -> str:
    """What ingest would have written of every so many conversations: an earlier state of a corpus that grew."""
    record = json.loads((Path(corpus) / "run.json").read_text())
    table = pq.read_table(Path(corpus) / "corpus")
    table = table.take(np.linspace(0, len(table) - 1, rows).astype(int))
    (out / "corpus").mkdir(parents=True)
    pq.write_table(table, out / "corpus" / "part-00000.parquet")
    record["counts"]["sources"] = {
        found["values"]: found["counts"] for found in table["source"].value_counts().to_pylist()
    }
    record["files"] = ["corpus/part-00000.parquet"]
    (out / "run.json").write_text(json.dumps(record))
    (out / "_SUCCESS").touch()
    return str(out)


@pytest.mark.parametrize(
    ("cut", "rows", "expected"),
    [
        ([0, 0], 2, "none of the 2 has more than 64 tokens"),
        ([0, 0], 9, "none of the first 2 has more than 64 tokens"),
        ([0, 5, 1_300, 7], 4, "3 of 4 have more than 64 tokens and will be cut, by 7 tokens at the median and 1,300"),
        ([0, 5, 0, 0], 400, "about 25.0% of all, 1 of 4 have more than 64 tokens and will be cut, by 5 tokens"),
    ],
)
def test_what_will_be_cut_is_said_before(cut: list[int], rows: int, expected: str) -> None:
    assert cuts_expected(cut, rows, 64).startswith(expected)
