from __future__ import annotations

import gzip
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.cluster import Here
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective, Score, quantile_scale, robust_scale
from raydpp.dpp.scale import median_gamma, residual_spread
from raydpp.errors import UserError
from raydpp.select.inputs import (
    digest,
    find_owned,
    fit_objective,
    join_scores,
    quality_scales,
    read_scores,
    score_files,
    source_counts,
)
from raydpp.storage import Folder
from raydpp.tables import open_table, vectors, write_table


def rows_of(table: str) -> pa.Table:
    return pq.read_table(Path(table) / "gradients").sort_by("id")


def test_what_is_owned_comes_from_tables_parquet_and_files_of_ids(table: str, tmp_path: Path) -> None:
    rows = rows_of(table)
    ids, features = rows["id"].to_pylist(), vectors(rows["gradient"])
    write_table(Folder.at(tmp_path), "features.parquet", rows.take([3, 1]))
    write_table(Folder.at(tmp_path), "ids.parquet", rows.select(["id"]).take([7]))
    Folder.at(tmp_path).write_json_lines("ids.jsonl", [{"id": ids[9]}, {"id": "gone"}])
    (tmp_path / "ids.txt").write_text(f"{ids[1]}\n\n{ids[11]}\n")
    names = ("features.parquet", "ids.parquet", "ids.jsonl", "ids.txt")
    found = find_owned(Here(), [str(tmp_path / name) for name in names], [], open_table(table, "gradient"))
    assert (found.count, found.unknown) == (5, 1)
    np.testing.assert_array_equal(found.features, features[[1, 3, 7, 9, 11]])
    assert set(found.excluded.to_pylist()) == {*(ids[i] for i in (1, 3, 7, 9, 11)), "gone"}


def test_what_is_excluded_needs_no_features(table: str, tmp_path: Path) -> None:
    ids = rows_of(table)["id"].to_pylist()
    (tmp_path / "ids.txt").write_text(ids[4])
    found = find_owned(Here(), [], [str(tmp_path / "ids.txt"), table], open_table(table, "gradient"))
    assert found.features is None
    assert set(found.excluded.to_pylist()) == set(ids)
    assert find_owned(Here(), [], [], open_table(table, "gradient")).excluded.to_pylist() == []


def test_a_file_that_is_not_one_of_ids_is_refused(table: str, tmp_path: Path) -> None:
    opened = open_table(table, "gradient")
    with pytest.raises(UserError, match="there is no file or folder"):
        find_owned(Here(), [str(tmp_path / "nowhere.txt")], [], opened)
    (tmp_path / "bad.jsonl").write_text('{"name": 3}\n')
    with pytest.raises(UserError, match="not JSON lines with an id"):
        find_owned(Here(), [], [str(tmp_path / "bad.jsonl")], opened)


def test_what_a_sample_tells_of_the_objective(table: str) -> None:
    opened = open_table(table, "gradient")
    features = opened.sample(40)
    gamma, weighed = median_gamma(features), Objective(Kernel(), 0.5)
    assert fit_objective(Here(), opened, Objective(Kernel()), True, True, 8) == Objective(Kernel("rbf", gamma))
    unit = residual_spread(features, 8, Kernel("rbf", gamma))
    assert fit_objective(Here(), opened, weighed, True, True, 8) == Objective(Kernel("rbf", gamma), 0.5, unit)
    unit = residual_spread(features, 8, Kernel())
    assert fit_objective(Here(), opened, weighed, False, True, 8) == replace(weighed, quality_unit=unit)
    unit = residual_spread(features, 20, Kernel())
    assert fit_objective(Here(), opened, weighed, False, True) == replace(weighed, quality_unit=unit)
    unit = residual_spread(features, 8, Kernel("cosine"))
    assert fit_objective(Here(), opened, Objective(Kernel("cosine"), 0.5), True, True, 8) == Objective(
        Kernel("cosine"), 0.5, unit
    )
    for asked in (weighed, Objective(Kernel(), 1.0), Objective(Kernel("cosine"))):
        assert fit_objective(Here(), opened, asked, False, asked.quality_weight == 1) is asked


