from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from raydpp.cluster import Here
from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.objective import Objective, Score
from raydpp.errors import UserError
from raydpp.ingest.stage import ingest
from raydpp.runs import Run
from raydpp.select.cut import cut
from raydpp.select.outputs import Distances, read_examples, write_dataset, write_selection
from raydpp.select.request import Picked, Request
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import SELECTION_SCHEMA, vector_array
from tests.conftest import write_rows


def test_a_selection_is_written_in_the_order_of_picking(tmp_path: Path) -> None:
    rows = pa.table({"id": ["c", "a"], "gradient": vector_array(np.eye(2), pa.float32()), "length": [4, 8]})
    picked = Picked(rows, Selection.of([0, 1], [-0.5, -1.0]))
    request = Request(Budget(), Objective(Kernel()), quality=(Score("length", 1.0, 6.0, 2.0),))
    write_selection(Run(Folder.at(tmp_path), {}), picked, request)
    found = pq.read_table(tmp_path / "selection")
    assert found.schema.equals(SELECTION_SCHEMA)
    assert found["rank"].to_pylist() == [1, 2]
    assert found["id"].to_pylist() == ["c", "a"]
    assert found["source"].to_pylist() == [None, None]
    assert found["log_det"].to_pylist() == [-0.5, -1.5]
    assert found["quality"].to_pylist() == [-1.0, 1.0]
    assert pq.read_table(tmp_path / "gradients").equals(rows)
    write_selection(Run(Folder.at(tmp_path / "none"), {}), picked, Request(Budget(), Objective(Kernel())))
    assert pq.read_table(tmp_path / "none" / "selection")["quality"].null_count == 2


def test_examples_come_in_the_order_asked_for_and_missing_ones_are_said(corpus: str) -> None:
    rows = pq.read_table(Path(corpus) / "corpus").to_pylist()
    ids = [rows[n]["id"] for n in (7, 2, 31)]
    found = read_examples(Here(), Folder.at(corpus), ids, [-1, -2, -3])
    assert [row["id"] for row in found] == ids
    assert [(row["rank"], row["log_gain"]) for row in found] == [(1, -1.0), (2, -2.0), (3, -3.0)]
    assert found[0]["messages"] == [{key: turn[key] for key in ("role", "content")} for turn in rows[7]["messages"]]
    with pytest.raises(UserError, match="1 of the selected examples are not in"):
        read_examples(Here(), Folder.at(corpus), [*ids, "gone"], [0] * 4)


CALL = {"role": "assistant", "content": "one", "weight": 0, "reasoning_content": "two three"}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A selection of all rows of a corpus of many shapes, and each row's own messages by its last content."""
    folder = tmp_path_factory.mktemp("mixed")
    words = ["one", "two", "three", "four", "red", "blue", "green", "sky", "sea", "tree", "cat", "dog"]
    raw: list[dict[str, Any]] = []
    for n, word in enumerate(words):
        turns = [{"role": "user", "content": f"what is {word}"}, {"role": "assistant", "content": f"{word} answer"}]
        row: dict[str, Any] = {"messages": turns, "id": n, "rank": "theirs", "same": n / 2}
        row["kind"] = [n, str(n), True, None][n % 4]  # one type a row
        row["deep"] = [{"a": n}, [n], None][n % 3]
        if n % 3 == 0:
            row |= {"tools": TOOLS if n % 2 else json.dumps(TOOLS), "big": 2**70}
        if n % 3 == 1:
            row["messages"] = [{"role": "system", "content": "the sky"}, turns[0], CALL, *turns]
        raw.append(row)
    write_rows(folder / "raw" / "a.jsonl", raw)
    corpus = ingest([str(folder / "raw")], str(folder / "corpus")).out
    ids = pq.read_table(Path(corpus) / "corpus")["id"]
    points = np.random.default_rng(0).standard_normal((len(ids), 64))
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    pq.write_table(pa.table({"id": ids, "gradient": vector_array(points, pa.float32())}), folder / "table.parquet")
    out = select(str(folder / "table.parquet"), str(folder / "out"), len(words), corpus=corpus).out
    return Path(out), {row["messages"][-1]["content"]: row for row in raw}


def lines_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "examples.jsonl").read_text().splitlines()]


def without_nulls(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in turn.items() if value is not None} for turn in messages]


def test_every_row_has_its_messages_and_all_of_its_own_columns(mixed: tuple[Path, dict[str, Any]]) -> None:
    out, raw = mixed
    rows = lines_of(out)
    assert len(rows) == len(raw) == 12
    assert [row["rank"] for row in rows] == list(range(1, 13))
    for row in rows:
        given = raw[row["messages"][-1]["content"]]
        assert without_nulls(row["messages"]) == given["messages"]
        assert (row["original_id"], row["original_rank"], row["same"]) == (given["id"], "theirs", given["same"])
        assert row["source"] == "a"
        n = given["id"]
        assert row["kind"] == [str(n), str(n), "true", None][n % 4]  # of several types, so all are text
        assert json.loads(row["deep"] or "null") == given["deep"]
        tools = json.loads(row["tools"] or "null")
        assert tools == (TOOLS if "tools" in given else None)
        assert json.loads(row["big"] or "null") == given.get("big")
        assert list(row)[:5] == ["messages", "id", "source", "rank", "log_gain"]


