"""The whole road on an object store: a server of the S3 protocol on this machine."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import moto.settings
import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from raydpp.cli import main
from raydpp.extract import workers
from raydpp.extract.stage import extract
from raydpp.ingest.stage import ingest
from raydpp.measure.stage import measure
from raydpp.select.cut import cut
from raydpp.select.stage import select
from raydpp.storage import Folder
from raydpp.tables import parquet_parts, read_columns, vector_array, write_table
from tests.faults import faulty, refusing
from tests.object_store import BUCKET, ObjectStore

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectStore]:
    found = ObjectStore()
    yield found
    found.stop()


@pytest.fixture
def store(server: ObjectStore) -> Iterator[ObjectStore]:
    server.seen.clear()
    yield server
    server.refuse = None


def ids(url: str, table: str) -> list[str]:
    found: list[str] = read_columns(parquet_parts(Folder.at(url).below(table)), ["id"])["id"].to_pylist()
    return found


def upload(local: str, folder: Folder) -> Folder:
    pafs.copy_files(local, folder.system.base_path, destination_filesystem=folder.system.base_fs)
    return folder


@pytest.fixture(scope="module")
def raw(server: ObjectStore, corpus: str) -> str:
    """The files that the corpus was made of, in the store, with a duplicate and a row that cannot be used."""
    first = (Path(corpus).parent / "raw" / "first.jsonl").read_text().splitlines()[0]
    folder = upload(str(Path(corpus).parent / "raw"), server.folder("raw data"))
    folder.write_text("more.jsonl", first + '\n{"prompt": "what", "completion": ""}\n')
    return folder.url


@pytest.fixture(scope="module")
def stored_corpus(server: ObjectStore, corpus: str) -> str:
    return upload(corpus, server.folder("corpus")).url


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A plain table of 40 points in four files, on the disk."""
    folder = Folder.at(tmp_path_factory.mktemp("table"))
    points = np.random.default_rng(0).standard_normal((40, 32)).astype(np.float32)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    for start in range(0, 40, 10):
        rows = {"id": [f"{n:02d}" for n in range(start, start + 10)], "source": ["s"] * 10}
        column = vector_array(points[start : start + 10], pa.float32())
        write_table(folder, f"{start:02d}.parquet", pa.table({**rows, "gradient": column, "response_tokens": [3] * 10}))
    return folder.url


@pytest.fixture(scope="module")
def stored_table(server: ObjectStore, table: str) -> str:
    return upload(table, server.folder("table")).url


def check_corpus(url: str, corpus: str) -> None:
    counts = json.loads(Folder.at(url).read_text("run.json") or "")["counts"]
    assert (counts["rows"], counts["kept"], counts["duplicates"], counts["rejects"]) == (42, 40, 1, 1)
    assert counts["sources"] == {"first": 20, "second": 20}
    assert ids(url, "corpus") == ids(corpus, "corpus")
    assert len(rejects(url)) == 2


def rejects(url: str) -> list[dict[str, Any]]:
    folder = Folder.at(url).below("rejects")
    texts = [folder.read_text(name) or "" for name in folder.files(".jsonl")]
    return [json.loads(line) for text in texts for line in text.splitlines()]


def test_the_whole_road(store: ObjectStore, raw: str, corpus: str, tiny_model: str, cluster: None) -> None:
    made = ingest([raw.replace("?", "/*.jsonl?", 1)], store.url("road/corpus"), files=4)
    check_corpus(made.out, corpus)
    points = extract(made.out, store.url("road/table"), tiny_model, dimension=64, rows_per_file=8, difficulty=True)
    assert sorted(ids(points.out, "gradients")) == ids(corpus, "corpus")
    picked = select(points.out, store.url("road/picked"), 8)
    first = cut(picked.out, store.url("road/cut"), 5)
    assert ids(first.out, "selection") == ids(picked.out, "selection")[:5]
    found = measure([points.out, picked.out], store.url("road/measured"), size=6)
    assert [one["table"] for one in found.record["results"][:2]] == ["table", "picked"]
    assert select(points.out, picked.out, 8).repeated
    everything = store.folder("road")
    assert not everything.files(".unfinished")
    assert len(everything.files("_SUCCESS")) == 5


