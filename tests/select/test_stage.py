from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp import runs
from raydpp.cli import main
from raydpp.dpp.greedy import greedy_map
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import standardise
from raydpp.dpp.scale import median_gamma, residual_spread
from raydpp.errors import UserError
from raydpp.measure.stage import measure
from raydpp.runs import RunResult
from raydpp.select import distributed
from raydpp.select.cut import cut
from raydpp.select.request import Picked
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import SELECTION_SCHEMA, vectors, write_table


def features(table: str) -> tuple[list[str], np.ndarray]:
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    return rows["id"].to_pylist(), vectors(rows["gradient"])


def test_one_partition_is_exact_greedy_and_the_examples_come_with_it(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 0.25, partitions=1)
    ids, vectors = features(table)
    expected = greedy_map(vectors, 10, ids=ids, gamma=run.record["gamma"])
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
    assert picks[0]["quality"] == pytest.approx(standardise(lengths).max())


def test_mistakes_are_said_in_words(table: str, corpus: str, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    with pytest.raises(UserError, match="larger than the pool of 40"):
        select(table, out, 41)
    big = str(tmp_path / "big.parquet")
    write_table(Folder.at(tmp_path), "big.parquet", pq.read_table(Path(table) / "gradients").take(list(range(40)) * 2))
    with pytest.raises(UserError, match="rank at most 64"):
        select(big, out, 70, kernel="cosine", ridge=0.0)
    with pytest.raises(UserError, match="written by raydpp ingest"):
        select(corpus, out, 4)
    with pytest.raises(UserError, match="no folder"):
        select(str(tmp_path / "nowhere"), out, 4)
    with pytest.raises(UserError, match=r"quality weight is 1\.5"):
        select(table, out, 4, quality_weight=1.5)
    with pytest.raises(UserError, match="no budget: give --size, --tokens or --min-log-gain"):
        select(table, out)
    with pytest.raises(UserError, match="--method best: use one of greedy, random"):
        select(table, out, 4, method="best")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="a minimum for source 'third', and no such source: there are first, second"):
        select(table, str(tmp_path / "third"), 4, min_per_source=["third=1"])
    with pytest.raises(UserError, match="--quality loss=x"):
        select(table, out, 4, quality=["loss=x"])
    with pytest.raises(UserError, match=r"--keep-mix 1\.5: give a part of each source's share, from 0 to 1"):
        select(table, out, 4, keep_mix=1.5)
    with pytest.raises(UserError, match="to keep the mix of sources needs a size"):
        select(table, str(tmp_path / "tokens"), tokens=40, keep_mix=0.5)
    with pytest.raises(UserError, match="has no column 'charm'"):
        select(table, str(tmp_path / "charm"), 4, quality=["charm"], quality_weight=0.5)
    with pytest.raises(UserError, match="oversample"):
        select(table, out, 4, oversample=0.5)
    unfinished = tmp_path / "unfinished"
    unfinished.mkdir()
    (unfinished / "run.json").write_text((Path(table) / "run.json").read_text())
    with pytest.raises(UserError, match="unfinished"):
        select(str(unfinished), out, 4)


def picked(run: RunResult) -> list[str]:
    return pq.read_table(Path(run.out) / "selection")["id"].to_pylist()


def test_what_is_owned_is_completed_whether_by_table_or_by_ids(table: str, tmp_path: Path) -> None:
    whole = select(table, str(tmp_path / "whole"), 12, partitions=1)
    first = select(table, str(tmp_path / "first"), 5, partitions=1)
    (tmp_path / "ids.txt").write_text("\n".join([*picked(first), "unknown"]))
    (tmp_path / "none.txt").write_text("\n".join(picked(whole)[5:7]))
    owned: list[str]
    for name, owned in (("table", [first.out]), ("ids", [str(tmp_path / "ids.txt")])):
        rest = select(table, str(tmp_path / name), 7, owned=owned, partitions=1)
        assert picked(rest) == picked(whole)[5:]
        assert rest.record["log_det"] == pytest.approx(whole.record["log_det"] - first.record["log_det"])
        assert rest.record["counts"]["owned"] == 5
        assert rest.record["counts"]["owned_unknown"] == (1 if name == "ids" else 0)
    lines = f"{first.out}/examples.jsonl"
    for partitions in (1, 3):
        run = select(
            table, str(tmp_path / f"p{partitions}"), 7, owned=[lines], exclude=[str(tmp_path / "none.txt")],
            partitions=partitions,
        )  # fmt: skip
        assert not set(picked(run)) & set(picked(whole)[:7])