def test_scales_are_of_the_whole_table(table: str) -> None:
    lengths = rows_of(table)["response_tokens"].to_numpy()
    opened = open_table(table, "gradient")
    (score,) = quality_scales(Here(), opened, (Score("response_tokens", -2.0),))
    assert score.weight == -2.0
    assert (score.center, score.scale) == pytest.approx(robust_scale(lengths))
    assert quality_scales(Here(), opened, ()) == ()
    ratings = pa.table({"id": rows_of(table)["id"], "rating": np.arange(40.0) ** 2})
    joined = replace(opened, scores=ratings, scored=("rating",))
    both = quality_scales(Here(), joined, (Score("rating"), Score("response_tokens"), Score("rating", 0.5)))
    assert [(s.center, s.scale) for s in both] == [
        pytest.approx(robust_scale(values)) for values in (np.arange(40.0) ** 2, lengths, np.arange(40.0) ** 2)
    ]
    (bounded,) = quality_scales(Here(), opened, (Score("response_tokens"),), quantiles=True)
    assert (bounded.center, bounded.scale, bounded.bounded) == (*quantile_scale(lengths), True)
    with pytest.raises(UserError, match="has no column 'charm'"):
        quality_scales(Here(), opened, (Score("charm"),))


def test_rows_are_counted_by_source(table: str) -> None:
    assert source_counts(open_table(table, "gradient")) == {"first": 20, "second": 20}


NOBODY = pa.array([], pa.string())


def scores_in(*files: Path, columns: tuple[str, ...] = ("rating",)) -> dict[str, list]:
    return read_scores(score_files([str(file) for file in files]), columns).to_pydict()


