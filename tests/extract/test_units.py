from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.extract.sample import Sample
from raydpp.extract.units import Piece, Unit, drop_absent, plan_units, scan_output, unit_rows
from raydpp.storage import Folder
from raydpp.tables import Part, parquet_parts, write_table


def ids(start: int, stop: int) -> list[str]:
    return [f"{n:04d}" for n in range(start, stop)]


@pytest.fixture
def sample(tmp_path: Path) -> Sample:
    """Two corpus files of ten rows with the ids 0000 to 0019."""
    for name, first in (("a", 0), ("b", 10)):
        table = pa.table({"id": ids(first, first + 10), "source": ["s"] * 10})
        write_table(Folder.at(tmp_path / "corpus"), f"{name}.parquet", table)
    return Sample(tuple(parquet_parts(Folder.at(tmp_path / "corpus"))), 20)


def write_part(out: Path, name: str, rows: list[str]) -> None:
    table = pa.table(
        {
            "id": rows,
            "prompt_tokens": [3] * len(rows),
            "response_tokens": [2] * len(rows),
            "truncated": [True] * len(rows),
        }
    )
    write_table(Folder.at(out / "gradients"), f"{name}.parquet", table)


def write_rejects(out: Path, name: str, rows: list[str]) -> None:
    Folder.at(out / "rejects").write_json_lines(f"{name}.jsonl", [{"id": i, "reason": "a\u2028b"} for i in rows])


def test_what_is_done_is_read_from_the_tables_and_the_rejects(tmp_path: Path) -> None:
    assert len(scan_output(Folder.at(tmp_path)).ids) == 0
    write_part(tmp_path, "one", ids(3, 5))
    write_rejects(tmp_path, "one", ids(1, 3))
    write_rejects(tmp_path, "two", ids(9, 10))
    done = scan_output(Folder.at(tmp_path))
    assert [i.decode() for i in done.ids] == [*ids(1, 5), "0009"]
    assert done.counts == {"rows": 2, "rejects": 3, "tokens": 10, "response_tokens": 4, "truncated": 2}


def test_what_a_crash_tore_is_set_aside_and_its_rows_are_done_again(
    sample: Sample, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = Folder.at(tmp_path)
    for name, rows in (("whole", ids(0, 4)), ("cut", ids(4, 6)), ("empty", ids(6, 8)), ("pages", ids(8, 10))):
        write_part(tmp_path, name, rows)
    write_part(tmp_path, "._whole", ids(0, 4))  # what macOS leaves beside a file
    folder = tmp_path / "gradients"
    (folder / "cut.parquet").write_bytes((folder / "cut.parquet").read_bytes()[:-9])
    (folder / "empty.parquet").write_bytes(b"")
    pages = bytearray((folder / "pages.parquet").read_bytes())
    pages[4:80] = bytes(76)
    (folder / "pages.parquet").write_bytes(pages)
    write_rejects(tmp_path, "one", ids(10, 12))
    write_rejects(tmp_path, "torn", ids(12, 14))
    out.write_text("rejects/torn.jsonl", (out.read_text("rejects/torn.jsonl") or "")[:-7])
    done = scan_output(out)
    assert [i.decode() for i in done.ids] == [*ids(0, 4), *ids(10, 12)]
    for name in ("cut.parquet", "empty.parquet", "pages.parquet", "torn.jsonl"):
        assert caplog.text.count(f"{name} was torn and is set aside") == 1
        assert [path.name for path in tmp_path.rglob(f"{name}*")] == [f"{name}.torn"]
    planned = [i for unit in plan_units(sample, done, 30) for i in unit.read(["id"])["id"].to_pylist()]
    assert planned == [*ids(4, 10), *ids(12, 20)]
    caplog.clear()
    scan_output(out)
    assert not caplog.text


def test_a_store_that_does_not_answer_sets_nothing_aside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*_: Any, **__: Any) -> Any:
        raise OSError("When reading: AWS Error NETWORK_CONNECTION during GetObject operation")

    write_part(tmp_path, "one", ids(0, 2))
    monkeypatch.setattr(pq, "read_table", away)
    with pytest.raises(OSError, match="NETWORK_CONNECTION"):
        scan_output(Folder.at(tmp_path))
    assert [path.name for path in (tmp_path / "gradients").iterdir()] == ["one.parquet"]


def test_the_plan_holds_every_row_that_is_not_done_once(sample: Sample, tmp_path: Path) -> None:
    write_part(tmp_path, "one", ["0001", "0004", "0012"])
    write_rejects(tmp_path, "one", ["0019"])
    units = plan_units(sample, scan_output(Folder.at(tmp_path)), 3, "me")
    assert [[len(piece.rows) for piece in unit.pieces] for unit in units] == [[3], [3], [2, 1], [3], [3], [1]]
    assert [unit.name for unit in units[:3]] == ["part-0000-me", "part-0005-me", "part-0008-me"]
    planned = [i for unit in units for i in unit.read(["id"])["id"].to_pylist()]
    assert planned == [i for i in ids(0, 20) if i not in ("0001", "0004", "0012", "0019")]
    write_part(tmp_path, "two", planned)
    assert plan_units(sample, scan_output(Folder.at(tmp_path)), 3) == []


