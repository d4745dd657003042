from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from raydpp import runs
from raydpp.errors import UserError
from raydpp.refresh import versions as module
from raydpp.refresh.versions import Versions, erase
from raydpp.runs import load_finished
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import open_table
from tests.refresh.contents import texts


@pytest.fixture
def version(table: str, tmp_path: Path) -> Path:
    """A selection of 12 examples of 40, of two sources, with all that comes with it."""
    return Path(select(table, str(tmp_path / "out" / "versions" / "000001"), 12, redundancy="always").out)


def all_ids(table: str) -> dict[str, str]:
    rows = pq.read_table(Path(table) / "gradients", columns=["id", "source"])
    return dict(zip(rows["id"].to_pylist(), rows["source"].to_pylist(), strict=True))


def test_a_source_that_is_gone_is_in_no_file_of_a_version_any_more(table: str, version: Path) -> None:
    ids = all_ids(table)
    living = [one for one, source in ids.items() if source == "first"]
    picks = pq.read_table(version / "selection")
    mine = [row for row in picks.to_pylist() if row["source"] == "first"]
    assert 0 < len(mine) < 12
    before = texts(version)
    assert any("second" in text for text in before.values())
    assert erase(Folder.at(version), pa.array(living), {"first"}) == 12 - len(mine)
    after = texts(version)
    for name, text in after.items():
        assert not re.search(r"\bsecond\b", text), name
        assert not [one for one in ids if one not in living and one in text], name
    assert pq.read_table(version / "selection").to_pylist() == mine
    examples = [json.loads(line) for line in (version / "examples.jsonl").read_text().splitlines()]
    assert [row["id"] for row in examples] == [row["id"] for row in mine]
    assert open_table(str(version), "gradient").rows == len(mine)
    record = load_finished(["select"], Folder.at(version))
    assert (record["counts"]["rows"], record["erased"]) == (len(mine), 12 - len(mine))
    assert {"README.md", "dataset_info.json", "examples.jsonl"} < after.keys()
    assert not [name for name in after if name.startswith(("plots", "map", "redundancy", "report"))]
    assert erase(Folder.at(version), pa.array(living), {"first"}) is None


def test_ended_in_the_middle_it_is_done_again(table: str, version: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = all_ids(table)
    living = [one for one, source in ids.items() if source == "first"]
    writes = ["write_dataset", "_write_record", "write_table"]
    for name in writes:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, _fail)
            with pytest.raises(OSError, match="full"):
                erase(Folder.at(version), pa.array(living), {"first", "second"})
    gone = erase(Folder.at(version), pa.array(living), {"first", "second"})
    assert gone is not None
    assert not [name for name, text in texts(version).items() for one in ids if one not in living and one in text]
    record = load_finished(["select"], Folder.at(version))
    assert record["erased"] == gone
    assert len((version / "examples.jsonl").read_text().splitlines()) == record["counts"]["rows"] == 12 - gone


def _fail(*_: Any) -> None:
    raise OSError("the disk is full")


def test_what_is_all_there_is_left_alone(table: str, version: Path) -> None:
    before = texts(version)
    assert erase(Folder.at(version), pa.array(list(all_ids(table))), {"first", "second", "third"}) is None
    assert texts(version) == before


def test_an_example_that_was_not_picked_goes_with_the_pages_that_show_it(table: str, version: Path) -> None:
    picked = set(pq.read_table(version / "selection")["id"].to_pylist())
    gone = next(one for one in all_ids(table) if one not in picked)
    living = pa.array([one for one in all_ids(table) if one != gone])
    assert erase(Folder.at(version), living, {"first", "second"}) == 0
    assert not [name for name, text in texts(version).items() if gone in text]
    assert pq.read_table(version / "selection").num_rows == 12


def test_a_version_of_which_nothing_is_left_is_deleted_and_the_latest_stays(table: str, version: Path) -> None:
    out = version.parents[1]
    select(table, str(out / "versions" / "000002"), 3)
    for name in ("000001", "000002"):
        Folder.at(out).write_text(f"changes/{name}/report.html", "second")
    versions = Versions(Folder.at(out))
    versions.publish("000002")
    assert versions.erase(pa.array(["x"]), {"y"}) == 12
    assert versions.names == ["000002"]
    assert Folder.at(out).files("report.html")[0] == "changes/000002/report.html"


def unfinished(out: Folder, name: str, whole: bool = True) -> None:
    out.write_text(f"versions/{name}/run.json", "{}")
    if whole:
        out.write_text(f"versions/{name}/{runs.SUCCESS}", "")


def test_names_rise_what_was_not_published_is_deleted_and_old_ones_too(tmp_path: Path) -> None:
    out = Folder.at(tmp_path)
    versions = Versions(out)
    assert versions.latest is None
    assert versions.next() == "000001"
    unfinished(out, "000001")
    versions.publish("000001")
    unfinished(out, "000002", whole=False)
    unfinished(out, "000003")
    assert versions.next() == "000002"
    assert versions.names == ["000001"]
    for name in ("000002", "000003", "000010"):
        unfinished(out, name)
        out.write_text(f"changes/{name}/changes.json", "")
        versions.publish(name)
    assert versions.next() == "000011"
    assert versions.retain(2) == ["000001", "000002"]
    assert versions.names == ["000003", "000010"]
    assert out.below("changes").names() == ["000003", "000010"]
    assert versions.latest == "000010"


def test_a_latest_version_that_is_not_there_is_said(tmp_path: Path) -> None:
    out: Any = Folder.at(tmp_path)
    unfinished(out, "000001")
    Versions(out).publish("000004")
    with pytest.raises(UserError, match="names the version 000004, which is not there: let it name one of 000001"):
        _ = Versions(out).latest
