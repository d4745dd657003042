from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.storage import Folder
from raydpp.tables import (
    STEP,
    GradientTable,
    Part,
    by_source,
    ids_named,
    open_table,
    parquet_at,
    parquet_parts,
    partition_files,
    read_columns,
    same_fingerprint,
    vector_array,
    vectors,
    write_table,
)


def test_gradients_are_a_plain_fixed_size_list(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    column = vector_array(values, pa.float16())
    table = pa.table({"id": ["a", "b", "c"], "gradient": column})
    write_table(Folder.at(tmp_path), "t.parquet", table)
    back = pq.read_table(tmp_path / "t.parquet")
    assert back.schema.field("gradient").type.list_size == 4
    assert back.schema.field("gradient").type.value_type == pa.float16()
    np.testing.assert_array_equal(vectors(back["gradient"]), values)
    np.testing.assert_array_equal(vectors(pa.chunked_array([column[1:]])), values[1:])


def directions(rows: int, dimension: int, seed: int = 0) -> np.ndarray:
    points = np.random.default_rng(seed).standard_normal((rows, dimension))
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True))


def test_whole_numbers_keep_cosines_and_take_few_bits(tmp_path: Path) -> None:
    common, own = directions(1, 4096), directions(50, 4096, 1)
    points = directions(50, 4096, 2) + common + own
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    column = vector_array(points, pa.int8())
    write_table(Folder.at(tmp_path), "t.parquet", pa.table({"gradient": column}))
    assert 8 * (tmp_path / "t.parquet").stat().st_size / points.size < 4.2
    stored = vectors(pa.chunked_array([column]))
    assert stored.dtype == np.int8
    again = vectors(pa.chunked_array([vector_array(stored, pa.float32())]))
    np.testing.assert_allclose(np.linalg.norm(again, axis=1), 1, rtol=1e-6)
    pairs = np.triu_indices(50, 1)
    exact, found = ((x @ x.T)[pairs] for x in (points, again))
    np.testing.assert_allclose(found, exact / (1 + STEP**2 / 12), atol=5 * STEP / math.sqrt(6 * 4096))
    assert (found / exact).mean() == pytest.approx(1 / (1 + STEP**2 / 12), abs=0.003)


def test_a_large_coordinate_is_not_cut_off() -> None:
    points = directions(3, 1000)
    points[1, 7] = 1.5  # 47 standard deviations
    stored = vectors(pa.chunked_array([vector_array(points, pa.int8())])).astype(float)
    unit = points / np.linalg.norm(points, axis=1, keepdims=True)
    assert (stored[1] @ unit[1]) / np.linalg.norm(stored[1]) > 0.98
    empty = np.zeros((2, 8))  # a row with a reason instead of a feature; it is dropped later
    assert not vectors(pa.chunked_array([vector_array(empty, pa.int8())])).any()


def test_tables_of_whole_numbers_and_of_unit_vectors_go_together(tmp_path: Path) -> None:
    points = directions(2, 64)
    for name, element in (("a", pa.int8()), ("b", pa.float32())):
        pq.write_table(
            pa.table({"id": [name], "gradient": vector_array(points[:1], element)}), tmp_path / f"{name}.parquet"
        )
    opened = open_table(str(tmp_path), "gradient")
    assert opened.kind == pa.list_(pa.float32(), 64)
    one, two = vectors(opened.read(opened.parts)["gradient"])
    assert np.linalg.norm(one) == pytest.approx(1)
    assert one @ two > 0.98
    as_whole = replace(opened, kind=pa.list_(pa.int8(), 64))  # what is owned is read as the candidates are
    one, two = vectors(as_whole.read(opened.parts)["gradient"])
    np.testing.assert_array_equal(one, two)


