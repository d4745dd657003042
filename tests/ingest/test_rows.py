from __future__ import annotations

import bz2
import gzip
import io
import json
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.ingest import rows as rows_module
from raydpp.ingest.rows import DAMAGE, Kind, RawRow, kind_of, rows_of
from raydpp.ingest.schemas import is_row


def read(data: bytes | str, name: str) -> list[RawRow]:
    kind = kind_of(name)
    assert kind is not None
    return list(rows_of(Raw(data.encode() if isinstance(data, str) else data), kind, is_row))


class Raw(io.RawIOBase):
    """Bytes as an unbuffered file."""

    def __init__(self, data: bytes) -> None:
        self.data = io.BytesIO(data)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self.data.seek(offset, whence)

    def tell(self) -> int:
        return self.data.tell()

    def readinto(self, buffer: Any) -> int:
        return self.data.readinto(buffer)


def outcome(rows: list[RawRow]) -> list[tuple[int, Any]]:
    """Each row's number with its value, or else its reason."""
    assert all((row.value is None) != (row.reason is None) for row in rows)
    return [(row.row, row.reason if row.value is None else row.value) for row in rows]


class Trap:
    """Writes a file where it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["a.parquet", "file.arrow", "stream.arrow"])
def test_pickled_objects_are_not_read(name: str, nested: bool, tmp_path: Path) -> None:
    # Ray Data, where it is loaded, unpickles them as it makes rows of them: nobody's file may run code
    from ray.data.extensions import ArrowPythonObjectType

    kind = ArrowPythonObjectType()
    column = pa.ExtensionArray.from_storage(kind, pa.array([pickle.dumps(Trap(tmp_path / "ran"))], kind.storage_type))
    table = pa.table({"a": pa.StructArray.from_arrays([column], ["b"]) if nested else column})
    sink = io.BytesIO()
    if name == "a.parquet":
        pq.write_table(table, sink)
    else:
        with (pa.ipc.new_file if name == "file.arrow" else pa.ipc.new_stream)(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DAMAGE, match="pickled Python objects, which can run code"):
        read(sink.getvalue(), name)
    assert not (tmp_path / "ran").exists()
    table.to_pylist()
    assert (tmp_path / "ran").exists()  # the trap is one


def until_damage(rows: Iterator[RawRow]) -> tuple[list[Any], Exception]:
    """The values before the damage, and the damage."""
    values = []
    try:
        for row in rows:
            values.append(row.value)
    except DAMAGE as damage:
        return values, damage
    pytest.fail("nothing is broken")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bucket/a.jsonl", Kind(".jsonl", None)),
        ("/A.JSON.GZ", Kind(".json", "gzip")),
        ("a.v2.ndjson.zst", Kind(".ndjson", "zstd")),
        ("a.tsv.bz2", Kind(".tsv", "bz2")),
        ("a.parquet", Kind(".parquet", None)),
        ("a.parquet.gz", None),
        ("a.txt", None),
        ("a.gz", None),
        (".jsonl/readme", None),
    ],
)
def test_kind_of(name: str, kind: Kind | None) -> None:
    assert kind_of(name) == kind


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson", "a.json"])
def test_json_lines_number_their_lines(name: str) -> None:
    data = '\ufeff{"a": "\u2028\x85\\n"}\r\n\n  \r\n{"a": "é"}\n[1]\n{"a": \n"text"\n{"a": 1e400, "b": null}\n'
    rows = read(data.encode() + b'{"a": "\xff"}\n{"a": 2}', name)
    first, second, *wrong, last = outcome(rows)
    assert first == (0, {"a": "\u2028\x85\n"})
    assert second == (3, {"a": "é"})
    assert [row for row, _ in wrong] == [4, 5, 6, 7, 8]
    assert wrong[0][1] == wrong[2][1] == "the record is not an object with columns"
    assert wrong[1][1].startswith("the line is not JSON: Expecting value")
    assert wrong[3][1] == {"a": float("inf"), "b": None}
    assert wrong[4][1] == "the line is not UTF-8"
    assert last == (9, {"a": 2})


def test_what_json_itself_cannot_hold_costs_one_line() -> None:
    rows = read('{"a": ' + "[" * 100_000 + "\n" + '{"a": ' + "9" * 5000 + "}\n{}", "a.jsonl")
    assert [row.value for row in rows] == [None, None, {}]
    assert all("not JSON" in str(row.reason) for row in rows[:2])


def test_a_line_has_a_longest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "MAX_RECORD", 10)
    rows = outcome(read('{"a":1}\n{"a":"' + "x" * 95 + '"}\n{"b":23}\n{"b":234}\n{"c":1}', "a.jsonl"))
    assert rows[0] == (0, {"a": 1})
    assert rows[1] == (1, "the line is longer than 10 bytes")
    assert rows[2:] == [(2, {"b": 23}), (3, {"b": 234}), (4, {"c": 1})]


RECORDS = [{"a": "\u2028 é"}, {"a": "2", "b": None}]


@pytest.mark.parametrize(
    "document",
    [
        json.dumps(RECORDS),
        json.dumps(RECORDS, indent=2, ensure_ascii=False),
        "\ufeff\n" + json.dumps(RECORDS),
        json.dumps({"version": "1", "data": RECORDS}),
        json.dumps({"version": "1", "data": RECORDS}, indent=4),
        '{"data":\n' + json.dumps(RECORDS) + "}",
        '{"data": [\n' + ",\n".join(json.dumps(record) for record in RECORDS) + "\n]}\n",
        "\n".join(json.dumps(record) for record in RECORDS),
        "\n".join(json.dumps(record, indent=1) for record in RECORDS),
    ],
)
def test_json_files_of_every_shape(document: str) -> None:
    assert outcome(read(document, "a.json")) == list(enumerate(RECORDS))


def test_a_json_file_of_one_record_is_that_record() -> None:
    for record in ({"prompt": "Q"}, {"messages": [{"role": "user", "content": "Q"}]}):
        assert outcome(read(json.dumps(record), "a.json")) == [(0, record)]
        assert outcome(read(json.dumps(record, indent=2), "a.json")) == [(0, record)]


def test_an_array_goes_on_after_a_bad_record() -> None:
    rows = outcome(read(b'[{"a": "\xff"}, 3, {"a": 1}]', "a.json"))
    assert rows == [
        (0, "the record is not UTF-8"),
        (1, "the record is not an object with columns"),
        (2, {"a": 1}),
    ]


def test_a_malformed_first_line_does_not_cost_the_others() -> None:
    rows = read('{"a": "x\n{"a": 1}\n{"a": 2}\n', "a.json")
    assert [(row.row, row.value) for row in rows] == [(0, None), (1, {"a": 1}), (2, {"a": 2})]


def test_csv() -> None:
    data = '\ufeffq,a\r\n"x, ""y""\nz\u2028",1\r\n\r\n,\r\nonly\r\n1,2,3\r\n"open"x,1\r\nlast,é'
    assert outcome(read(data, "a.csv")) == [
        (0, {"q": 'x, "y"\nz\u2028', "a": "1"}),
        (1, {"q": "", "a": ""}),
        (2, "the row has 1 fields, the header has 2"),
        (3, "the row has 3 fields, the header has 2"),
        (4, "the row is not CSV: ',' expected after '\"'"),
        (5, {"q": "last", "a": "é"}),
    ]
    assert outcome(read(b"q\ta\n1,5\t\xff\nx\ty", "a.tsv")) == [
        (0, "the row is not UTF-8"),
        (1, {"q": "x", "a": "y"}),
    ]
    long = "x" * 1_000_000
    assert outcome(read(f"q,a\n{long},1\n", "a.csv")) == [(0, {"q": long, "a": "1"})]
    assert read("", "a.csv") == read("q,a\n", "a.csv") == []


def test_a_quote_left_open_costs_the_rows_it_swallows() -> None:
    assert outcome(read('q,a\n1,2\n"x,3\ny,4\n', "a.csv")) == [
        (0, {"q": "1", "a": "2"}),
        (1, "the row is not CSV: unexpected end of data"),
    ]


@pytest.mark.parametrize("header", [b"q,q\n1,2\n", b"q,\xff\n1,2\n"])
def test_a_csv_header_has_to_name_every_column(header: bytes) -> None:
    with pytest.raises(DAMAGE, match="header"):
        read(header, "a.csv")


def parquet(table: pa.Table, **options: Any) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer, **options)
    return buffer.getvalue()


def test_parquet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_BATCH", 2)
    values = [{"messages": [{"role": "user", "content": f"{n}"}], "n": n} for n in range(7)]
    data = parquet(pa.Table.from_pylist(values), row_group_size=3)
    assert outcome(read(data, "a.parquet")) == list(enumerate(values))
    assert read(parquet(pa.table({"a": pa.array([], pa.string())})), "a.parquet") == []


def test_a_bad_value_costs_one_row_of_parquet() -> None:
    text = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    rows = read(parquet(pa.table({"a": text})), "a.parquet")
    assert [(row.row, row.value) for row in rows] == [(0, {"a": "a"}), (1, None), (2, {"a": "c"})]
    assert "cannot be read" in str(rows[1].reason)


LINES = b"".join(b'{"n": %d}\n' % n for n in range(20_000))
COMPRESSED = {
    ".gz": gzip.compress(LINES),
    ".bz2": bz2.compress(LINES),
    ".zst": pa.Codec("zstd").compress(LINES, asbytes=True),
}


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_compressed_text(suffix: str) -> None:
    twice = read(COMPRESSED[suffix] * 2, "a.jsonl" + suffix)  # members one after the other
    assert [row.value for row in twice] == [{"n": n} for n in range(20_000)] * 2
    assert read(COMPRESSED[suffix], "a.json" + suffix) == twice[:20_000]


@pytest.mark.parametrize("suffix", COMPRESSED)
def test_a_truncated_stream_gives_its_rows_so_far(suffix: str) -> None:
    cut = COMPRESSED[suffix][:-20]
    seen, damage = until_damage(rows_of(Raw(cut), Kind(".jsonl", rows_module.CODECS[suffix]), is_row))
    assert any(word in str(damage) for word in ("runcated", "ended before"))
    assert seen == [{"n": n} for n in range(len(seen))]
    if suffix != ".bz2":  # its blocks are larger than this file
        assert len(seen) > 10_000


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.zst", "a.csv.bz2", "a.parquet"])
def test_what_is_not_what_its_name_says(name: str) -> None:
    with pytest.raises(DAMAGE):
        read(b"PK\x03\x04 not at all what it says", name)


def test_corrupt_parquet_gives_its_rows_so_far() -> None:
    table = pa.table({"a": [f"{n}" * 50 for n in range(2000)]})
    data = bytearray(parquet(table, row_group_size=1000, compression="zstd", use_dictionary=False))
    start = pq.ParquetFile(io.BytesIO(bytes(data))).metadata.row_group(1).column(0).data_page_offset
    data[start : start + 200] = b"\xff" * 200
    seen, _ = until_damage(rows_of(Raw(bytes(data)), Kind(".parquet", None), is_row))
    assert len(seen) == 1000


def test_an_array_named_for_json_lines_is_read_as_one() -> None:
    records = [{"a": n} for n in range(3)]
    for text in (
        json.dumps(records),
        "\ufeff\n" + json.dumps(records, indent=1),
        "\n".join(map(json.dumps, [records])),
    ):
        assert [row.value for row in read(text, "a.jsonl")] == records
    pretty = "\n".join(json.dumps(record, indent=1) for record in records)
    assert [row.value for row in read(pretty, "a.ndjson")] == records


@pytest.mark.parametrize("zeros", [1, 7, 512, 100_000])
def test_zeros_behind_a_gzip_cost_nothing(zeros: int) -> None:
    lines = b"".join(b'{"n": %d}\n' % n for n in range(5_000))
    assert len(read_bytes(gzip.compress(lines) + bytes(zeros), "a.jsonl.gz")) == 5_000
    assert len(read_bytes(gzip.compress(lines) + gzip.compress(lines) + bytes(zeros), "a.jsonl.gz")) == 10_000
    seen, damage = until_damage(rows_of(Raw(gzip.compress(lines) + b"tail"), Kind(".jsonl", "gzip"), is_row))
    assert len(seen) == 5_000
    assert "gzip" in str(damage)


def read_bytes(data: bytes, name: str) -> list[RawRow]:
    kind = kind_of(name)
    assert kind is not None
    return list(rows_of(Raw(data), kind, is_row))


@pytest.mark.parametrize("new", [pa.ipc.new_stream, pa.ipc.new_file])
def test_arrow(new: Any) -> None:
    table = pa.table({"a": [[{"x": n}] for n in range(3_000)], "b": pa.array(["q"] * 3_000, pa.large_string())})
    sink = io.BytesIO()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1_700)
    found = read_bytes(sink.getvalue(), "data-00000-of-00001.arrow")
    assert [row.value for row in found] == table.to_pylist()
    assert [row.row for row in found] == list(range(3_000))
    with pytest.raises(DAMAGE):
        read("no Arrow at all", "a.arrow")
    assert kind_of("a.arrow.gz") is None
