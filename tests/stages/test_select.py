from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from raydpp import store
from raydpp.errors import UserError
from raydpp.selection.greedy import greedy_map
from raydpp.stages.select import select


def features(table: str) -> tuple[list[str], np.ndarray]:
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    return rows["id"].to_pylist(), store.vectors(rows["gradient"])


def test_one_partition_is_exact_greedy_and_the_examples_come_with_it(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 0.25, partitions=1)
    ids, vectors = features(table)
    expected = greedy_map(vectors, 10, ids=ids)
    picks = pq.read_table(Path(run.out) / "selection")
    assert picks["id"].to_pylist() == [ids[i] for i in expected.indices]
    assert picks["rank"].to_pylist() == list(range(1, 11))
    np.testing.assert_allclose(picks["log_gain"].to_numpy(), expected.log_gains)
    assert picks["log_det"][-1].as_py() == pytest.approx(run.record["log_det"])
    lines = [json.loads(line) for line in (Path(run.out) / "examples.jsonl").read_text().split("\n") if line]
    assert [line["id"] for line in lines] == picks["id"].to_pylist()
    assert all(line["messages"][-1]["role"] == "assistant" for line in lines)

    randoms = np.random.default_rng(0)
    others = [greedy_map(vectors[randoms.choice(40, 10, replace=False)], 10).log_det for _ in range(20)]
    assert run.record["log_det"] > max(others)


def test_partitions_and_merge_come_close_and_do_not_depend_on_their_order(table: str, tmp_path: Path) -> None:
    exact = select(table, str(tmp_path / "exact"), 8, partitions=1).record["log_det"]
    runs = [select(table, str(tmp_path / f"p{n}"), 8, partitions=4) for n in range(2)]
    assert runs[0].record["counts"]["partitions"] > 1
    assert runs[0].record["log_det"] == pytest.approx(exact, abs=8 * 0.1)  # greedy is not optimal: either may win
    first, second = (pq.read_table(Path(run.out) / "selection") for run in runs)
    assert first.equals(second)
    assert select(table, str(tmp_path / "p0"), 8, partitions=4).repeated


def test_quality_alone_takes_the_longest_responses(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 5, quality_weight=1.0, kernel="cosine", partitions=3)
    rows = {row["id"]: row for row in pq.read_table(Path(table) / "gradients").to_pylist()}
    picks = pq.read_table(Path(run.out) / "selection").to_pylist()
    longest = sorted((row["response_tokens"] for row in rows.values()), reverse=True)[:5]
    assert sorted((rows[pick["id"]]["response_tokens"] for pick in picks), reverse=True) == longest
    lengths = np.array([row["response_tokens"] for row in rows.values()])
    assert picks[0]["quality"] == pytest.approx((longest[0] - lengths.mean()) / lengths.std())


def test_mistakes_are_said_in_words(table: str, corpus: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="larger budget than the pool of 40"):
        select(table, out, 41)
    big = str(tmp_path / "big.parquet")
    store.write_table(big, pq.read_table(Path(table) / "gradients").take(list(range(40)) * 2))
    with pytest.raises(UserError, match="rank at most 64"):
        select(big, out, 70, kernel="cosine", ridge=0.0)
    with pytest.raises(UserError, match="written by raydpp ingest"):
        select(corpus, out, 4)
    with pytest.raises(UserError, match="no folder"):
        select(str(tmp_path / "nowhere"), out, 4)
    with pytest.raises(UserError, match="quality-weight"):
        select(table, out, 4, quality_weight=1.5)
    with pytest.raises(UserError, match="oversample"):
        select(table, out, 4, oversample=0.5)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((Path(table) / "run.json").read_text())
    with pytest.raises(UserError, match="unfinished"):
        select(str(unfinished), out, 4)
