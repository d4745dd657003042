from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.extract.stage import extract
from raydpp.ingest.stage import ingest
from raydpp.tables import gradient_schema, vectors
from tests.faults import refusing


def test_every_conversation_becomes_a_unit_vector_in_plain_parquet(table: str, corpus: str) -> None:
    found = pq.read_table(Path(table) / "gradients")
    assert found.num_rows == 40
    assert found.schema.equals(gradient_schema(64))
    features = vectors(found["gradient"]).astype(np.float64)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=2e-3)
    assert sorted(found["id"].to_pylist()) == pq.read_table(Path(corpus) / "corpus")["id"].to_pylist()
    assert min(found["response_tokens"].to_pylist()) >= 2  # a word and the end of turn
    assert min(found["loss"].to_pylist()) > 0
    record = json.loads((Path(table) / "run.json").read_text())
    assert record["counts"]["in"] == record["counts"]["rows"] == 40
    assert {"model", "revision", "adapter", "tokenizer", "masking", "projection", "dtype"} <= record[
        "fingerprint"
    ].keys()
    assert record["plan"]["gpus"] == 0


def test_the_number_of_workers_and_the_size_of_files_change_nothing(
    corpus: str, table: str, tiny_model: str, tmp_path: Path
) -> None:
    other = extract(corpus, str(tmp_path / "out"), tiny_model, dimension=64, rows_per_file=5, actors=2)
    first, second = (pq.read_table(Path(out) / "gradients").sort_by("id") for out in (table, other.out))
    assert first["id"].equals(second["id"])
    np.testing.assert_allclose(
        vectors(first["gradient"]).astype(float), vectors(second["gradient"]).astype(float), atol=1e-3
    )


def test_a_limited_run_takes_the_smallest_ids_of_the_sources(corpus: str, tiny_model: str, tmp_path: Path) -> None:
    run = extract(corpus, str(tmp_path / "out"), tiny_model, sources=["second"], limit=6, store_as="float32")
    found = pq.read_table(Path(run.out) / "gradients")
    whole = pq.read_table(Path(corpus) / "corpus").to_pylist()
    expected = sorted(row["id"] for row in whole if row["source"] == "second")[:6]
    assert sorted(found["id"].to_pylist()) == expected
    assert found.schema.field("gradient").type == pa.list_(pa.float32(), 1024)
    assert extract(corpus, run.out, tiny_model, sources=["second"], limit=6, store_as="float32", actors=2).repeated


def test_what_has_no_gradient_is_rejected_with_a_reason(cluster: None, tiny_model: str, tmp_path: Path) -> None:
    answer = {"role": "assistant", "content": "A"}
    rows = [
        {"messages": [{"role": "user", "content": "a"}, answer]},
        {"messages": [{"role": "tool", "content": "a"}, {"role": "user", "content": "b"}, answer]},
    ]
    source = tmp_path / "x.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = ingest([str(source)], str(tmp_path / "corpus")).out
    strict = refusing(tiny_model, tmp_path / "strict", "'tool' in messages | map(attribute='role')", "no tools")
    run = extract(folder, str(tmp_path / "out"), strict, dimension=16)
    assert (run.record["counts"]["rows"], run.record["counts"]["rejects"]) == (1, 1)
    (reject,) = [json.loads(p.read_text()) for p in (Path(run.out) / "rejects").iterdir()]
    assert "no tools" in reject["reason"]
    assert reject["id"]


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


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_real_model_through_the_real_ray(corpus: str, smollm2: str, tmp_path: Path) -> None:
    run = extract(corpus, str(tmp_path / "out"), smollm2, per_source=2, dimension=256)
    found = pq.read_table(Path(run.out) / "gradients")
    assert sorted(found["source"].to_pylist()) == ["first", "first", "second", "second"]
    gram = vectors(found["gradient"]).astype(float)
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


@pytest.mark.slow
def test_a_corpus_that_grew_costs_only_its_new_conversations(cluster: None, tiny_model: str, tmp_path: Path) -> None:
    rows = [{"prompt": f"what is {word}", "completion": word} for word in ["a", "b", "c", "red", "blue", "sky"]]
    files = [str(tmp_path / name) for name in ("one.jsonl", "two.jsonl")]
    for file, some in zip(files, (rows[:4], rows[4:]), strict=True):
        Path(file).write_text("".join(json.dumps(row) + "\n" for row in some))
    small = ingest(files[:1], str(tmp_path / "small"), files=2).out
    out = Path(extract(small, str(tmp_path / "out"), tiny_model, dimension=16).out)
    before = {path: path.stat().st_mtime_ns for path in (out / "gradients").iterdir()}
    large = ingest(files, str(tmp_path / "large"), files=2).out
    run = extract(large, str(out), tiny_model, dimension=16)
    assert run.record["counts"]["rows"] == 6
    assert run.record["timings"]["rows"] == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before
    found, wanted = (pq.read_table(folder)["id"].to_pylist() for folder in (out / "gradients", Path(large) / "corpus"))
    assert sorted(found) == sorted(wanted)
    with pytest.raises(UserError, match="not among the conversations"):
        extract(small, str(out), tiny_model, dimension=16)
    assert (out / "_SUCCESS").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "finished"
    with pytest.raises(UserError, match="its dimension was 16 and now is 32"):
        extract(large, str(out), tiny_model, dimension=32)
    with pytest.raises(UserError, match="its seed was 0 and now is 1"):
        extract(large, str(out), tiny_model, dimension=16, seed=1)
