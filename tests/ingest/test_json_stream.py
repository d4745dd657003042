from __future__ import annotations

import io
import json
from typing import Any

import pytest

from raydpp.ingest import json_stream
from raydpp.ingest.json_stream import BrokenJson, read_records
from raydpp.ingest.schemas import is_row


def values(text: str) -> list[Any]:
    return [value for value, _ in read_records(io.StringIO(text), is_row)]


RECORDS = [
    {"text": 'a "quoted" \\ \u2028 [{', "n": 12.5e3, "deep": {"list": [1, [], {}]}},
    {},
    12345,
    None,
    "é" * 9,
]


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 2**16])
@pytest.mark.parametrize("indent", [None, 2])
def test_chunks_leave_no_trace(chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_CHUNK", chunk)
    for ensure_ascii in (True, False):
        array = json.dumps(RECORDS, indent=indent, ensure_ascii=ensure_ascii)
        assert values(f" {array}\n") == RECORDS
        assert (
            values('{"version": [1, 2], "data": ' + json.dumps(RECORDS[:2], indent=indent) + ', "n": 1}') == RECORDS[:2]
        )


def test_an_array_is_read_as_it_comes() -> None:
    class Slow(io.StringIO):
        fetched = 0

        def read(self, size: int | None = -1) -> str:
            self.fetched += 1
            return super().read(20)

    text = Slow("[" + '{"a": 1}, ' * 1000 + "{}]")
    records = read_records(text, is_row)
    assert next(records) == ({"a": 1}, True)
    assert text.fetched < 5
    assert len(list(records)) == 1000


@pytest.mark.parametrize(
    ("text", "records"),
    [
        ("", []),
        ("[]", []),
        ("[ ]\n[1]", [1]),
        ("{}", [{}]),
        ('{"prompt": "Q", "completion": "A"}', [{"prompt": "Q", "completion": "A"}]),
        (
            '{"prompt": "Q", "tags": ["x", "y"], "none": []}',
            [{"prompt": "Q", "tags": ["x", "y"], "none": []}],
        ),
        ('{"messages": [{"role": "user"}]}', [{"messages": [{"role": "user"}]}]),
        ('{"train": [{"a": 1}, 2]}', [{"a": 1}, 2]),
        ('{"version": 1, "train": [{"a": 1}], "features": {"x": [{"y": 1}]}, "n": []}', [{"a": 1}]),
        ('{"tools": [{"a": 1}], "messages": []}', [{"tools": [{"a": 1}], "messages": []}]),
        (
            '{"a": [{}], "b": [{}], "prompt": "", "completion": ""}',
            [{"a": [{}], "b": [{}], "prompt": "", "completion": ""}],
        ),
        ('{\n"a": 1\n}\n{\n"a": 2\n}', [{"a": 1}, {"a": 2}]),
    ],
)
def test_shapes_of_documents(text: str, records: list[Any]) -> None:
    assert values(text) == records


@pytest.mark.parametrize(
    ("text", "before", "message"),
    [
        ('[{"a": 1}, {"a": 2', 1, "delimiter"),
        ('[{"a": 1}, {"a": "x', 1, "Unterminated"),
        ('[{"a": 1} {"a": 2}]', 1, "expected ',', found '{'"),
        ('[{"a": 1}', 1, "expected ',', found the end"),
        ('[{"a": 1}, oops, {"a": 2}]', 1, "Expecting value"),
        ('[{"a": 1}] tail', 1, "cannot begin with 't'"),
        ("[" * 100_000, 0, "recursion"),
        ("[" + "9" * 5000 + "]", 0, "digits"),
        ("{1: 2}", 0, "key"),
        ('{"a": [{"x": 1}], "b": [{"x": 2}]}', 0, "'a' and 'b'"),
    ],
)
def test_a_broken_document_gives_what_came_before(text: str, before: int, message: str) -> None:
    records = read_records(io.StringIO(text), is_row)
    for _ in range(before):
        next(records)
    with pytest.raises(BrokenJson, match=message):
        next(records)


def test_bytes_that_are_not_utf8_cost_one_record() -> None:
    text = b'[{"a": "x"}, {"a": "\xff"}, {"a": "\xc3\xa9"}]'.decode("utf-8", errors="surrogateescape")
    assert [intact for _, intact in read_records(io.StringIO(text), is_row)] == [True, False, True]
    for broken in (b'{"\xff": 1}', b'{"a": ["\xff"]}', b'{"a": "\xff"}'):
        text = broken.decode("utf-8", errors="surrogateescape")
        assert [intact for _, intact in read_records(io.StringIO(text), is_row)] == [False]


def test_a_record_has_a_largest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "MAX_RECORD", 1000)
    monkeypatch.setattr(json_stream, "_CHUNK", 100)
    with pytest.raises(BrokenJson, match="within 1,000 characters"):
        values('["' + "x" * 10_000 + '"]')


@pytest.mark.parametrize(
    "row",
    [
        {"shots": [{"a": 1}], "question": "Q", "answer": "A"},
        {"a": [{}], "b": [{}], "prompt": "", "completion": ""},
        {"tools": [{"name": "f"}], "conversations": [{"from": "human"}], "id": 1},
        {"instruction": "I", "instances": [{"input": "", "output": "O"}], "examples": [{"x": 1}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_an_object_with_the_keys_of_a_row_is_one_whatever_lists_it_holds(row: Any, indent: int | None) -> None:
    assert values(json.dumps(row, indent=indent) * 2) == [row, row]


def test_an_object_too_large_to_be_held_gives_the_records_of_its_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_stream, "_WHOLE", 200)
    monkeypatch.setattr(json_stream, "_CHUNK", 50)
    records = [{"a": n} for n in range(100)]
    assert values(json.dumps({"version": 1, "tags": ["x"] * 50, "data": records})) == records
    row = {"question": "Q", "answer": "A", "shots": records}
    assert values(json.dumps(row)) == [row]
    text = json.dumps({"data": [{"a": "\udcff" if n == 7 else "x"} for n in range(9)]}, ensure_ascii=False)
    for most in (20, 1_000):  # in pieces, and whole
        monkeypatch.setattr(json_stream, "_WHOLE", most)
        assert [intact for _, intact in read_records(io.StringIO(text), is_row)] == [n != 7 for n in range(9)]