def test_what_is_no_feature_column_is_refused() -> None:
    for other in (pa.array([1.0]), pa.array([["a"]]), pa.array([[[1.0]]]), pa.array([b"12"])):
        with pytest.raises(UserError, match="lists of numbers"):
            vectors(pa.chunked_array([other]))
    with pytest.raises(UserError, match=r"different numbers of dimensions \(1 to 2\)"):
        vectors(pa.chunked_array([pa.array([[1.0], [1.0, 2.0]])]))
    with pytest.raises(UserError, match="1 entries of features are null"):
        vectors(pa.chunked_array([pa.array([[1.0, None]])]))
    nulls = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    with pytest.raises(UserError, match="1 rows have no feature"):
        vectors(pa.chunked_array([nulls]))


def test_parts_are_found_with_their_rows(tmp_path: Path) -> None:
    for name, rows in (("b", 2), ("a", 3)):
        pq.write_table(pa.table({"x": list(range(rows))}), tmp_path / f"{name}.parquet")
    parts = parquet_parts(Folder.at(tmp_path))
    assert [(part.name, part.rows) for part in parts] == [("a.parquet", 3), ("b.parquet", 2)]
    assert parquet_at(str(tmp_path)) == parts
    assert parquet_at(str(tmp_path / "a.parquet")) == parts[:1]
    assert str(parts[0]) == str(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="no column 'y'; it has x"):
        read_columns(parts, ["y"])


def test_a_file_whose_pages_are_torn_is_named(tmp_path: Path) -> None:
    write_table(Folder.at(tmp_path), "a.parquet", pa.table({"id": [f"{n}" for n in range(99)]}))
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[4:60] = bytes(56)
    (tmp_path / "a.parquet").write_bytes(content)
    (part,) = parquet_parts(Folder.at(tmp_path))
    with pytest.raises(UserError, match=r"a\.parquet cannot be read, its footer is whole"):
        part.read(["id"])