def test_an_example_that_is_done_twice_is_named_with_its_two_files(tmp_path: Path) -> None:
    write_part(tmp_path, "one", ids(0, 3))
    write_part(tmp_path, "two", ids(2, 4))
    with pytest.raises(UserError, match=r"0002 in .*one.parquet and .*two.parquet: delete one"):
        scan_output(Folder.at(tmp_path))


def test_what_is_done_must_belong_to_the_corpus(sample: Sample, tmp_path: Path) -> None:
    write_part(tmp_path, "one", ["0001", "foreign"])
    with pytest.raises(UserError, match="1 of the examples that are done"):
        plan_units(sample, scan_output(Folder.at(tmp_path)), 3)


def test_a_corpus_of_many_files_that_grew_by_few_rows_makes_few_units(tmp_path: Path) -> None:
    for file in range(10):
        table = pa.table({"id": [f"{file}{n}" for n in range(5)], "source": ["s"] * 5})
        write_table(Folder.at(tmp_path / "corpus"), f"{file}.parquet", table)
    sample = Sample(tuple(parquet_parts(Folder.at(tmp_path / "corpus"))), 50)
    write_part(tmp_path, "one", [f"{file}{n}" for file in range(10) for n in range(5) if n != file % 5])
    (unit,) = plan_units(sample, scan_output(Folder.at(tmp_path)), 16)
    assert unit.read(["id"])["id"].to_pylist() == [f"{file}{file % 5}" for file in range(10)]


def test_what_the_corpus_does_not_have_any_more_is_dropped(sample: Sample, tmp_path: Path) -> None:
    out = Folder.at(tmp_path)

    def table(rows: list[str], source: str) -> pa.Table:
        return pa.table({"id": rows, "source": [source] * len(rows), "gradient": [[1.0]] * len(rows)})

    write_table(out, "gradients/kept.parquet", table(["0001", "0019"], "s"))
    write_table(out, "gradients/some.parquet", table(["0002", "gone", "0003"], "s"))
    write_table(out, "gradients/none.parquet", table(["gone2"], "s"))
    write_table(out, "gradients/renamed.parquet", table(["0004"], "old"))
    rejects = [{"id": name, "source": "s", "reason": "r"} for name in ("0005", "gone3")]
    out.write_json_lines("rejects/some.jsonl", rejects)
    out.write_json_lines("rejects/none.jsonl", rejects[1:])
    untouched = (tmp_path / "gradients" / "kept.parquet").stat().st_mtime_ns
    assert drop_absent(sample, out) == 4
    left = pq.read_table(tmp_path / "gradients")
    assert sorted(left["id"].to_pylist()) == ["0001", "0002", "0003", "0004", "0019"]
    assert set(left["source"].to_pylist()) == {"s"}
    assert out.read_text("rejects/some.jsonl") == '{"id": "0005", "source": "s", "reason": "r"}\n'
    names = [name for name in out.files() if not name.startswith("corpus/")]
    assert names == [*(f"gradients/{name}.parquet" for name in ("kept", "renamed", "some")), "rejects/some.jsonl"]
    assert (tmp_path / "gradients" / "kept.parquet").stat().st_mtime_ns == untouched
    assert drop_absent(sample, out) == 0


def test_another_corpus_drops_nothing(sample: Sample, tmp_path: Path) -> None:
    write_table(Folder.at(tmp_path), "gradients/a.parquet", pa.table({"id": ["x"], "source": ["s"]}))
    with pytest.raises(UserError, match="none of the examples of"):
        drop_absent(sample, Folder.at(tmp_path))
    assert (tmp_path / "gradients" / "a.parquet").exists()


def test_a_unit_reads_its_own_rows_of_a_file_with_many_row_groups(tmp_path: Path) -> None:
    pq.write_table(pa.table({"id": ids(0, 100)}), tmp_path / "x.parquet", row_group_size=7)
    for rows in ([0], [99], [6, 7, 13, 14, 50, 98], list(range(100))):
        unit = Unit("u", (Piece(Part(Folder.at(tmp_path), "x.parquet"), np.array(rows)),))
        assert unit.read(["id"])["id"].to_pylist() == [f"{row:04d}" for row in rows]


def test_units_are_small_enough_to_lose_and_large_enough_to_keep() -> None:
    assert [unit_rows(rows, 512) for rows in (1, 2_000, 4_000, 10**9)] == [16, 32, 63, 4096]


def test_large_batches_make_large_units_but_leave_every_actor_some() -> None:
    assert [unit_rows(rows, 16_384) for rows in (1, 2_000, 10_000, 10**9)] == [256, 500, 1024, 4096]
    assert [unit_rows(20_000, 16_384, actors) for actors in (1, 8, 1000)] == [1024, 625, 256]
    assert unit_rows(10**6, 2**20) == 4096
