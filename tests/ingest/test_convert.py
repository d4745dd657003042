from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest

from raydpp.errors import RowError
from raydpp.ingest.conversation import conversation_id, validated
from raydpp.ingest.convert import IngestJob, SniffedFile, convert_row, sniff
from raydpp.ingest.files import RawFile, list_files, read_rows
from raydpp.ingest.rows import RawRow
from raydpp.ingest.schemas import ColumnNames, detect_schema
from raydpp.storage import Folder

SHARED = Path(__file__).parents[3] / "shared" / "data"


def seen(path: Path, *carry: str) -> SniffedFile:
    return sniff(RawFile(Folder.at(path.parent), path.name, path.stat().st_size), ColumnNames(), carry)


def test_sniffing_takes_the_columns_of_the_first_readable_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.b.jsonl"
    path.write_text("broken\n" + "".join(json.dumps({"prompt": "p", f"completion{n}": 2}) + "\n" for n in range(30)))
    assert seen(path).columns == ("prompt", *(f"completion{n}" for n in range(20)))
    assert seen(path).source == "a"
    assert "prompt" in (seen(path).error or "")
    path.write_text("broken\n" * 2001 + '{"prompt": "p", "completion": "c"}\n')
    assert seen(path).columns == ()
    path.write_text("")
    assert seen(path).format_name is None


def test_sniffing_tells_numbers_from_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "completion": "c", "n": n, "t": str(n), "mixed": [n, "x"][n % 2]} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = seen(path, "n", "t", "mixed", "missing")
    assert found.format_name == "prompt/completion"
    assert found.numbers == {"n"}
    assert found.texts == {"t", "mixed"}


def test_one_row_becomes_conversations_and_rejects(tmp_path: Path) -> None:
    columns = ("instruction", "instances")
    item = SniffedFile(RawFile(Folder.at(tmp_path), "seeds.json", 1), "seeds", columns, "self-instruct")
    plan = IngestJob((item,), ColumnNames(), {"score": pa.float64()}, True, Folder.at(tmp_path))
    form = detect_schema(columns)
    instances = [{"input": "1", "output": "2</s>"}, {"input": "3", "output": " "}]
    raw = RawRow(7, {"instruction": "I", "instances": instances, "score": 3}, None)
    (good,), (bad,) = convert_row(raw, form, item, plan)
    assert good["marker"]
    assert (good["row"], good["source"], good["score"]) == (7, "seeds", 3.0)
    assert good["messages"][-1] == {"role": "assistant", "content": "2"}
    assert good["id"] == conversation_id(good["messages"])
    assert (bad["file"], bad["row"]) == (str(tmp_path / "seeds.json"), 7)
    assert "empty" in bad["reason"]
    worded = RawRow(8, {"instruction": "I", "instances": instances, "score": "much"}, None)
    assert "numbers in the first rows" in convert_row(worded, form, item, plan)[1][0]["reason"]
    assert convert_row(RawRow(9, None, "not JSON"), form, item, plan)[1][0]["reason"] == "not JSON"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data is not there")
def test_real_data() -> None:
    rows, reasons, ids = 0, Counter[tuple[str, str]](), Counter[str]()
    for file in list_files([str(SHARED)]):
        schema = detect_schema(sniff(file, ColumnNames(), ()).columns)
        for raw in read_rows(file):
            rows += 1
            assert raw.value is not None, raw
            try:
                ids.update(conversation_id(validated(messages)) for messages in schema.read(raw.value))
            except RowError as error:
                reasons[Path(file.url).name, str(error)] += 1
    assert rows == 43_172
    assert reasons == {
        ("codealpaca_instruction_input_output.json", "the response is empty"): 2,
        ("t0_prompt_completion.jsonl", "the response is empty but for an end-of-text marker"): 493,
    }
    assert ids.total() - len(ids) == 316  # three more share their turns, but not their tools
