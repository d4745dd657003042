from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from raydpp.errors import UserError
from raydpp.ingest import convert
from raydpp.ingest.convert import bucket_of
from raydpp.ingest.files import RawFile
from raydpp.ingest.stage import ingest, needs_cluster
from raydpp.runs import RunResult
from raydpp.storage import Folder

SHARED = Path(__file__).parents[3] / "shared" / "data"
GOOD = {"prompt": "Q", "completion": "A"}
MIB = 2**20


@pytest.fixture(autouse=True)
def no_address(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def write(path: Path, *lines: object) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def rejects(out: str) -> list[dict[str, object]]:
    return [
        json.loads(line)
        for path in sorted((Path(out) / "rejects").glob("*.jsonl"))
        for line in path.read_text().split("\n")
        if line
    ]


def test_every_row_is_kept_dropped_as_a_duplicate_or_rejected_with_a_reason(tmp_path: Path) -> None:
    write(
        tmp_path / "in" / "a.jsonl",
        {**GOOD, "topic": "x", "score": 1, "weight": 1},
        {**GOOD, "topic": "y", "score": 2},  # the same text
        {"prompt": "Q", "completion": "<|endoftext|>", "topic": "x"},
        "{not json",
        {"prompt": "Q2", "completion": "A2</s>", "topic": ["list"], "score": 2.5, "weight": 2.5},
        {"prompt": "Q3", "completion": "A3", "topic": "x", "score": "much"},
    )
    write(tmp_path / "in" / "b.jsonl", GOOD, {"prompt": "Q4", "completion": 7})
    seeds = {"instruction": "I", "instances": [{"input": "1", "output": "2"}, {"input": "3", "output": " "}]}
    (tmp_path / "in" / "seeds.json").write_text(json.dumps([seeds]))
    outcome = ingest([str(tmp_path / "in")], str(tmp_path / "out"), carry=["topic", "score", "weight"], files=3)

    counts = outcome.record["counts"]
    assert counts["rows"] == 9
    assert counts["examples"] == 10  # one row held two instances
    assert counts["kept"] + counts["duplicates"] + counts["rejects"] == counts["examples"]
    assert (counts["kept"], counts["duplicates"], counts["rejects"]) == (4, 2, 4)
    assert "9 rows in (+ 1 from rows with several) = 4 kept + 2 duplicates + 4 rejects" in outcome.summary
    assert counts["sources"] == {"a": 3, "seeds": 1}

    table = pq.read_table(tmp_path / "out" / "corpus").sort_by("source")
    rows = {row["messages"][1]["content"]: row for row in table.to_pylist()}
    assert set(rows) == {"A", "A2", "A3", "2"}
    assert rows["A"]["topic"] == "x"  # of two equal ones the first
    assert rows["A2"]["topic"] == '["list"]'
    assert rows["A2"]["weight"] == 2.5
    assert (rows["A2"]["score"], rows["A3"]["score"]) == ("2.5", "much")  # not all numbers, so text
    assert rows["2"]["messages"][0]["content"] == "I\n\n1"

    found = {(Path(str(r["file"])).name, r["row"]): str(r["reason"]) for r in rejects(outcome.out)}
    assert len(found) == 6
    assert "end-of-text marker" in found["a.jsonl", 2]
    assert "not JSON" in found["a.jsonl", 3]
    assert "completion" in found["b.jsonl", 1]
    assert "exact duplicate of row 0 of" in found["a.jsonl", 1]
    assert "exact duplicate of row 0 of" in found["b.jsonl", 0]
    assert "response is empty" in found["seeds.json", 0]


def test_files_are_ranges_of_ids_in_order(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.jsonl", *({**GOOD, "prompt": f"Q{n}"} for n in range(40)))
    out = Path(ingest([source], str(tmp_path / "out"), files=4).out)
    ids = [pq.read_table(path)["id"].to_pylist() for path in sorted((out / "corpus").glob("*.parquet"))]
    joined = [identity for inside in ids for identity in inside]
    assert joined == sorted(joined)
    assert len(joined) == 40
    assert len(ids) == 4
    assert all(bucket_of(identity, 4) == bucket for bucket, inside in enumerate(ids) for identity in inside)
    assert sorted(path.name for path in out.iterdir()) == ["_SUCCESS", "corpus", "run.json"]


def test_files_of_one_schema_are_reported_together(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def lines(name: str) -> list[str]:
        caplog.clear()
        ingest([str(tmp_path / "in")], str(tmp_path / name))
        return [record.getMessage() for record in caplog.records if record.name == "raydpp.ingest.stage"]

    caplog.set_level("INFO", "raydpp")
    write(tmp_path / "in" / "a.jsonl", GOOD)
    assert lines("one") == ["ingest: 1 file: prompt/completion"]
    for name in "bcd":
        write(tmp_path / "in" / f"{name}.jsonl", GOOD)
    assert lines("four") == ["ingest: 4 files: prompt/completion"]
    broken = write(tmp_path / "in" / "e.jsonl", "{not json")
    for name in ("f", "deep/g"):
        write(tmp_path / "in" / f"{name}.jsonl", {"question": "Q", "answer": "A"})
    assert lines("all") == [
        f"ingest: {broken}: no readable row",
        "ingest: 4 files: prompt/completion",
        "ingest: 2 files: question/answer (deep/g.jsonl, f.jsonl)",
    ]


def test_names_of_sources_and_carried_columns_are_free(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "duplicates.jsonl", {**GOOD, "file": "f", "row": 7}, GOOD)
    outcome = ingest([source], str(tmp_path / "out"), carry=["file", "row"])
    assert outcome.record["counts"]["sources"] == {"duplicates": 1}
    (row,) = pq.read_table(Path(outcome.out) / "corpus").to_pylist()
    assert (row["file"], row["row"]) == ("f", 7.0)


def written(outcome: RunResult) -> dict[str, bytes]:
    """What a run left but for its record, by name."""
    out = Path(outcome.out)
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "run.json"
    }


def test_ray_writes_the_same_files(cluster: None, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    rows = [{"prompt": f"Q{n}", "completion": f"A{n}</s>", "score": n / 3, "topic": f"t{n % 7}"} for n in range(9_500)]
    write(folder / "a.jsonl", *rows)
    write(folder / "b.jsonl", *({**row, "topic": None} for row in rows[:50]), *rows[:10], {"prompt": "Q"})
    write(folder / "broken.jsonl", "{not json", "nor this")
    lines = "".join(json.dumps({"question": f"Q{n}", "answer": "A"}) + "\n" for n in range(3_000))
    (folder / "cut.jsonl.gz").write_bytes(gzip.compress(lines.encode())[:-40])
    (folder / "empty.json").write_text("")
    here, there = (
        ingest([str(folder)], str(tmp_path / name), carry=["score", "topic"], files=2, address=address)
        for name, address in (("here", None), ("there", "auto"))
    )
    assert here.record["counts"]["duplicates"] == 60
    assert here.record["counts"]["rejects"] == 4
    assert "rejects/duplicates-part-00001.jsonl" in written(here)
    assert written(here) == written(there)
    for fact in ("inputs", "counts", "schemas"):
        assert here.record[fact] == there.record[fact]


def test_ray_says_the_same_of_input_that_cannot_be_used(cluster: None, tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.jsonl", {"prompt": "Q", "completion": ""}, "{not json")
    for name, address in (("here", None), ("there", "auto")):
        with pytest.raises(UserError, match=f"no row of the input can be used: {tmp_path / name}/rejects says why"):
            ingest([source], str(tmp_path / name), address=address)
    assert rejects(str(tmp_path / "here")) == rejects(str(tmp_path / "there"))
    assert [reject["row"] for reject in rejects(str(tmp_path / "here"))] == [0, 1]


def test_a_small_input_imports_neither_ray_nor_torch(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.jsonl", GOOD)
    program = (
        "import sys; from raydpp.ingest.stage import ingest\n"
        f"print(ingest([{source!r}], {str(tmp_path / 'out')!r}).record['counts']['kept'])\n"
        "print({'ray', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], env=os.environ, capture_output=True, text=True, check=True)
    assert done.stdout == "1\nset()\n"


@pytest.mark.parametrize(
    ("sizes", "address", "needed"),
    [
        ([1, 0], None, False),
        ([40 * MIB, 24 * MIB - 1], None, False),
        ([40 * MIB, 24 * MIB], None, True),
        ([1, None], None, True),  # a server that does not say
        ([1], "auto", True),
    ],
)
def test_a_cluster_is_for_large_input_or_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int | None], address: str | None, needed: bool
) -> None:
    files = [RawFile(Folder.at("/in"), f"{n}.jsonl", size) for n, size in enumerate(sizes)]
    assert needs_cluster(files, address) is needed
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    assert needs_cluster(files, address)


def test_the_same_command_again_does_nothing_and_changed_input_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.jsonl", GOOD)
    ingest([source], str(tmp_path / "out"))
    assert ingest([source], str(tmp_path / "out")).repeated
    write(tmp_path / "in" / "a.jsonl", GOOD, {"prompt": "new", "completion": "new"})
    with pytest.raises(UserError, match="input files have changed"):
        ingest([source], str(tmp_path / "out"))


def corpus_of(out: str) -> list[dict[str, object]]:
    """The rows of a corpus, in the order of its files."""
    return [row for path in sorted((Path(out) / "corpus").glob("*")) for row in pq.read_table(path).to_pylist()]


def test_an_incremental_run_reads_new_and_changed_files_and_drops_those_that_are_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    stage_file = convert.IngestJob.stage_file

    def noting(job: convert.IngestJob, index: int) -> Iterator[dict[str, int]]:
        if not job.files[index].staged:
            read.append(job.files[index].file.name)
        return stage_file(job, index)

    monkeypatch.setattr(convert.IngestJob, "stage_file", noting)

    def again(**options: object) -> RunResult:
        read.clear()
        found = ingest([str(tmp_path / "in")], str(tmp_path / "out"), incremental=True, **options)  # type: ignore[arg-type]
        kept = {name: counts for name, counts in found.record["counts"].items() if name != "sources"}
        afresh = ingest([str(tmp_path / "in")], str(tmp_path / f"new{len(runs)}"), **options)  # type: ignore[arg-type]
        runs.append(found)
        assert kept == {name: counts for name, counts in afresh.record["counts"].items() if name != "sources"}
        mine, its = ([{**row, "source": None} for row in corpus_of(run.out)] for run in (found, afresh))
        assert mine == its  # but for the names of sources, which stay
        assert sorted(map(str, rejects(found.out))) == sorted(map(str, rejects(afresh.out)))
        return found

    runs: list[RunResult] = []
    rows = [{"prompt": f"Q{n}", "completion": "A"} for n in range(30)]
    write(tmp_path / "in" / "a" / "train.jsonl", *rows[:10], "{broken")
    write(tmp_path / "in" / "b" / "train.jsonl", *rows[5:20])
    assert again().record["counts"]["sources"] == {"a": 10, "b": 10}
    assert read[:2] == ["a/train.jsonl", "b/train.jsonl"]
    found = ingest([str(tmp_path / "in")], str(tmp_path / "out"), incremental=True)
    assert found.repeated

    write(tmp_path / "in" / "b" / "extra.jsonl", *rows[15:25], {"prompt": "Q"})  # a new file: b's names would change
    assert again().record["counts"]["sources"] == {"a": 10, "b": 5, "extra": 10}
    assert read[0] == "b/extra.jsonl"
    assert "a/train.jsonl" not in read[:1]

    path = Path(write(tmp_path / "in" / "a" / "train.jsonl", *rows[:9], "{broken", rows[29]))
    os.utime(path, ns=(1, 1))  # changed, and as long as it was
    again()
    assert read[0] == "a/train.jsonl"

    path.unlink()  # what b has too is b's now
    assert again().record["counts"]["sources"] == {"b": 10, "extra": 10}
    assert not any("/a/" in str(reject) for reject in rejects(runs[-1].out))
    left = [file for file in (tmp_path / "out").rglob("*") if file.is_file() and b"/a/train" in file.read_bytes()]
    assert not left

    again(source=["mine=b/*.jsonl"])  # an option that concerns the files: they are read again
    assert read[:2] == ["b/extra.jsonl", "b/train.jsonl"]
    assert runs[-1].record["counts"]["sources"] == {"mine": 20}


def test_columns_carried_of_files_read_before_change_their_type_with_those_that_come(tmp_path: Path) -> None:
    write(tmp_path / "in" / "a.jsonl", {**GOOD, "score": 1})
    ingest([str(tmp_path / "in")], str(tmp_path / "out"), incremental=True, carry=["score"])
    assert corpus_of(str(tmp_path / "out"))[0]["score"] == 1.0
    write(tmp_path / "in" / "b.jsonl", {"prompt": "Q2", "completion": "A", "score": "good"})
    ingest([str(tmp_path / "in")], str(tmp_path / "out"), incremental=True, carry=["score"])
    assert {row["score"] for row in corpus_of(str(tmp_path / "out"))} == {"1", "good"}


@pytest.mark.parametrize("incremental", [False, True])
def test_a_run_that_was_killed_goes_on_with_the_files_that_it_had_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, incremental: bool
) -> None:
    for name in "abc":
        write(tmp_path / "in" / f"{name}.jsonl", *({"prompt": f"{name}{n}", "completion": "A"} for n in range(7)))
    monkeypatch.setattr(convert, "_CHUNK", 3)
    stage_file, written = convert.IngestJob.stage_file, list[int]()

    def dying(job: convert.IngestJob, index: int) -> Iterator[dict[str, int]]:
        for counts in stage_file(job, index):
            if index == 1 and len(written) == 4:  # in the middle of b
                raise OSError("the disk is gone")
            written.append(index)
            yield counts

    monkeypatch.setattr(convert.IngestJob, "stage_file", dying)
    with pytest.raises(OSError, match="gone"):
        ingest([str(tmp_path / "in")], str(tmp_path / "out"), incremental=incremental)
    counted: list[str] = []

    def noting(job: convert.IngestJob, index: int) -> Iterator[dict[str, int]]:
        counted.extend([] if job.files[index].staged else [job.files[index].file.name])
        return stage_file(job, index)

    monkeypatch.setattr(convert.IngestJob, "stage_file", noting)
    found = ingest([str(tmp_path / "in")], str(tmp_path / "out"), incremental=incremental)
    assert counted == ["b.jsonl", "c.jsonl"]
    assert (found.record["counts"]["rows"], found.record["counts"]["kept"]) == (21, 21)
    assert (tmp_path / "out" / "_staged").exists() == incremental


def test_named_columns(tmp_path: Path) -> None:
    source = write(tmp_path / "in" / "a.jsonl", {"frage": "Q", "antwort": "A", "rolle": "S"})
    out = ingest(
        [source], str(tmp_path / "out"), prompt_column=["frage"], response_column=["antwort"], system_column=["rolle"]
    ).out
    messages = pq.read_table(Path(out) / "corpus")["messages"][0].as_py()
    assert [(m["role"], m["content"]) for m in messages] == [("system", "S"), ("user", "Q"), ("assistant", "A")]


def test_mistakes_are_refused(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    unknown = write(tmp_path / "in" / "a.jsonl", {"foo": 1, "bar": 2})
    with pytest.raises(UserError, match=r"a\.jsonl: No known schema has these columns: bar, foo.*prompt/completion"):
        ingest([unknown], out)
    with pytest.raises(UserError, match="does not exist"):
        ingest([str(tmp_path / "nowhere")], out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no file"):
        ingest([str(tmp_path / "empty")], out)
    good = write(tmp_path / "in2" / "b.jsonl", GOOD)
    with pytest.raises(UserError, match="no file has this column"):
        ingest([good], out, carry=["topic"])
    with pytest.raises(UserError, match="column of its own"):
        ingest([good], out, carry=["id"])
    bad = write(tmp_path / "in3" / "c.jsonl", {"prompt": "Q", "completion": ""})
    with pytest.raises(UserError, match="no row of the input can be used"):
        ingest([bad], out)
    assert not (tmp_path / "out" / "_SUCCESS").exists()


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data are not here")
def test_all_eight_real_files_in_one_command(tmp_path: Path) -> None:
    counts = ingest([f"{SHARED}/*.json*"], str(tmp_path / "out")).record["counts"]
    assert counts["rows"] == counts["examples"] == 43_172
    assert counts["kept"] + counts["duplicates"] + counts["rejects"] == 43_172
    # 319 rows repeat another's prompt and response; three of them have other tools, which are part of the system turn
    assert counts["duplicates"] == 319 - 3
    assert counts["rejects"] == 2 + 493  # two empty responses, and 493 that are nothing but <|endoftext|>
    assert len(counts["sources"]) == 8
    assert pq.read_table(tmp_path / "out" / "corpus", columns=["id"]).num_rows == counts["kept"]


def lines_of(out: str) -> dict[str, list[str]]:
    """The sources of a corpus, and what assistants say there, sorted."""
    found: dict[str, list[str]] = {}
    for row in pq.read_table(Path(out) / "corpus").to_pylist():
        said = [message["content"] for message in row["messages"] if message["role"] == "assistant"]
        found.setdefault(row["source"], []).extend(said)
    return {source: sorted(said) for source, said in found.items()}


def test_files_that_need_names_of_columns_go_with_files_that_do_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "raydpp")
    write(tmp_path / "in" / "gsm" / "train.jsonl", {"problem": "Q", "solution": "1", "level": 3})
    write(tmp_path / "in" / "alpaca" / "train.jsonl", {"instruction": "Q", "output": "2", "prompt": "formatted"})
    talk = {"conversations": [{"from": "Doc", "value": "Q"}, {"from": "gpt", "value": "3"}]}
    write(tmp_path / "in" / "chat.jsonl", talk)
    out = ingest(
        [str(tmp_path / "in")],
        str(tmp_path / "out"),
        prompt_column=["gsm/*=problem"],
        response_column=["gsm/*=solution"],
        role=["doc=user"],
        source=["talk=chat*"],
    ).out
    assert lines_of(out) == {"gsm": ["1"], "alpaca": ["2"], "talk": ["3"]}
    assert "ingest: of no use to the conversations, and kept in the column extra: level, prompt" in caplog.messages
    with pytest.raises(UserError, match=r"--prompt-column 'GLOB=problem'"):
        ingest([str(tmp_path / "in")], str(tmp_path / "out2"), prompt_column=["problem"], response_column=["solution"])


def test_preferences_and_sources_of_rows(tmp_path: Path) -> None:
    rows = [{"prompt": f"Q{n}", "chosen": f"good {n}", "rejected": "bad", "set": f"s{n % 2}"} for n in range(4)]
    source = write(tmp_path / "in" / "a.jsonl", *rows)
    with pytest.raises(UserError, match="--take chosen"):
        ingest([source], str(tmp_path / "out"))
    out = ingest([source], str(tmp_path / "out"), take="chosen", source_column="set").out
    assert lines_of(out) == {"s0": ["good 0", "good 2"], "s1": ["good 1", "good 3"]}
    with pytest.raises(UserError, match="--source-column topic: no file has this column"):
        ingest([source], str(tmp_path / "out2"), take="chosen", source_column="topic")


def test_a_dataset_that_was_saved_to_disk_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [{"messages": [{**chat[0], "content": f"Q{n}"}, chat[1]], "n": n} for n in range(30)]
    splits = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:3])}
    saved = tmp_path / "in" / "mine"
    datasets.DatasetDict(splits).save_to_disk(saved, num_shards={"train": 2, "test": 1})
    outcome = ingest([str(tmp_path / "in")], str(tmp_path / "out"))
    counts = outcome.record["counts"]
    assert (counts["rows"], counts["kept"], counts["duplicates"], counts["rejects"]) == (33, 30, 3, 0)
    assert sum(counts["sources"].values()) == 30
    assert counts["sources"].keys() <= {"train", "test"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="the development data are not here")
def test_every_row_of_the_trials_is_kept_or_has_a_reason(tmp_path: Path) -> None:
    outcome = ingest([str(SHARED.parent / "trials")], str(tmp_path / "out"), take="chosen")
    counts = outcome.record["counts"]
    assert counts["kept"] + counts["duplicates"] + counts["rejects"] == counts["examples"] == counts["rows"]
    found = Counter(str(reject["reason"]) for reject in rejects(outcome.out) if reject["id"] is None)
    assert found == {
        "the column 'label' is false: the response is marked as a bad one (KTO)": 1,
        "every assistant turn is marked as context (weight 0, train or loss false)": 1,
        "the column 'note' has text that is not valid Unicode (a lone surrogate)": 1,
    }