@pytest.mark.parametrize("partitions", [1, 3])
def test_budgets_of_tokens_and_quotas_hold_over_partitions(table: str, tmp_path: Path, partitions: int) -> None:
    rows = {row["id"]: row for row in pq.read_table(Path(table) / "gradients").to_pylist()}
    run = select(table, str(tmp_path / "tokens"), tokens=40, partitions=partitions)
    spent = sum(rows[one]["response_tokens"] for one in picked(run))
    assert 30 < spent <= 40
    run = select(
        table,
        str(tmp_path / "quotas"),
        10,
        min_per_source=["first=0.6"],
        max_per_source=["*=4", "first=7"],
        partitions=partitions,
    )
    sources = [rows[one]["source"] for one in picked(run)]
    assert len(sources) == 10
    assert 6 <= sources.count("first") <= 7
    run = select(table, str(tmp_path / "mix"), 10, keep_mix=1.0, partitions=partitions)
    assert [rows[one]["source"] for one in picked(run)].count("first") == 5  # as of the table, half
    run = select(table, str(tmp_path / "gain"), min_log_gain=-0.2, partitions=partitions)
    gains = pq.read_table(Path(run.out) / "selection")["log_gain"].to_numpy()
    assert 1 < len(gains) < 40
    assert gains.min() >= -0.2
    assert "less than -0.2" in run.record["stopped"]