@pytest.mark.slow
def test_partitions_and_exact_rounds(
    store: ObjectStore, stored_table: str, table: str, tmp_path: Path, cluster: None
) -> None:
    merged = select(stored_table, store.url("merged"), 8, partitions=2)
    assert merged.record["counts"]["partitions"] == 2
    assert len(set(ids(merged.out, "selection"))) == 8
    exact = select(stored_table, store.url("exact"), 8, partitions=2, exact=True)
    assert ids(exact.out, "selection") == ids(select(table, str(tmp_path / "here"), 8).out, "selection")


def test_an_object_has_its_name_only_once_it_is_whole(store: ObjectStore) -> None:
    folder = store.folder("whole")

    def broken(stream: Any) -> None:
        stream.write(bytes(12_000_000))  # two parts of an upload
        raise OSError("no")

    with pytest.raises(OSError, match="no"):
        folder.write("deep/file", broken)
    assert not folder.has("deep/file")  # but the upload was completed, under the other name:
    assert folder.files() == ["deep/file.unfinished"]
    assert folder.below("deep").names() == []
    store.seen.clear()
    folder.write_text("deep/file", "whole")
    # an upload in three requests, the copy, the deletion, and the marker that pyarrow puts where it deletes
    assert [request.split()[0] for request in store.seen] == ["POST", "PUT", "POST", "PUT", "DELETE", "PUT"]
    assert folder.files() == ["deep/file"]
    assert folder.read_text("deep/file") == "whole"


def test_a_bucket_is_a_folder(store: ObjectStore) -> None:
    bucket = Folder.at(store.url(""))
    bucket.write_text("first", "")
    assert "first" in (bucket.names() or [])
    assert Folder.holding(bucket.url)[0].has(BUCKET) is False
    assert main(["ingest", store.url(""), "--out", store.url("", "nowhere")]) == 2
    assert main(["measure", store.url("", "nowhere"), "--out", store.url("measured")]) == 2


@pytest.fixture
def commands(store: ObjectStore) -> dict[str, list[str]]:
    """A command of every stage that reads the store; each wants --out."""
    url = store.url("some/folder")
    return {
        "ingest": ["ingest", url],
        "extract": ["extract", url, "--model", "m"],
        "select": ["select", url, "--size", "4"],
        "cut": ["cut", url, "--size", "4"],
        "measure": ["measure", url],
    }


STAGES = ("ingest", "extract", "select", "cut", "measure")


