from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.errors import RowError, UserError
from raydpp.ingest import convert
from raydpp.ingest.conversation import conversation_id, validated
from raydpp.ingest.convert import (
    IngestJob,
    SniffedFile,
    bucket_of,
    carried_types,
    forget_others,
    sniff,
    staged_before,
    staging_key,
)
from raydpp.ingest.files import RawFile, list_files, read_rows
from raydpp.ingest.rows import RawRow
from raydpp.ingest.schemas import ColumnNames, detect_schemas, schema_of
from raydpp.storage import Folder

SHARED = Path(__file__).parents[3] / "shared" / "data"


def seen(path: Path, *carry: str) -> SniffedFile:
    file = RawFile(Folder.at(path.parent), path.name, path.stat().st_size)
    return replace(sniff(file, "s", ColumnNames(), carry), key="key")


def test_sniffing_takes_the_columns_of_the_first_readable_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.b.jsonl"
    rows = [{"prompt": "p", "completion": "c", f"x{n}": 2} for n in range(30)]
    path.write_text("broken\n" + "".join(json.dumps(row) + "\n" for row in rows))
    assert seen(path).columns == ("prompt", "completion", *(f"x{n}" for n in range(20)))
    path.write_text("broken\n" * 2001 + '{"prompt": "p", "completion": "c"}\n')
    assert seen(path).columns == ()
    path.write_text("")
    assert seen(path).schemas == ()
    path.write_text('{"foo": 1}')
    with pytest.raises(UserError, match=r"a\.b\.jsonl: No known schema has these columns: foo"):
        seen(path)


def test_sniffing_tells_numbers_from_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "completion": "c", "n": n, "t": str(n), "mixed": [n, "x"][n % 2]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = seen(path, "n", "t", "mixed", "missing")
    assert [schema.name for schema in found.schemas] == ["prompt/completion"]
    assert found.numeric == {"n": True, "t": False, "mixed": False}


def test_a_carried_column_is_of_numbers_where_every_file_holds_numbers(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"n": 1, "m": 1, "e": None}, {"n": 2.5, "m": "2"}, {"n": None}]
    for number, row in enumerate(rows):
        (tmp_path / f"{number}.jsonl").write_text(json.dumps({"prompt": "p", "completion": "c", **row}) + "\n")
    files = [seen(path, "n", "m", "e") for path in sorted(tmp_path.iterdir())]
    assert carried_types(files, ["n", "m", "e"]) == {"n": pa.float64(), "m": pa.string(), "e": pa.string()}
    with pytest.raises(UserError, match="--carry x: no file has this column"):
        carried_types(files, ["n", "x"])


def test_one_row_becomes_conversations_and_reasons(tmp_path: Path) -> None:
    columns = ("instruction", "instances")
    file = SniffedFile(
        RawFile(Folder.at(tmp_path), "seeds.json", 1),
        "seeds",
        ColumnNames(),
        columns,
        detect_schemas(columns),
        {},
        "key",
    )
    job = IngestJob((file,), {"score": pa.float64()}, True, 8, Folder.at(tmp_path))
    instances = [{"input": "1", "output": "2</s>"}, {"input": "3", "output": " "}]
    raw = RawRow(7, {"instruction": "I", "instances": instances, "score": 3}, None)
    good, bad = job.convert_row(raw, 0)
    assert isinstance(good, dict)
    assert good["_marker"]
    assert (good["_file"], good["_row"], good["source"], good["score"]) == ("key", 7, "seeds", 3.0)
    assert good["messages"][-1] == {"role": "assistant", "content": "2"}
    assert good["id"] == conversation_id(good["messages"])
    assert bad == "the response is empty"
    worded = RawRow(8, {"instruction": "I", "instances": instances, "score": "much"}, None)
    (reason,) = job.convert_row(worded, 0)
    assert "numbers in the first rows" in reason
    assert list(job.convert_row(RawRow(9, None, "not JSON"), 0)) == ["not JSON"]