def test_one_flag_compares_with_every_baseline(table: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = str(tmp_path / "out")
    assert main(["select", table, "--out", out, "--size", "10", "--compare"]) == 0
    record = json.loads((Path(out) / "run.json").read_text())
    found = {row["method"]: row for row in record["comparison"]}
    assert set(found) == {"greedy", "random", "quality", "length", "k-center", "k-means", "facility-location", "dedup"}
    assert all(row["examples"] <= 10 for row in found.values())
    assert found["greedy"]["log_det"] == pytest.approx(record["log_det"])
    assert found["greedy"]["log_det"] > found["random"]["log_det"]
    assert found["greedy"]["distance"] < found["random"]["distance"]
    assert found["length"]["quality"] == max(row["quality"] for row in found.values())
    shown = capsys.readouterr().out
    assert all(name in shown for name in found)
    assert "The same budget by other methods" in (Path(out) / "report.html").read_text()
    assert sorted(path.stem for path in (Path(out) / "plots").iterdir()) == ["curves", "gains", "lengths", "map", "mix"]
    aimed = {"target": [table], "quality_weight": 0.02}
    with_owned = select(table, str(tmp_path / "rest"), 6, owned=[out], compare=True, **aimed)  # type: ignore[arg-type]
    rows = {row["method"]: row for row in with_owned.record["comparison"]}
    assert rows["greedy"]["log_det"] != pytest.approx(with_owned.record["log_det"])  # of the set by itself
    assert {"round-robin", *found} == {*rows}
    lengths = {row["id"]: row["response_tokens"] for row in pq.read_table(Path(table) / "gradients").to_pylist()}
    alone = select(table, str(tmp_path / "alone"), 6, exclude=[out], method="round-robin", target=[table])
    tokens = [lengths[one] for one in picked(alone)]
    assert (rows["round-robin"]["tokens"], rows["round-robin"]["median_tokens"]) == (sum(tokens), np.median(tokens))


def test_a_baseline_writes_what_greedy_writes(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 6, method="k-center")
    assert run.record["oracle"] == "k-center"
    table_written = pq.read_table(Path(run.out) / "selection")
    assert table_written.schema.equals(SELECTION_SCHEMA)
    assert len((Path(run.out) / "examples.jsonl").read_text().splitlines()) == 6
    assert "k-center" in run.summary


def test_several_columns_make_a_quality(table: str, tmp_path: Path) -> None:
    run = select(table, str(tmp_path / "out"), 5, quality=["loss=-1", "response_tokens=3"], quality_weight=1.0)
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    score = -0.25 * standardise(rows["loss"].to_numpy()) + 0.75 * standardise(rows["response_tokens"].to_numpy())
    best = np.array(rows["id"].to_pylist())[np.lexsort((np.arange(40), -score))][:5]
    assert picked(run) == best.tolist()


@pytest.mark.parametrize("column", ["loss", "difficulty", "gradient_norm", "prompt_tokens"])
def test_every_number_that_extract_writes_is_a_quality(table: str, tmp_path: Path, column: str) -> None:
    run = select(table, str(tmp_path / "out"), 6, quality=[column], quality_weight=1.0)
    rows = pq.read_table(Path(table) / "gradients").sort_by("id")
    score = standardise(rows[column].to_numpy())
    best = np.lexsort((np.arange(len(rows)), -score))[:6]
    assert picked(run) == rows.take(pa.array(best))["id"].to_pylist()
    written = pq.read_table(Path(run.out) / "selection")["quality"].to_numpy()
    np.testing.assert_allclose(written, score[best], rtol=1e-6)
    assert column in pq.read_table(Path(run.out) / "gradients").column_names


@pytest.fixture
def rated(table: str, tmp_path: Path) -> tuple[str, str]:
    """The same table with a column of ratings, and a file of these ratings in another order and with more ids."""
    ratings = np.random.default_rng(0).integers(1, 9, 40).astype(float)
    rows: list[dict[str, Any]] = []
    for path in sorted((Path(table) / "gradients").glob("*.parquet")):
        part = pq.read_table(path)
        held = pa.array(ratings[len(rows) : len(rows) + len(part)])
        rows += [{"id": i, "rating": r} for i, r in zip(part["id"].to_pylist(), held.to_pylist(), strict=True)]
        write_table(
            *Folder.holding(str(tmp_path / "with" / "gradients" / path.name)), part.append_column("rating", held)
        )
    for name in ("run.json", "_SUCCESS"):
        (tmp_path / "with" / name).write_text((Path(table) / name).read_text())
    Folder.at(tmp_path).write_json_lines("ratings.jsonl", [*reversed(rows), {"id": "gone", "rating": 99.0}])
    return str(tmp_path / "with"), str(tmp_path / "ratings.jsonl")


@pytest.mark.parametrize(
    "options",
    [
        {"size": 9, "quality": ["rating=2", "loss=-1"], "quality_weight": 0.4},
        {"tokens": 45, "cost_column": "rating"},
        {"size": 6, "method": "length", "cost_column": "rating"},
        {"size": 6, "method": "quality", "quality": ["rating"], "compare": True},
    ],
    ids=["quality", "costs", "length", "compare"],
)
def test_a_file_of_scores_is_as_good_as_a_column(
    table: str, rated: tuple[str, str], tmp_path: Path, options: dict[str, Any]
) -> None:
    inside, file = rated
    one = select(inside, str(tmp_path / "inside"), partitions=2, **options)
    other = select(table, str(tmp_path / "joined"), partitions=2, scores=[file], **options)
    assert other.record["counts"] == one.record["counts"]
    assert one.record["counts"]["partitions"] == 2
    first, second = (pq.read_table(Path(run.out) / "selection") for run in (one, other))
    assert first.equals(second)
    kept, joined = (pq.read_table(Path(run.out) / "gradients") for run in (one, other))
    assert kept.equals(joined.select(kept.column_names))
    assert "rating" in joined.column_names
    assert one.record.get("comparison") == other.record.get("comparison")


def test_a_run_is_of_its_scores(table: str, rated: tuple[str, str], tmp_path: Path) -> None:
    file = Path(rated[1])
    command: dict[str, Any] = {"scores": [str(file)], "quality": ["rating"], "quality_weight": 0.5}
    out = str(tmp_path / "out")
    assert not select(table, out, 5, **command).repeated
    assert select(table, out, 5, **command).repeated
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines).replace('"rating": 3.0', '"rating": 8.0'))
    with pytest.raises(UserError, match="its input files have changed since"):
        select(table, out, 5, **command)
    file.write_text("".join(lines[1:]))
    with pytest.raises(UserError, match=r"1 of the 40 examples of out have no 'rating' in --scores"):
        select(table, str(tmp_path / "less"), 5, **command)
    (tmp_path / "unscored.txt").write_text(json.loads(lines[0])["id"])
    run = select(table, str(tmp_path / "less"), 5, exclude=[str(tmp_path / "unscored.txt")], **command)
    assert json.loads(lines[0])["id"] not in picked(run)
    file.write_text("".join([*lines[1:], lines[0].replace('"rating": ', '"rating": NaN, "was": ')]))
    with pytest.raises(UserError, match="quality values are NaN"):
        select(table, str(tmp_path / "nan"), 5, **command)