def said_in_a_sentence(command: list[str], out: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with code 2 because of the store."""
    assert main([*command, "--out", out]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"raydpp {command[0]}: ")
    assert "AWS Error" in error
    assert len(error.splitlines()) == 1
    return error


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    ("status", "code", "words"),
    [
        (403, "AccessDenied", "ACCESS_DENIED"),
        (403, "SignatureDoesNotMatch", ""),
        (400, "ExpiredToken", "HTTP status 400"),
        (301, "PermanentRedirect", "the bucket is located in 'eu-west-3'"),
    ],
)
def test_what_a_store_refuses_is_a_sentence(
    stage: str, status: int, code: str, words: str, store: ObjectStore, commands: dict[str, list[str]], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    store.refuse = (status, code, {"x-amz-bucket-region": "eu-west-3"} if status == 301 else {})
    error = said_in_a_sentence(commands[stage], str(tmp_path / "out"), capsys)
    assert words in error
    assert "the credentials" in error


def test_wrong_credentials_and_none_are_a_sentence(
    store: ObjectStore, commands: dict[str, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setattr(moto.settings, "INITIAL_NO_AUTH_ACTION_COUNT", 0)
        said_in_a_sentence(commands["ingest"], str(tmp_path / "out"), capsys)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    assert "ACCESS_DENIED" in said_in_a_sentence(commands["ingest"], str(tmp_path / "out"), capsys)


def test_an_output_that_may_not_be_written_or_is_in_no_bucket_is_a_sentence(
    store: ObjectStore, raw: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ingest", raw, "--out", store.url("out", "nowhere")]) == 2
    assert "NO_SUCH_BUCKET" in capsys.readouterr().err
    assert main(["ingest", store.url("in", "nowhere"), "--out", store.url("out")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_a_store_that_does_not_answer_is_a_sentence_and_the_same_command_may_work_later(
    stage: str, commands: dict[str, list[str]], store: ObjectStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store.stop()
    try:
        assert main([*commands[stage], "--out", str(tmp_path / "out")]) == 3
    finally:
        store.start()
    later_in_a_sentence(capsys)


def later_in_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    error = capsys.readouterr().err.splitlines()[-1]
    assert "NETWORK_CONNECTION" in error
    assert error.endswith("when that has passed, the same command again goes on")


DRIVER = """
import sys
from pathlib import Path
address, root, log, *command = sys.argv[1:]
sys.path.insert(0, root)
if address:
    import ray
    ray.init(address, runtime_env={"env_vars": {"PYTHONPATH": root, "HF_HUB_OFFLINE": "1"}}, log_to_driver=False)
from raydpp.cli import main
from raydpp.select import exact
exact.SAVE_EVERY = 0.0
if command[0] == "extract":
    from raydpp.extract import workers
    from tests.faults import faulty
    workers.FeatureActor = faulty(Path(log))
sys.exit(main(command))
"""


def killed(store: ObjectStore, pattern: str, count: int, command: list[str], on_ray: bool, log: str = "") -> None:
    """Start a command as a process of its own, killed before the ``count``-th request that matches is answered."""
    import ray

    address = ray.get_runtime_context().gcs_address if on_ray else ""
    started: list[subprocess.Popen[bytes]] = []
    store.at(pattern, count, lambda: started[0].kill())
    started.append(subprocess.Popen([sys.executable, "-c", DRIVER, address, str(ROOT), log, *command]))
    assert started[0].wait(timeout=500) == -signal.SIGKILL


MOMENTS = {
    "uploaded": r"PUT /.*/{}\.unfinished\?partNumber",
    "copied": r"PUT /[^?]*/{}$",  # to its final name
    "deleted": r"DELETE /.*/{}\.unfinished$",
}
"""What is about to be done to an object: the requests."""


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("moment", "name", "count", "on_ray"),
    [
        ("uploaded", r"run\.json", 1, False),
        ("copied", r"_staged/[^/]*\.parquet", 2, False),
        ("deleted", r"corpus/[^/]*\.parquet", 2, False),
        ("copied", "_SUCCESS", 1, False),
        ("copied", r"corpus/[^/]*\.parquet", 2, True),
    ],
)
def test_ingest_killed_and_started_again(
    moment: str, name: str, count: int, on_ray: bool, store: ObjectStore, raw: str, corpus: str, cluster: None
) -> None:
    out = store.url(f"killed/ingest-{len(name)}-{moment}-{on_ray}")
    command = ["ingest", raw, "--out", out, "--files", "4", *(["--address", "auto"] if on_ray else [])]
    killed(store, MOMENTS[moment].format(name), count, command, on_ray)
    assert not Folder.at(out).has("_SUCCESS")
    assert main(command) == 0
    check_corpus(out, corpus)
    assert not [name for name in Folder.at(out).files() if name.endswith(".unfinished") or "_staged" in name]


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", MOMENTS)
def test_extract_killed_and_started_again_has_every_row_once(
    moment: str, store: ObjectStore, stored_corpus: str, corpus: str, tiny_model: str, tmp_path: Path, cluster: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(workers, "FeatureActor", faulty(tmp_path / "log"))
    refused = pq.read_table(Path(corpus) / "corpus").to_pylist()[7]
    prompt = refused["messages"][0]["content"]
    model = refusing(tiny_model, tmp_path / "strict", f"messages[0]['content'] == {prompt!r}", "not this one")
    out = store.folder(f"killed/extract-{moment}")
    given = ["--model", model, "--dimension", "16", "--rows-per-file", "4"]
    command = ["extract", stored_corpus, "--out", out.url, *given]
    killed(
        store, MOMENTS[moment].format(r"gradients/[^/]*\.parquet"), 3, command, on_ray=True, log=str(tmp_path / "log")
    )
    first = written(out)
    assert len(first) in (2, 3)
    assert not out.has("_SUCCESS")
    assert main(command) == 0
    check_rows(out, corpus, [refused["id"]])
    assert first.items() <= written(out).items()


def written(out: Folder) -> dict[str, Any]:
    """When each file of the gradients was written."""
    found = out.system.get_file_info([name for name in out.files(".parquet") if name.startswith("gradients/")])
    return {info.path: info.mtime for info in found}


def check_rows(out: Folder, corpus: str, refused: Sequence[str] = ()) -> None:
    """Every row of the corpus is there once."""
    assert sorted(one["id"] for one in rejects(out.url)) == sorted(refused)
    assert sorted([*ids(out.url, "gradients"), *refused]) == ids(corpus, "corpus")
    record = json.loads(out.read_text("run.json") or "")
    assert (record["counts"]["in"], record["counts"]["rejects"]) == (40, len(refused))
    assert not out.files(".unfinished")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("moment", MOMENTS)
def test_exact_rounds_killed_and_started_again_pick_the_same(
    moment: str, store: ObjectStore, stored_table: str, table: str, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    cluster: None,
) -> None:  # fmt: skip
    out = store.url(f"killed/exact-{moment}")
    command = ["select", stored_table, "--out", out, "--size", "12", "--partitions", "2", "--exact"]
    killed(store, MOMENTS[moment].format(r"rounds/picks\.parquet"), 3, command, on_ray=True)
    with caplog.at_level(logging.INFO, "raydpp"):
        assert main(command) == 0
    assert "resumes after" in caplog.text
    assert ids(out, "selection") == ids(select(table, str(tmp_path / "here"), 12).out, "selection")
    assert ids(out, "gradients") == ids(out, "selection")
    assert not Folder.at(out).files(".unfinished")


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["select", "cut", "measure"])
def test_other_stages_killed_and_started_again(
    stage: str, store: ObjectStore, stored_table: str, table: str, tmp_path: Path
) -> None:
    whole = select(table, str(tmp_path / "whole"), 12).out
    picked = upload(whole, store.folder("picked")).url
    given, name = {
        "select": ([stored_table, "--size", "12"], r"gradients/[^/]*"),
        "cut": ([picked, "--size", "6"], r"gradients/[^/]*"),
        "measure": ([stored_table, "--size", "6"], r"metrics\.json"),
    }[stage]
    out = store.url(f"killed/{stage}")
    command = [stage, *given, "--out", out]
    killed(store, MOMENTS["copied"].format(name), 1, command, on_ray=False)
    assert not Folder.at(out).has("_SUCCESS")
    assert main(command) == 0
    if stage == "measure":
        here = measure([table], str(tmp_path / "here"), size=6).record["results"]
        results = json.loads(Folder.at(out).read_text("run.json") or "")["results"]
        assert [one["mean"] for one in results] == pytest.approx([one["mean"] for one in here], rel=1e-9)
    else:
        assert ids(out, "selection") == ids(out, "gradients") == ids(whole, "selection")[: int(given[-1])]
    assert not Folder.at(out).files(".unfinished")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("away", [10, None])
def test_connections_refused_while_extract_works(
    away: int | None, store: ObjectStore, stored_corpus: str, corpus: str, tiny_model: str, tmp_path: Path,
    cluster: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(workers, "FeatureActor", faulty(tmp_path / "log"))

    def pause() -> None:
        store.stop()
        if away:
            time.sleep(away)
            store.start()

    out = store.folder(f"away/{away}")
    given = ["--model", tiny_model, "--dimension", "16", "--rows-per-file", "4"]
    command = ["extract", stored_corpus, "--out", out.url, *given]
    store.at(MOMENTS["copied"].format(r"gradients/[^/]*\.parquet"), 3, threading.Thread(target=pause).start)
    code = main(command)
    if not away:
        assert code == 3
        later_in_a_sentence(capsys)
        store.start()
        first = written(out)
        assert len(first) >= 2
        assert not out.has("_SUCCESS")
        assert main(command) == 0
        assert first.items() <= written(out).items()
    else:
        assert code == 0
    check_rows(out, corpus)


@pytest.mark.slow
def test_no_credentials_end_soon_where_amazons_metadata_service_does_not_answer(
    store: ObjectStore, raw: str, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
        environment = {
            **kept,
            "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
            "AWS_EC2_METADATA_SERVICE_ENDPOINT": f"http://127.0.0.1:{silent.getsockname()[1]}",
        }
        command = [sys.executable, "-c", DRIVER, "", str(ROOT), "", "ingest", raw, "--out", str(tmp_path / "out")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "ACCESS_DENIED" in done.stderr
