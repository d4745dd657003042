from __future__ import annotations

import errno
import math
import pickle
from datetime import timedelta
from pathlib import Path

import fsspec
import pyarrow.fs as pafs
import pytest
from fsspec.registry import known_implementations

from raydpp.errors import UserError
from raydpp.storage import Folder, absolute, is_relative, last_name, may_pass, of_storage, resolve, split_glob


def test_a_local_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve("a b/c#1.json")[1] == str(tmp_path / "a b/c#1.json")
    assert resolve("~/c.json")[1] == "/home/someone/c.json"
    assert isinstance(resolve("x:y::z.json")[0], pafs.LocalFileSystem)


@pytest.mark.parametrize("url", ["file:///data/a b.json", "file:///data/a%20b.json", "FILE:///data/a b.json"])
def test_a_file_url_may_have_spaces(url: str) -> None:
    file_system, path = resolve(url)
    assert isinstance(file_system, pafs.LocalFileSystem)
    assert path == "/data/a b.json"


def test_pyarrow_comes_before_fsspec() -> None:
    file_system, path = resolve("s3://bucket/key #1.json?region=eu-west-1")
    assert (file_system.type_name, path) == ("s3", "bucket/key #1.json")
    assert file_system.region == "eu-west-1"


def test_fsspec_takes_the_rest() -> None:
    fsspec.filesystem("memory").pipe("/resolve/a.txt", b"hello")
    file_system, path = resolve("memory://resolve/a.txt")
    with file_system.open_input_stream(path) as stream:
        assert stream.read() == b"hello"


def test_a_missing_handler_is_said_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="nowhere"):
        resolve("nowhere://bucket/key")
    monkeypatch.setitem(known_implementations, "absent", {"class": "no_such.Thing", "err": "Install it"})
    with pytest.raises(UserError, match=r"absent:// is missing.*Install it"):
        resolve("absent://bucket/key")


def test_options_are_not_a_globs_question_mark() -> None:
    assert split_glob("s3://b/in/a?.json?region=x&scheme=http") == ("s3://b/in/?region=x&scheme=http", "a?.json")
    assert split_glob("/data/in/what?x=1.json") == ("/data/in/", "what?x=1.json")
    assert split_glob("*.json") == (".", "*.json")
    assert split_glob("s3://b/a.json?region=x") is None
    assert last_name("s3://bucket/runs/table/?region=x") == "table"


@pytest.mark.parametrize(
    ("url", "below"),
    [
        ("s3://bucket/folder/?region=eu-west-1", "deep/100% sure #1?.json"),
        ("s3://bucket?region=eu-west-1", "a.json"),
        ("file:///data/", "100% sure.json"),
        ("/data", "100% sure.json"),
        ("memory://folder", "deep/a b.json"),
    ],
)
def test_a_name_in_a_folder_has_a_url_that_leads_there(url: str, below: str) -> None:
    folder = Folder.at(url)
    path = resolve(folder.url_of(below))[1]
    assert path == folder.system.base_path + below
    holding, name = Folder.holding(folder.url_of(below))
    assert holding.system.base_path + name == path
    assert resolve(holding.url_of(name))[1] == path
    assert folder.below("deep").system.base_path == folder.system.base_path + "deep/"


def test_urls_keep_their_options() -> None:
    assert Folder.at("s3://bucket/out/?region=x").url_of("a/b.json") == "s3://bucket/out/a/b.json?region=x"
    assert Folder.at("s3://bucket/out?region=x").below("a").url == "s3://bucket/out/a?region=x"


def test_a_folder_is_the_same_wherever_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Folder.at("out")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pickle.loads(pickle.dumps(folder)).write_text("deep/a.txt", "here")
    assert (tmp_path / "out" / "deep" / "a.txt").read_text() == "here"
    assert folder.url == str(tmp_path / "out")


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_files_in_a_folder(tmp_path: Path, scheme: str) -> None:
    folder = Folder.at(f"{scheme}{tmp_path}/out" if scheme == "" else "memory://storage/out")
    assert folder.names() is None
    assert folder.files() == []
    assert folder.read_text("a.txt") is None
    folder.write_text("a.txt", "one")
    folder.write_json_lines("deep/b.jsonl", [{"a": "é"}, {}])
    assert folder.names() == ["a.txt", "deep"]
    assert folder.files() == ["a.txt", "deep/b.jsonl"]
    assert folder.below("deep").files(".jsonl") == ["b.jsonl"]
    assert folder.read_text("deep/b.jsonl") == '{"a": "é"}\n{}\n'
    folder.delete("deep")
    folder.delete("not there")
    assert folder.files() == ["a.txt"]