def text(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def test_every_kind_of_file_says_the_same(tmp_path: Path) -> None:
    rows = [{"id": "b", "rating": 2, "note": "x"}, {"id": "007", "rating": 0.5, "note": "y"}]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    write_table(Folder.at(tmp_path / "folder"), "a.parquet", pa.Table.from_pylist(rows[:1]))
    write_table(Folder.at(tmp_path / "folder"), "b.parquet", pa.Table.from_pylist(rows[1:]))
    (tmp_path / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    for file in (
        tmp_path / "folder",
        tmp_path / "packed.jsonl.gz",
        text(tmp_path / "lines.jsonl", lines),
        text(tmp_path / "array.json", json.dumps(rows)),
        text(tmp_path / "commas.csv", "note,id,rating\nx,b,2\ny,007,0.5\n"),
    ):
        assert scores_in(file) == {"id": ["007", "b"], "rating": [0.5, 2.0]}, file


def test_ids_that_are_numbers_are_compared_as_text(tmp_path: Path) -> None:
    write_table(Folder.at(tmp_path), "a.parquet", pa.table({"id": [7, 12], "rating": [True, False]}))
    assert scores_in(tmp_path / "a.parquet") == {"id": ["12", "7"], "rating": [0.0, 1.0]}
    assert scores_in(text(tmp_path / "a.jsonl", '{"id": 7, "rating": 3}\n')) == {"id": ["7"], "rating": [3.0]}


def test_columns_may_come_from_several_files_and_files_may_share_one(tmp_path: Path) -> None:
    first = text(tmp_path / "1.csv", "id,rating\na,1\nb,2\n")
    second = text(tmp_path / "2.csv", "id,rating\nc,3\nd,4\n")
    third = text(tmp_path / "3.jsonl", "".join(f'{{"id": "{one}", "cost": 9}}\n' for one in "dca"))
    found = scores_in(first, second, third, columns=("cost", "rating", "elsewhere"))
    assert found == {"id": ["a", "c", "d"], "rating": [1.0, 3.0, 4.0], "cost": [9.0, 9.0, 9.0]}


def test_what_is_empty_or_null_is_no_score(tmp_path: Path) -> None:
    assert scores_in(text(tmp_path / "a.csv", "id,rating\na,\nb,2\n"))["id"] == ["b"]
    assert scores_in(text(tmp_path / "a.jsonl", '{"id": "a", "rating": null}\n{"id": "b", "rating": 2}\n'))["id"] == [
        "b"
    ]
    assert np.isnan(
        scores_in(text(tmp_path / "b.csv", "id,rating\na,nan\n"))["rating"]
    ).all()  # refused where it counts


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", "name,rating\na,1\n", "has no column 'id' to join its scores by; it has name, rating"),
        ("a.csv", "", "a.csv cannot be read: .*[Ee]mpty CSV"),
        ("a.csv", "id,other\na,1\n", "has id, other, but --quality and --cost-column name rating: name one"),
        ("a.csv", "id,rating\na,good\n", "the column 'rating' of .*a.csv does not hold numbers: .*good"),
        ("a.jsonl", '{"id": "a", "rating": [1]}\n', "the column 'rating' of .* does not hold numbers"),
        ("a.jsonl", '{"id": "a", "rating": 1}\n{"id": "b", "rating": "x"}\n', "cannot be read: .*rating"),
        ("a.jsonl", '{"id": "a", "rating": 1}\n{"id"\n', "a.jsonl cannot be read: JSON parse error"),
        ("a.jsonl", '{"rating": 1}\n{"id": "b", "rating": 2}\n', "1 rows of .* have no id"),
        ("a.csv", "id,rating\na,1\nb,2\na,1\n", "have the id a twice with 'rating'"),
        ("a.txt", "a\n", "unknown ending: --scores takes Parquet, CSV"),
    ],
)
def test_mistakes_in_a_file_are_said_in_words(tmp_path: Path, name: str, content: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        scores_in(text(tmp_path / name, content))


def test_mistakes_in_parquet_are_said_in_words(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_table(*Folder.holding(str(path)), pa.table({"name": ["a"], "rating": [1]}))
    with pytest.raises(UserError, match="has no column 'id'"):
        scores_in(path)
    write_table(*Folder.holding(str(path)), pa.table({"id": ["a"], "rating": ["good"]}))
    with pytest.raises(UserError, match="does not hold numbers"):
        scores_in(path)
    with pytest.raises(UserError, match="has id, rating, but"):
        scores_in(path, columns=("id", "other"))


def test_an_id_may_not_be_in_two_files(tmp_path: Path) -> None:
    one, other = (text(tmp_path / name, "id,rating\na,1\n") for name in ("1.csv", "2.csv"))
    with pytest.raises(UserError, match="have the id a twice with 'rating': keep one number for each id"):
        scores_in(one, other)


def test_a_digest_is_of_the_content(tmp_path: Path) -> None:
    file = text(tmp_path / "a.csv", "id,rating\na,1\n")
    before = digest(*score_files([str(file)]))
    file.write_text("id,rating\na,2\n")
    (after,) = map(digest, score_files([str(file)]))
    assert before != after
    file.write_text("id,rating\na,1\n")
    assert digest(*score_files([str(file)])) == before


def test_a_table_is_joined_whatever_the_order_of_the_file(
    table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_table(table, "gradient")
    ids = opened.read(opened.parts)["id"].to_pylist()
    files = score_files([str(written(tmp_path, [*reversed(ids), "gone", "lost"]))])
    with caplog.at_level(logging.INFO, "raydpp"):
        joined = join_scores(Here(), opened, files, ["rating", "loss"], NOBODY)
    assert "2 of the 42 ids in --scores are not in the table" in caplog.text
    assert joined.scored == ("rating",)
    found = joined.read(joined.parts[1:3], ["rating"])
    assert found["rating"].to_pylist() == [float(ids[::-1].index(one)) for one in found["id"].to_pylist()]
    assert join_scores(Here(), opened, [], ["rating"], NOBODY) is opened


def written(folder: Path, ids: list[str], name: str = "rating") -> Path:
    return text(folder / f"{name}.csv", "".join([f"id,{name}\n", *(f"{one},{n}\n" for n, one in enumerate(ids))]))


def test_an_example_without_a_score_is_refused_unless_it_may_not_be_picked(table: str, tmp_path: Path) -> None:
    opened = open_table(table, "gradient")
    ids = sorted(pq.read_table(Path(table) / "gradients")["id"].to_pylist())
    files = score_files([str(written(tmp_path, ids[3:]))])
    words = rf"2 of the 40 examples of out have no 'rating' in --scores, such as ({ids[1]}|{ids[2]}): .*--exclude"
    with pytest.raises(UserError, match=words):
        join_scores(Here(), opened, files, ["rating"], pa.array(ids[:1]))
    joined = join_scores(Here(), opened, files, ["rating"], pa.array(ids[:3]))
    assert joined.read(joined.parts, ["rating"])["id"].to_pylist() == ids[3:]
    assert joined.read(joined.parts)["id"].to_pylist() == ids


def test_a_column_that_the_table_has_too_is_refused(table: str, tmp_path: Path) -> None:
    opened = open_table(table, "gradient")
    files = score_files([str(written(tmp_path, opened.read(opened.parts)["id"].to_pylist(), "loss"))])
    with pytest.raises(UserError, match="--scores and out both have the column 'loss': give one of them another name"):
        join_scores(Here(), opened, files, ["loss"], NOBODY)