def test_ctrl_c_leaves_the_picks_so_far_and_cut_takes_them(
    table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = select(table, str(tmp_path / "whole"), 20, partitions=1)
    out = str(tmp_path / "out")
    real = distributed.distributed_greedy

    def interrupted(*arguments: Any, **options: Any) -> Picked:
        found = real(*arguments, **options)
        gains = found.selection.log_gains[:8]
        part = replace(found.selection, log_gains=gains, log_det=gains.sum(), stopped="interrupted after 8 picks")
        return Picked(found.rows.slice(0, 8), part, interrupted=True)

    with monkeypatch.context() as patch:
        patch.setattr(distributed, "distributed_greedy", interrupted)
        assert main(["select", table, "--out", out, "--size", "20", "--partitions", "1"]) == 130
    assert "raydpp cut" in capsys.readouterr().out
    with pytest.raises(UserError, match="unfinished"):
        runs.load_finished(["select"], Folder.at(out))
    part = cut(out, str(tmp_path / "part"), 8)
    assert picked(part) == picked(whole)[:8]
    again = select(table, out, 20, partitions=1)  # the same command again does all of it
    assert picked(again) == picked(whole)


def foreign(folder: Path, rows: int = 300) -> str:
    """A table as others write it: parts of other types, one of them empty, sources in the names of folders."""
    draw = np.random.default_rng(0)
    for number, (name, element) in enumerate((("source=a/1.pq", pa.float32()), ("source=b/2.PARQUET", pa.float16()))):
        points = draw.standard_normal((rows, 8))
        points /= np.linalg.norm(points, axis=1, keepdims=True)
        ids = pa.array(range(number * rows, (number + 1) * rows), [pa.int32(), pa.int64()][number])
        listed = pa.array(points.tolist(), pa.list_(element))
        (folder / name).parent.mkdir(parents=True)
        pq.write_table(pa.table({"id": ids, "v": listed, "response_tokens": ids}), folder / name)
    empty = pa.table({"id": ids, "v": listed, "response_tokens": ids}).slice(0, 0)
    pq.write_table(empty, folder / "source=a" / "0.parquet")
    (folder / "source=b" / "._2.parquet").write_text("what macOS writes beside it")
    return str(folder)


@pytest.mark.parametrize(("partitions", "exact"), [(1, False), (2, False), (2, True)])
def test_a_table_that_others_wrote_is_selected_from(
    partitions: int, exact: bool, cluster: None, tmp_path: Path
) -> None:
    table = foreign(tmp_path / "t")
    out = select(table, str(tmp_path / "out"), 20, feature_column="v", partitions=partitions, exact=exact).out
    picks = pq.read_table(tmp_path / "out" / "selection")
    assert set(picks["source"].to_pylist()) == {"a", "b"}
    assert len(set(picks["id"].to_pylist())) == 20
    found = measure([table, out], str(tmp_path / "measured"), feature_column="v", size=2, split_by_source=True).record
    assert {one["table"] for one in found["results"]} == {"a", "a (2)", "b", "b (2)"}
    half = select(table, str(tmp_path / "half"), 5, feature_column="v", owned=[out], exclude=[out]).record
    assert half["counts"]["owned"] == 20


def test_what_asks_for_nothing_is_refused_before_the_search(
    table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = str(tmp_path / "out")
    cheapest = min(pq.read_table(Path(table) / "gradients")["response_tokens"].to_pylist())
    with pytest.raises(UserError, match=f"--tokens {cheapest - 1}: the cheapest example costs {cheapest} "):
        select(table, out, tokens=cheapest - 1)
    assert select(table, str(tmp_path / "one"), tokens=cheapest).record["counts"]["rows"] == 1
    for wrong in (math.nan, math.inf, -math.inf):
        with pytest.raises(UserError, match="smallest log gain"):
            select(table, out, min_log_gain=wrong)
    for wrong_seed in (-1, 2**32):
        with pytest.raises(UserError, match=f"--seed {wrong_seed}: a seed is a whole number from 0"):
            select(table, out, 2, method="random", seed=wrong_seed)
        with pytest.raises(UserError, match=f"--reference-seeds {wrong_seed}: a seed"):
            measure([table], out, reference_seeds=[0, wrong_seed])
    (tmp_path / "ids.txt").write_text("none\nof\nthese\n")
    select(table, out, 2, exclude=[str(tmp_path / "ids.txt")])
    assert any("none of the 3 ids to exclude are in" in message for message in caplog.messages)


def test_a_fraction_of_1_is_the_whole(table: str, tmp_path: Path) -> None:
    assert select(table, str(tmp_path / "whole"), 1.0).record["counts"]["rows"] == 40
    assert select(table, str(tmp_path / "one"), 1).record["counts"]["rows"] == 1
    assert main(["select", table, "--size", "1.0", "--out", str(tmp_path / "again")]) == 0
    assert len(pq.read_table(tmp_path / "again" / "selection")) == 40
    with pytest.raises(UserError, match=r"--max-per-source first=1\.0: give SOURCE=NUMBER, or SOURCE=FRACTION below 1"):
        select(table, str(tmp_path / "quota"), 4, max_per_source=["first=1.0"])


def test_gamma_comes_from_the_data_and_is_said(table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "raydpp")
    ids, rows = features(table)
    auto = select(table, str(tmp_path / "auto"), 6, partitions=1)
    gamma = auto.record["gamma"]
    assert gamma == median_gamma(rows) != 1.0
    assert f"select: rbf kernel, gamma {gamma:g}" in caplog.text
    assert picked(auto) == [ids[i] for i in greedy_map(rows, 6, ids=ids, gamma=gamma).indices]
    assert f"rbf kernel, gamma {gamma:g}" in (Path(auto.out) / "README.md").read_text()
    named = select(table, str(tmp_path / "named"), 6, partitions=1, gamma=0.01)
    assert named.record["gamma"] == 0.01
    assert select(table, str(tmp_path / "cosine"), 6, kernel="cosine").record["gamma"] is None


def test_quality_is_weighed_by_the_spread_or_as_the_paper_does(table: str, tmp_path: Path) -> None:
    ids, rows = features(table)
    lengths = pq.read_table(Path(table) / "gradients").sort_by("id")["response_tokens"].to_numpy()
    run = select(table, str(tmp_path / "spread"), 6, quality_weight=0.4, gamma=0.25)
    unit = residual_spread(rows, 6, Kernel("rbf", 0.25))
    assert run.record["quality_unit"] == unit
    asked: dict[str, Any] = {"ids": ids, "gamma": 0.25, "quality_weight": 0.4}
    expected = greedy_map(rows, 6, quality=standardise(lengths), quality_unit=unit, **asked)
    assert picked(run) == [ids[i] for i in expected.indices]
    run = select(table, str(tmp_path / "quantiles"), 6, quality_weight=0.4, gamma=0.25, quality_scale="quantiles")
    assert run.record["quality_unit"] == 1.0
    low, high = np.quantile(lengths, [0.01, 0.99])
    expected = greedy_map(rows, 6, quality=((lengths - low) / (high - low)).clip(0, 1), **asked)
    assert picked(run) == [ids[i] for i in expected.indices]