def test_a_file_with_pickled_objects_is_refused(tmp_path: Path) -> None:
    field = pa.field("messages", pa.large_binary(), metadata={"ARROW:extension:name": "ray.data.arrow_pickled_object"})
    pq.write_table(pa.table([["a"], [b"x"]], pa.schema([("id", pa.string()), field])), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet is not a readable .*pickled Python objects, which can run code"):
        parquet_parts(Folder.at(str(tmp_path)))


def test_a_store_that_does_not_answer_is_no_torn_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")

    write_table(Folder.at(tmp_path), "a.parquet", pa.table({"id": ["a"]}))
    (part,) = parquet_parts(Folder.at(tmp_path))
    monkeypatch.setattr(pq, "read_table", away)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        part.read(["id"])


def test_missing_empty_and_broken_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no table"):
        parquet_parts(Folder.at(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no Parquet file"):
        parquet_parts(Folder.at(tmp_path))
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        parquet_parts(Folder.at(tmp_path))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_partitions_hold_every_file_once_and_none_is_empty(count: int) -> None:
    parts = [Part(Folder.at("/"), f"{n}", 1 + n % 4) for n in range(20)]
    groups = partition_files(parts, count)
    assert [part for group in groups for part in group] == parts
    assert len(groups) == count if count < 10 else 10 < len(groups) <= 20
    assert all(groups)
    sizes = [sum(part.rows for part in group) for group in groups]
    assert max(sizes) - min(sizes) <= 8


def written(folder: Path, name: str = "table", files: int = 1) -> str:
    for n in range(files):
        vectors = np.eye(4, dtype=np.float32)
        columns = {"id": [f"{3 - i}{n}" for i in range(4)], "source": ["b", "a", "b", "b"], "other": [1, 2, 3, 4]}
        table = pa.table({**columns, "gradient": vector_array(vectors, pa.float32())})
        write_table(Folder.at(folder / name), f"{n}.parquet", table)
    return str(folder / name / "0.parquet")


def test_a_plain_file_is_a_table_read_in_the_order_of_ids(tmp_path: Path) -> None:
    opened = open_table(written(tmp_path), "gradient")
    assert (opened.name, opened.rows, opened.dimension) == ("0.parquet", 4, 4)
    assert (opened.fingerprint, opened.corpus) == (None, None)
    found = opened.read(opened.parts)
    assert found["id"].to_pylist() == ["00", "10", "20", "30"]
    assert found.column_names == ["id", "source", "gradient"]


def test_a_table_by_its_sources(tmp_path: Path) -> None:
    small, large = by_source(open_table(written(tmp_path), "gradient"))
    assert [(small.name, small.rows), (large.name, large.rows)] == [("a", 1), ("b", 3)]
    assert small.read(small.parts)["id"].to_pylist() == ["20"]


def test_scores_are_columns_of_the_table_and_rows_without_them_are_left_out(cluster: None, tmp_path: Path) -> None:
    import ray

    scores = pa.table({"id": ["00", "20", "30", "99"], "rating": [0.5, 2.0, 3.0, 9.0]})
    opened = replace(open_table(written(tmp_path), "gradient"), scores=ray.put(scores), scored=("rating",))
    assert opened.has("rating")
    assert opened.has("other")
    assert not opened.has("charm")
    found = opened.read(opened.parts, ["rating", "other", "rating"])
    assert found.column_names == ["id", "source", "gradient", "rating", "other"]
    assert found.select(["id", "rating"]).equals(scores.slice(0, 3))
    assert found["other"].to_pylist() == [4, 2, 1]
    assert opened.read(opened.parts)["id"].to_pylist() == ["00", "10", "20", "30"]
    assert opened.read_columns(opened.parts, ["rating"]).to_pydict() == {"rating": [3.0, 2.0, 0.5]}
    with pytest.raises(UserError, match="has no column 'charm'"):
        opened.read(opened.parts, ["rating", "charm"])


def test_a_run_is_opened_by_its_folder_with_what_it_was_made_of(table: str, corpus: str) -> None:
    opened = open_table(table, "gradient")
    assert (opened.rows, opened.dimension, opened.corpus) == (40, 64, corpus)
    assert opened.fingerprint is not None
    assert len(opened.parts) > 1


def test_a_run_whose_files_have_other_rows_than_it_wrote_is_refused(table: str, tmp_path: Path) -> None:
    changed = Path(shutil.copytree(table, tmp_path / "changed"))
    first = next((changed / "gradients").iterdir())
    pq.write_table(pq.read_table(first).slice(1), first)
    with pytest.raises(UserError, match=r"changed has 39 rows, and its run\.json says 40: a file of it was changed"):
        open_table(str(changed), "gradient")


def test_different_fingerprints_are_refused_by_the_field_that_differs(tmp_path: Path) -> None:
    plain = open_table(written(tmp_path), "gradient")
    one: GradientTable = replace(plain, name="one", fingerprint={"model": "m", "dtype": "float32"})
    other = replace(one, name="other", fingerprint={"model": "m", "dtype": "bfloat16"})
    same_fingerprint([one, one, plain])
    with pytest.raises(UserError, match=r"one and other cannot be compared: their dtype differs \(float32 and bfloat"):
        same_fingerprint([one, other])
    with pytest.raises(UserError, match="their dtype differs"):
        same_fingerprint([one, other], but=["optimizer"])
    same_fingerprint(
        [replace(one, fingerprint={"model": "m", "dtype": "float32", "optimizer": "adam"}), one], ["optimizer"]
    )
    with pytest.raises(UserError, match="4 dimensions and other 8"):
        same_fingerprint([one, replace(other, kind=pa.list_(pa.float32(), 8))])


def test_mistakes_are_said_in_words(tmp_path: Path) -> None:
    path = written(tmp_path)
    with pytest.raises(UserError, match=r"no column 'x'; it has id, source, other, gradient.*--feature-column"):
        open_table(path, "x")
    with pytest.raises(UserError, match="not lists of numbers"):
        open_table(path, "other")
    with pytest.raises(UserError, match="there is no folder"):
        open_table(str(tmp_path / "none"), "gradient")
    (tmp_path / "damaged.parquet").write_text("no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        open_table(str(tmp_path / "damaged.parquet"), "gradient")


POINTS = np.eye(4, dtype=np.float32)
VECTORS: dict[str, pa.Array] = {
    "fixed-size list": vector_array(POINTS, pa.float32()),
    "half precision": vector_array(POINTS, pa.float16()),
    "double precision": vector_array(POINTS, pa.float64()),
    "list": pa.array(POINTS.tolist(), pa.list_(pa.float32())),
    "large list": pa.array(POINTS.tolist(), pa.large_list(pa.float64())),
    "integers": pa.array(POINTS.astype(int).tolist(), pa.list_(pa.int8())),
    "Arrow's tensor": pa.FixedShapeTensorArray.from_numpy_ndarray(POINTS),
    "Arrow's tensor of two dimensions": pa.FixedShapeTensorArray.from_numpy_ndarray(POINTS.reshape(4, 2, 2)),
}


@pytest.mark.parametrize("kind", VECTORS)
def test_vectors_of_every_kind_are_read(kind: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": list("abcd"), "gradient": VECTORS[kind]}), tmp_path / "t.parquet")
    opened = open_table(str(tmp_path / "t.parquet"), "gradient")
    assert (opened.rows, opened.dimension) == (4, 4)
    np.testing.assert_array_equal(vectors(opened.read(opened.parts)["gradient"]), POINTS)
    column = pa.chunked_array([VECTORS[kind][:1], VECTORS[kind][1:]])
    np.testing.assert_array_equal(vectors(column), POINTS)


def test_tensors_that_ray_wrote_are_read(cluster: None, tmp_path: Path) -> None:
    import ray

    rows = ray.data.from_numpy(POINTS).map(lambda row: {"id": str(row["data"].argmax()), "gradient": row["data"]})
    rows.write_parquet(str(tmp_path / "t"))
    opened = open_table(str(tmp_path / "t"), "gradient")
    np.testing.assert_array_equal(vectors(opened.read(opened.parts)["gradient"]), POINTS)


def test_files_of_different_types_make_one_table(tmp_path: Path) -> None:
    identities = [pa.array([1], pa.int32()), pa.array([2], pa.int64()), pa.array(["c"], pa.string_view())]
    identities += [pa.array(["d"]).dictionary_encode(), pa.array(["e"], pa.large_string())]
    sources = [pa.array([7]), pa.nulls(1), pa.array(["a"]), pa.array(["a"]).dictionary_encode(), None]
    kinds = ["half precision", "fixed-size list", "list", "large list", "integers"]
    for n, (ids, source, kind) in enumerate(zip(identities, sources, kinds, strict=True)):
        columns = {"id": ids, "gradient": VECTORS[kind][:1], "loss": pa.array([n], [pa.int32(), pa.float64()][n % 2])}
        if source is not None:
            columns["source"] = source
        (folder := tmp_path / "t" / ("source=e%20f" if source is None else "")).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), folder / f"{n}.parquet")
    pq.write_table(pa.table(columns).slice(0, 0), tmp_path / "t" / "empty.parquet")
    opened = open_table(str(tmp_path / "t"), "gradient")
    assert opened.kind == pa.list_(pa.float64(), 4)
    assert len(opened.parts) == 5  # the empty one is none
    read = opened.read(opened.parts, ["loss"]).sort_by("id")
    assert read["id"].to_pylist() == ["1", "2", "c", "d", "e"]
    assert read["source"].to_pylist() == ["7", "(no source)", "a", "a", "e f"]
    np.testing.assert_array_equal(vectors(read["gradient"]), np.repeat(POINTS[:1], 5, axis=0))
    assert {table.name: table.rows for table in by_source(opened)} == {"7": 1, "(no source)": 1, "a": 2, "e f": 1}
    assert [one.read(one.parts).num_rows for one in by_source(opened)] == [1, 1, 2, 1]


def test_files_that_do_not_go_together_are_named(tmp_path: Path) -> None:
    def folder_of(**columns: pa.Array) -> str:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        pq.write_table(pa.table({"id": ["a"], "gradient": VECTORS["list"][:1]}), folder / "a.parquet")
        pq.write_table(pa.table({"id": ["b"], "gradient": VECTORS["list"][1:2]} | columns), folder / "b.parquet")
        return str(folder)

    opened = open_table(folder_of(gradient=pa.array([[1.0, 0.0]])), "gradient")
    with pytest.raises(UserError, match=r"b\.parquet has features of 2 dimensions, other files of 4"):
        opened.read(opened.parts)
    with pytest.raises(UserError, match=r"'gradient' of .*b\.parquet is string, not lists of numbers"):
        open_table(folder_of(gradient=pa.array(["x"])), "gradient")
    opened = open_table(folder_of(id=pa.nulls(1, pa.string())), "gradient")
    with pytest.raises(UserError, match=r"1 rows of .*b\.parquet have no id"):
        opened.read(opened.parts)
    pq.write_table(pa.table({"id": ["a"], "gradient": VECTORS["list"][:1]}).slice(0, 0), tmp_path / "none.parquet")
    with pytest.raises(UserError, match=r"none\.parquet has no rows"):
        open_table(str(tmp_path / "none.parquet"), "gradient")


def test_files_are_known_by_their_names(tmp_path: Path) -> None:
    for name in ("a.PARQUET", "b.pq", "c.parquet", "._c.parquet", "_metadata.parquet", ".tmp/d.parquet", "e.txt"):
        (tmp_path / "t" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "t" / name).write_text("no Parquet")
    for name in ("a.PARQUET", "b.pq", "c.parquet"):
        pq.write_table(pa.table({"id": [name], "gradient": VECTORS["list"][:1]}), tmp_path / "t" / name)
    assert [part.name for part in open_table(str(tmp_path / "t"), "gradient").parts] == [
        "a.PARQUET",
        "b.pq",
        "c.parquet",
    ]
    for name in ("a.PARQUET", "b.pq"):
        assert open_table(str(tmp_path / "t" / name), "gradient").rows == 1


def test_a_sample_comes_from_all_over_a_table_of_others(tmp_path: Path) -> None:
    for n in range(12):
        rows = pa.table({"id": [f"{n:02d}{i}" for i in range(5)], "v": [[float(n), float(i)] for i in range(5)]})
        write_table(Folder.at(tmp_path), f"{n:02d}.parquet", rows)
    table = open_table(str(tmp_path), "v")
    assert len(table.some_parts(3)) == 8
    own = replace(table, fingerprint={"model": "m"})  # whose files are random partitions
    assert [len(own.some_parts(rows)) for rows in (3, 5, 6, 58, 60, 99)] == [1, 1, 2, 12, 12, 12]
    found = table.sample(30)
    assert found.shape == (30, 2)
    assert len({tuple(row) for row in found.tolist()}) == 30
    assert len(set(found[:, 0])) == 8
    np.testing.assert_array_equal(found, table.sample(30))
    assert table.sample(100).shape == (60, 2)


def test_a_file_of_ids_is_lines_or_json_lines_wherever_it_is(tmp_path: Path) -> None:
    folder = Folder.at(f"file://{tmp_path}/ids?use_mmap=false")
    folder.write_text("ids.jsonl", '{"id": "b"}\n{"id": "a"}\n')
    folder.write_text("ids.txt", "c\n\n a \n")
    urls = [folder.url_of("ids.jsonl"), folder.url_of("ids.txt"), f"file://{tmp_path}/ids/ids.jsonl?use_mmap=false"]
    assert ids_named(urls, "gradient") == ["a", "b", "c"]
