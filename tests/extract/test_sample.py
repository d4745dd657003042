from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from raydpp.errors import UserError
from raydpp.extract.sample import Sample, choose
from raydpp.storage import Folder
from raydpp.tables import read_columns, write_table

COUNTS = {"a": 30, "b": 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """A corpus of 40 ids in four files, in the order of ids; every fourth is of the small source."""
    out = Folder.at(tmp_path_factory.mktemp("corpus"))
    for file in range(4):
        numbers = np.arange(10 * file, 10 * file + 10)
        table = pa.table({"id": [f"{n:02d}" for n in numbers], "source": ["b" if n % 4 == 3 else "a" for n in numbers]})
        write_table(out, f"corpus/part-{file}.parquet", table)
    return out


def ids(sample: Sample) -> list[str]:
    found = sample.filter(read_columns(sample.parts, ["id", "source"]))["id"].to_pylist()
    assert len(found) == sample.rows
    return found


def test_a_corpus_with_other_rows_than_were_counted_is_refused(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"has 40 rows, and its run\.json says 41"):
        choose(folder, COUNTS | {"b": 11})


def test_everything_and_whole_sources_need_no_look_at_the_ids(folder: Folder) -> None:
    assert len(ids(choose(folder, COUNTS))) == 40
    assert choose(folder, COUNTS, limit=40).last_ids is None
    assert choose(folder, COUNTS, ["b"]).last_ids == {"b": None}
    assert ids(choose(folder, COUNTS, ["b"])) == [f"{n:02d}" for n in range(3, 40, 4)]


def test_a_limit_takes_the_smallest_ids_and_no_more_files_than_it_needs(folder: Folder) -> None:
    sample = choose(folder, COUNTS, limit=12)
    assert ids(sample) == [f"{n:02d}" for n in range(12)]
    assert len(sample.parts) == 2
    assert ids(choose(folder, COUNTS, limit=2)) == ["00", "01"]  # none of the small source


def test_a_limit_for_each_source(folder: Folder) -> None:
    assert ids(choose(folder, COUNTS, per_source=3)) == ["00", "01", "02", "03", "07", "11"]
    assert ids(choose(folder, COUNTS, ["b"], per_source=2)) == ["03", "07"]
    assert ids(choose(folder, COUNTS, limit=4, per_source=3)) == ["00", "01", "02", "03"]
    assert len(ids(choose(folder, COUNTS, per_source=20))) == 30
    assert choose(folder, COUNTS, per_source=30).last_ids is None


def test_mistakes_are_refused(folder: Folder) -> None:
    with pytest.raises(UserError, match=r"no source 'c' in .*; it has a, b"):
        choose(folder, COUNTS, ["c"])
    with pytest.raises(UserError, match="limit 0"):
        choose(folder, COUNTS, limit=0)
    with pytest.raises(UserError, match="per-source -1"):
        choose(folder, COUNTS, per_source=-1)


def test_a_shortlist_takes_its_ids_alone_and_no_other_files(folder: Folder) -> None:
    listed = ["31", "07", "33", "nowhere", "12", "07"]
    sample = choose(folder, COUNTS, only=listed)
    assert ids(sample) == ["07", "12", "31", "33"]
    assert len(sample.parts) == 3
    assert ids(choose(folder, COUNTS, ["b"], only=listed)) == ["07", "31"]
    assert ids(choose(folder, COUNTS, limit=3, only=listed)) == ["07", "12", "31"]
    assert ids(choose(folder, COUNTS, per_source=1, only=listed)) == ["07", "12"]


def test_a_shortlist_of_which_nothing_is_there_is_refused(folder: Folder) -> None:
    for listed in ([], ["nowhere", "else"]):
        with pytest.raises(UserError, match=f"none of the {len(listed)} ids of --only is in"):
            choose(folder, COUNTS, only=listed)
    with pytest.raises(UserError, match="--only are of other sources: a"):
        choose(folder, COUNTS, ["b"], only=["00"])
