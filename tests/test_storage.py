from __future__ import annotations

from pathlib import Path

import fsspec
import pyarrow.fs as pafs
import pytest
from fsspec.registry import known_implementations

from raydpp.errors import UserError
from raydpp.storage import child_url, resolve, split_options


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
    assert split_options("s3://b/a?.json?region=x&scheme=http") == ("s3://b/a?.json", "?region=x&scheme=http")
    assert split_options("/data/what?x=1.json") == ("/data/what?x=1.json", "")
    assert split_options("memory://b/a?x=1") == ("memory://b/a?x=1", "")


@pytest.mark.parametrize(
    ("folder_url", "below"),
    [
        ("s3://bucket/folder/?region=eu-west-1", "deep/100% sure #1?.json"),
        ("s3://bucket?region=eu-west-1", "a.json"),
        ("file:///data/", "100% sure.json"),
        ("/data", "100% sure.json"),
        ("memory://folder", "deep/a b.json"),
    ],
)
def test_child_url_is_the_way_back(folder_url: str, below: str) -> None:
    folder = resolve(folder_url)[1]
    path = folder.rstrip("/") + "/" + below
    assert resolve(child_url(folder_url, folder, path))[1] == path
