from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp import store
from raydpp.errors import UserError
from raydpp.store import Part


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "file.json"

    def broken(stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        store.write_whole(str(target), broken)
    assert not target.exists()
    store.write_json(str(target), {"a": 1})
    assert store.read_text(str(target)) == '{\n  "a": 1\n}\n'
    assert [path.name for path in target.parent.iterdir()] == ["file.json"]


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json(str(tmp_path / "x.json"), math.nan)


def test_gradients_are_a_plain_fixed_size_list(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    column = store.vector_array(values, pa.float16())
    table = pa.table({"id": ["a", "b", "c"], "gradient": column})
    store.write_table(str(tmp_path / "t.parquet"), table)
    back = pq.read_table(tmp_path / "t.parquet")
    assert back.schema.field("gradient").type.list_size == 4
    assert back.schema.field("gradient").type.value_type == pa.float16()
    np.testing.assert_array_equal(store.vectors(back["gradient"]), values)
    np.testing.assert_array_equal(store.vectors(pa.chunked_array([column[1:]])), values[1:])


def test_what_is_no_feature_column_is_refused() -> None:
    with pytest.raises(UserError, match="fixed-size list"):
        store.vectors(pa.chunked_array([pa.array([1.0])]))
    nulls = pa.array([[1.0, 2.0], None], pa.list_(pa.float32(), 2))
    with pytest.raises(UserError, match="1 rows have no feature"):
        store.vectors(pa.chunked_array([nulls]))


def test_parts_are_found_with_their_rows(tmp_path: Path) -> None:
    for name, rows in (("b", 2), ("a", 3)):
        pq.write_table(pa.table({"x": list(range(rows))}), tmp_path / f"{name}.parquet")
    parts = store.parquet_parts(str(tmp_path))
    assert [(Path(part.url).name, part.rows) for part in parts] == [("a.parquet", 3), ("b.parquet", 2)]
    assert store.parquet_parts(str(tmp_path / "a.parquet")) == [Part(str(tmp_path / "a.parquet"), 3)]
    with pytest.raises(UserError, match="no column 'y'; it has x"):
        store.read_columns(parts, ["y"])


def test_missing_empty_and_broken_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no table"):
        store.parquet_parts(str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="no Parquet file"):
        store.parquet_parts(str(tmp_path))
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        store.parquet_parts(str(tmp_path))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 50])
def test_partitions_hold_every_file_once_and_none_is_empty(count: int) -> None:
    parts = [Part(f"{n}", 1 + n % 4) for n in range(20)]
    groups = store.partitions(parts, count)
    assert [part for group in groups for part in group] == parts
    assert len(groups) == count if count < 10 else 10 < len(groups) <= 20
    assert all(groups)
    sizes = [sum(part.rows for part in group) for group in groups]
    assert max(sizes) - min(sizes) <= 8


def test_urls_keep_their_options() -> None:
    assert store.join("s3://bucket/out/?region=x", "a", "b.json") == "s3://bucket/out/a/b.json?region=x"
    assert store.join("runs/out", "a") == "runs/out/a"