def test_a_file_is_staged_chunk_by_chunk_and_again_under_the_same_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_CHUNK", 2)
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "Q", "completion": f"{n}</s>"} for n in range(3)] + [{"prompt": "", "completion": "A"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = IngestJob((seen(path), seen(path)), {}, True, 8, Folder.at(tmp_path / "out"))
    counts = list(job.stage_file(1))
    assert counts == [
        {"rows": 2, "examples": 2, "rejects": 0, "markers": 2},
        {"rows": 2, "examples": 2, "rejects": 1, "markers": 1},
    ]
    names = [f"_staged/key/{name}" for name in ("000000000000.parquet", "000000000002.parquet", "whole.json")]
    assert job.out.files() == [*names, "rejects/key-000000000002.jsonl"]
    reject = {"file": str(path), "row": 3, "id": None, "reason": "the prompt is empty"}
    assert json.loads((tmp_path / "out" / "rejects" / "key-000000000002.jsonl").read_text()) == reject
    staged = {name: (tmp_path / "out" / name).read_bytes() for name in job.out.files()}
    assert list(job.stage_file(1)) == counts
    assert {name: (tmp_path / "out" / name).read_bytes() for name in job.out.files()} == staged
    whole = staged_before(job.out, "key")
    assert whole is not None
    assert whole["counts"] == {"rows": 4, "examples": 4, "rejects": 1, "markers": 3}
    assert list(replace(job, files=(replace(job.files[1], staged=whole),)).stage_file(0)) == [whole["counts"]]


def test_what_was_staged_of_a_file_is_forgotten_with_it(tmp_path: Path) -> None:
    out = Folder.at(tmp_path)
    names = ["corpus/p", "_staged/a/1", "_staged/b/1", "rejects/a-1", "rejects/b-1", "rejects/duplicates-p", "run.json"]
    for name in names:
        out.write_text(name, "")
    forget_others(out, {"b"})
    assert out.files() == ["_staged/b/1", "rejects/b-1", "run.json"]


def test_a_staging_key_changes_with_the_file_and_with_what_is_said_of_it(tmp_path: Path) -> None:
    file, names = RawFile(Folder.at(tmp_path), "a", 1, 2), ColumnNames(prompt="p")
    others = [
        staging_key(file, names, "x"),
        staging_key(replace(file, modified=3), names),
        staging_key(replace(file, bytes=3), names),
        staging_key(replace(file, name="b"), names),
        staging_key(file, replace(names, prompt="q")),
        staging_key(file, replace(names, roles={"a": "user"})),
    ]
    assert staging_key(file, names) == staging_key(replace(file), replace(names))
    assert len({*others, staging_key(file, names)}) == 7


def test_buckets_are_equal_ranges_of_ids_in_order() -> None:
    assert [bucket_of(first + "0" * 31, 4) for first in "0123456789abcdef"] == [n // 4 for n in range(16)]
    assert bucket_of("0" * 32, 7) == 0
    assert bucket_of("f" * 32, 7) == 6


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not there")
def test_real_data() -> None:
    rows, reasons, ids = 0, Counter[tuple[str, str]](), Counter[str]()
    for file in list_files([str(SHARED)]):
        schemas = sniff(file, "s", ColumnNames(), ()).schemas
        for raw in read_rows(file):
            rows += 1
            assert raw.value is not None, raw
            try:
                ids.update(
                    conversation_id(validated(messages)) for messages in schema_of(raw.value, schemas).read(raw.value)
                )
            except RowError as error:
                reasons[Path(file.url).name, str(error)] += 1
    assert rows == 43_172
    assert reasons == {
        ("codealpaca_instruction_input_output.json", "the response is empty"): 2,
        ("t0_prompt_completion.jsonl", "the response is empty but for an end-of-text marker"): 493,
    }
    assert ids.total() - len(ids) == 316  # three more share their turns, but not their tools


def job_of(path: Path, carried: dict[str, pa.DataType], source_column: str | None = None) -> IngestJob:
    return IngestJob((seen(path, *carried),), carried, True, 8, Folder.at(path.parent / "out"), source_column)


def converted(path: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any] | str]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    job = job_of(path, options.pop("carried", {}), **options)
    return [result for raw in read_rows(job.files[0].file) for result in job.convert_row(raw, 0)]


def test_every_column_that_no_conversation_is_made_of_is_kept(tmp_path: Path) -> None:
    row = {"prompt": "Q", "completion": "A", "id": 7, "source": "s", "tools": [{"name": "f"}], "none": None, "no": 0}
    row |= {"deep": {"list": [1, float("nan"), "é"]}, "system": "S", "big": 10**400, "label": True}
    (kept,) = converted(tmp_path / "a.jsonl", [row])
    assert isinstance(kept, dict)
    unused = {name: row[name] for name in ("id", "source", "tools", "no", "big", "label")}
    assert json.loads(kept["extra"]) == {**unused, "deep": {"list": [1, None, "é"]}}
    turn = {"role": "tool", "content": "rain", "name": "weather"}
    turns = [{"role": "user", "content": "Q"}, turn, {"role": "assistant", "content": "A"}]
    (kept,) = converted(tmp_path / "a.jsonl", [{"messages": turns}])
    assert isinstance(kept, dict)
    assert json.loads(kept["extra"]) == {"turns": [{}, {"name": "weather"}, {}]}
    assert kept["messages"][1] == {"role": "tool", "content": "rain"}


def test_what_parquet_holds_and_json_does_not_is_kept_as_text(tmp_path: Path) -> None:
    table = pa.table({"prompt": ["Q"], "completion": ["A"], "image": [b"\xff\x00"], "day": pa.array([0], pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    job = job_of(tmp_path / "a.parquet", {})
    (kept,) = job.convert_row(next(job.files[0].rows()), 0)
    assert isinstance(kept, dict)
    assert json.loads(kept["extra"]) == {"image": "/wA=", "day": "1970-01-01"}


@pytest.mark.parametrize(
    ("value", "kind", "reason"),
    [
        ("n\udc00", pa.string(), "'x' has text that is not valid Unicode"),
        (["n\udc00"], pa.string(), "'x' has text that is not valid Unicode"),
        (10**400, pa.float64(), "'x' holds a number too large"),
        ("much", pa.float64(), "'x' holds 'much', but numbers"),
    ],
)
def test_a_value_that_cannot_be_carried_costs_its_row(tmp_path: Path, value: Any, kind: Any, reason: str) -> None:
    rows = [{"prompt": "Q", "completion": "A", "x": 1}, {"prompt": "Q2", "completion": "A", "x": value}]
    kept, rejected = converted(tmp_path / "a.jsonl", rows, carried={"x": kind})
    assert isinstance(kept, dict)
    assert reason in str(rejected)
    if kind == pa.string():  # it could not be kept either
        assert reason in str(converted(tmp_path / "a.jsonl", rows)[1])


def test_not_a_number_is_no_value(tmp_path: Path) -> None:
    row = {"prompt": "Q", "completion": "A", "x": float("nan")}
    (kept,) = converted(tmp_path / "a.jsonl", [row], carried={"x": pa.float64()})
    assert isinstance(kept, dict)
    assert kept["x"] is None
    assert kept["extra"] is None


def test_a_source_can_come_from_a_column(tmp_path: Path) -> None:
    names = ("gsm", None, "", 7, "n\udc00")
    rows = [{"prompt": f"Q{n}", "completion": "A", "set": name} for n, name in enumerate(names)]
    *kept, rejected = converted(tmp_path / "a.jsonl", rows, source_column="set")
    assert [row["source"] for row in kept if isinstance(row, dict)] == ["gsm", "s", "s", "7"]
    assert "'set' has text" in str(rejected)


def test_rows_of_several_schemas_in_one_file_are_all_kept(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    table = pa.Table.from_pylist(
        [
            {"instruction": "Q", "output": "A0", "question": None, "answer": None, "messages": None},
            {"instruction": None, "output": None, "question": "Q", "answer": "A1", "messages": None},
            {"instruction": None, "output": None, "question": None, "answer": None, "messages": chat},
        ]
    )
    pq.write_table(table, tmp_path / "a.parquet")
    job = job_of(tmp_path / "a.parquet", {})
    found = [result for raw in job.files[0].rows() for result in job.convert_row(raw, 0)]
    assert [row["messages"][1]["content"] for row in found if isinstance(row, dict)] == ["A0", "A1", "A"]


def test_what_is_trained_on_is_part_of_the_id(tmp_path: Path) -> None:
    asks = {"role": "user", "content": "2+2?"}
    answers: list[dict[str, Any]] = [
        {"role": "assistant", "content": "4"},
        {"role": "assistant", "content": "4", "weight": 1},
        {"role": "assistant", "content": "4", "reasoning_content": "two and two"},
        {"role": "assistant", "content": "4", "thinking": "count"},
    ]
    first = [{"messages": [asks, {**answers[0], "weight": weight}, asks, answers[0]]} for weight in (0, 1)]
    kept = converted(tmp_path / "a.jsonl", [*({"messages": [asks, answer]} for answer in answers), *first])
    ids = [row["id"] for row in kept if isinstance(row, dict)]
    assert ids[0] == ids[1]
    assert len(set(ids)) == len(ids) - 1 == 5