def test_a_file_has_its_name_only_once_it_is_whole(tmp_path: Path) -> None:
    folder = Folder.at(tmp_path / "folder")

    def broken(stream: object) -> None:
        stream.write(b"half")  # type: ignore[attr-defined]
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write("file.json", broken)
    assert not folder.has("file.json")
    assert folder.names() == []
    folder.write_json("file.json", {"a": 1})
    assert folder.read_text("file.json") == '{\n  "a": 1\n}\n'
    assert folder.names() == ["file.json"]


@pytest.mark.parametrize(
    ("error", "storage", "passes"),
    [
        (OSError(errno.ECONNRESET, "reset"), True, True),
        (OSError(errno.ENOSPC, "full"), True, True),
        (PermissionError(errno.EACCES, "denied"), True, False),
        (OSError("Corrupt snappy compressed data."), False, True),
        (ValueError("AWS Error"), False, None),
        *(
            (OSError(f"When reading: AWS Error {words} during GetObject operation: "), True, passes)
            for words, passes in {
                "NETWORK_CONNECTION": True,
                "SLOW_DOWN": True,
                "INTERNAL_FAILURE": True,
                "UNKNOWN (HTTP status 503)": True,
                "ACCESS_DENIED": False,
                "INVALID_ACCESS_KEY_ID": False,
                "SIGNATURE_DOES_NOT_MATCH": False,
                "NO_SUCH_BUCKET": False,
                "UNKNOWN (HTTP status 301)": False,
            }.items()
        ),
        (OSError("Bucket 'b' not found. To create buckets, enable the allow_bucket_creation option."), False, False),
        (OSError("google::cloud::Status(UNAVAILABLE: Could not connect to server)"), True, True),
        (OSError("google::cloud::Status(UNAVAILABLE: Could not create a OAuth2 access token)"), True, False),
    ],
)
def test_errors_of_storage_are_told_from_those_of_files_and_those_that_pass_from_those_that_do_not(
    error: Exception, storage: bool, passes: bool | None
) -> None:
    assert of_storage(error) == storage
    if isinstance(error, OSError):
        assert may_pass(error) == passes


def test_google_cloud_storage_is_not_waited_for_long() -> None:
    closed = "?endpoint_override=127.0.0.1:1&scheme=http"
    for more, seconds in (("", 30), (closed, 30), (f"{closed}&retry_limit_seconds=1", 1)):
        file_system, path = resolve(f"gs://anonymous@bucket/a b{more}")
        assert path == "bucket/a b"
        assert file_system.__reduce__()[1][0]["retry_time_limit"] == timedelta(seconds=seconds)  # as tasks get it
    with pytest.raises(OSError, match="Could not connect") as caught:
        file_system.get_file_info(path)
    assert may_pass(caught.value)


def test_json_is_strict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Folder.at(tmp_path).write_json("x.json", math.nan)


def test_paths_become_absolute_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert absolute("a/../b") == str(tmp_path / "b")
    assert absolute("s3://bucket/table/") == "s3://bucket/table"
    assert absolute("file:///data/a%20b/") == "/data/a b"
    assert [is_relative(path) for path in ("a", "./a", "/a", "~/a", "s3://b/a", "file:///a")] == [True] * 2 + [
        False
    ] * 4


def test_a_relative_path_in_a_submitted_job_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    with pytest.raises(UserError, match=r"runs/out is a relative path.*s3://"):
        Folder.at("runs/out")
    assert Folder.at("/data/out").url == "/data/out"
    assert absolute("s3://bucket/out") == "s3://bucket/out"
