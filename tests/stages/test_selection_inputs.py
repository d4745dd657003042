from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp import store
from raydpp.errors import UserError
from raydpp.selection.quality import Score, robust_scale
from raydpp.stages.selection_inputs import expand_quotas, find_owned, parse_quotas, quality_scales, source_counts
from raydpp.stages.tables import open_table


def rows_of(table: str) -> pa.Table:
    return pq.read_table(Path(table) / "gradients").sort_by("id")


def test_what_is_owned_comes_from_tables_parquet_and_files_of_ids(table: str, tmp_path: Path) -> None:
    import ray

    rows = rows_of(table)
    ids, vectors = rows["id"].to_pylist(), store.vectors(rows["gradient"])
    store.write_table(str(tmp_path / "features.parquet"), rows.take([3, 1]))
    store.write_table(str(tmp_path / "ids.parquet"), rows.select(["id"]).take([7]))
    store.write_json_lines(str(tmp_path / "ids.jsonl"), [{"id": ids[9]}, {"id": "gone"}])
    (tmp_path / "ids.txt").write_text(f"{ids[1]}\n\n{ids[11]}\n")
    names = ("features.parquet", "ids.parquet", "ids.jsonl", "ids.txt")
    found = find_owned([str(tmp_path / name) for name in names], [], open_table(table, "gradient"))
    assert (found.count, found.unknown) == (5, 1)
    np.testing.assert_array_equal(ray.get(found.features), vectors[[1, 3, 7, 9, 11]])
    assert set(found.excluded.to_pylist()) == {*(ids[i] for i in (1, 3, 7, 9, 11)), "gone"}


def test_what_is_excluded_needs_no_features(table: str, tmp_path: Path) -> None:
    ids = rows_of(table)["id"].to_pylist()
    (tmp_path / "ids.txt").write_text(ids[4])
    found = find_owned([], [str(tmp_path / "ids.txt"), table], open_table(table, "gradient"))
    assert found.features is None
    assert set(found.excluded.to_pylist()) == set(ids)
    assert find_owned([], [], open_table(table, "gradient")).excluded.to_pylist() == []


def test_a_file_that_is_not_one_of_ids_is_refused(table: str, tmp_path: Path) -> None:
    opened = open_table(table, "gradient")
    with pytest.raises(UserError, match="there is no file or folder"):
        find_owned([str(tmp_path / "nowhere.txt")], [], opened)
    (tmp_path / "bad.jsonl").write_text('{"name": 3}\n')
    with pytest.raises(UserError, match="not JSON lines with an id"):
        find_owned([], [str(tmp_path / "bad.jsonl")], opened)


def test_scales_are_of_the_whole_table(table: str) -> None:
    import ray

    lengths = rows_of(table)["response_tokens"].to_numpy()
    opened = open_table(table, "gradient")
    (score,) = quality_scales(opened, (Score("response_tokens", -2.0),))
    assert score.weight == -2.0
    assert (score.center, score.scale) == pytest.approx(robust_scale(lengths))
    assert quality_scales(opened, ()) == ()
    ratings = pa.table({"id": rows_of(table)["id"], "rating": np.arange(40.0) ** 2})
    joined = replace(opened, scores=ray.put(ratings), scored=("rating",))
    both = quality_scales(joined, (Score("rating"), Score("response_tokens"), Score("rating", 0.5)))
    assert [(s.center, s.scale) for s in both] == [
        pytest.approx(robust_scale(values)) for values in (np.arange(40.0) ** 2, lengths, np.arange(40.0) ** 2)
    ]
    with pytest.raises(UserError, match="has no column 'charm'"):
        quality_scales(opened, (Score("charm"),))


def test_quotas_are_numbers_or_fractions_and_the_star_is_written_out(table: str) -> None:
    assert parse_quotas("--minimum", ["a=3", "b=c=0.25", "*=0"], 10) == {"a": 3.0, "b=c": 3.0, "*": 0.0}
    assert parse_quotas("--maximum", ["a=0.25"], 10) == {"a": 2.0}
    for text in ("a", "=3", "a=x", "a=-1", "a=1.5"):
        with pytest.raises(UserError, match="give SOURCE=NUMBER"):
            parse_quotas("--minimum", [text], 10)
    with pytest.raises(UserError, match="a fraction is one of --size"):
        parse_quotas("--maximum", ["a=0.5"], None)
    assert expand_quotas({"a": 2.0, "*": 1.0}, ["a", "b"], "--minimum") == {"a": 2.0, "b": 1.0}
    with pytest.raises(UserError, match="--minimum names the source 'c'; the table has a, b"):
        expand_quotas({"c": 2.0}, ["b", "a"], "--minimum")
    assert source_counts(open_table(table, "gradient")) == {"first": 20, "second": 20}