def test_a_selection_and_a_cut_load_as_datasets(mixed: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    out, _ = mixed
    small = Path(cut(str(out), str(tmp_path / "small"), 5).out)
    for folder, size in ((out, 12), (small, 5)):
        loaded = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
        assert list(loaded) == ["train"]
        assert loaded["train"].to_list() == lines_of(folder)[:size]
        assert loaded["train"].features["log_gain"] == datasets.Value("float64")
    first = datasets.load_dataset(str(out), split="train[:5]", cache_dir=str(tmp_path / "cache"))
    assert first["id"] == [row["id"] for row in lines_of(small)]


def test_a_column_whose_values_come_late_loads(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    turns = [
        {"role": "user", "content": "x" * 4000, "weight": None},
        {"role": "assistant", "content": "y", "weight": None},
    ]
    late = {"messages": [turns[0], {**turns[1], "weight": 0}], "note": "here", "score": 1.5, "yes": True}
    rows = [
        {
            "messages": turns,
            "id": str(n),
            "source": None,
            "rank": n,
            "log_gain": 0.0,
            "note": None,
            "score": None,
            "yes": None,
        }
        | (late if n == 2999 else {})
        for n in range(3000)
    ]
    write_dataset(Folder.at(tmp_path), rows, {}, 0.0, {}, Distances("greedy", {}))
    loaded = datasets.load_dataset(str(tmp_path), split="train", cache_dir=str(tmp_path / "cache"))
    assert loaded[2999] == rows[2999]
    assert loaded[0] == rows[0]


def test_llama_factory_finds_the_examples_and_the_roles(mixed: tuple[Path, dict[str, Any]]) -> None:
    out, raw = mixed
    info = json.loads((out / "dataset_info.json").read_text())["raydpp"]
    assert info["formatting"] == "sharegpt"
    rows = [json.loads(line) for line in (out / info["file_name"]).read_text().splitlines()]
    tags = info["tags"]
    assert tags["observation_tag"] == "tool"
    known = {tags[f"{name}_tag"]: name for name in ("system", "user", "assistant")}
    for row in rows:  # as its converter goes through a row
        turns = row[info["columns"]["messages"]]
        read = [(known[turn[tags["role_tag"]]], turn[tags["content_tag"]]) for turn in turns]
        assert read == [(turn["role"], turn["content"]) for turn in raw[read[-1][1]]["messages"]]


def test_the_card_says_where_the_examples_come_from(table: str, tmp_path: Path) -> None:
    out = Path(select(table, str(tmp_path / "out"), 12).out)
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    assert yaml.safe_load(front)["configs"] == [
        {"config_name": "default", "data_files": [{"split": "train", "path": "examples.jsonl"}]}
    ]
    record = json.loads((out / "run.json").read_text())
    assert "# 12 selected examples" in text
    assert f"- picked from: `{table}`, 40 examples of `{record['corpus']}`" in text
    assert f"gradient under {record['fingerprint']['model']}, 64 dimensions" in text
    assert "exact greedy, rbf kernel, gamma 1" in text
    assert "- budget: `--size 12`" in text
    assert f"- log det: {record['log_det']:,.2f} nats" in text
    assert f"`raydpp select --config {out}/run.json --out NEW`" in text
    picked = sum(row["source"] == "first" for row in lines_of(out))
    assert f"| first | 50.0% | {picked / 12:.1%} |" in text
    curves = json.loads((out / "distances.json").read_text())["curves"]
    assert curves["greedy"][11] < curves["random"][11]
    beside = f"{curves['greedy'][11]:.4f} nats per example; of as many random ones {curves['random'][11]:.4f}"
    assert beside in text
    small = cut(str(out), str(tmp_path / "small"), 0.5).out
    text = (Path(small) / "README.md").read_text()
    assert "# 6 selected examples" in text
    assert "- budget: `--size 0.5`" in text
    assert f"{curves['greedy'][5]:.4f} nats per example; of as many random ones {curves['random'][5]:.4f}" in text
    assert f"`raydpp cut {out} --size 0.5 --out NEW`" in text
    plain = select(table, str(tmp_path / "plain"), 3, quality=["loss=-1"], quality_weight=0.3, kernel="cosine").out
    text = (Path(plain) / "README.md").read_text()
    assert "exact greedy, cosine kernel, ridge 0.1, quality weight 0.3 on loss=-1" in text


def test_a_trainer_takes_a_step_on_a_selection(
    mixed: tuple[Path, dict[str, Any]], tiny_model: str, tmp_path: Path
) -> None:
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    rows = datasets.load_dataset(str(mixed[0]), split="train", cache_dir=str(tmp_path / "cache"))
    config = trl.SFTConfig(
        str(tmp_path / "trained"),
        max_steps=1,
        per_device_train_batch_size=4,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(tiny_model, config, train_dataset=rows)
    assert np.isfinite(trainer.train().training_loss)
