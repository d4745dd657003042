from __future__ import annotations

import errno
import gzip
from pathlib import Path
from typing import Any

import fsspec
import pytest

from raydpp.errors import UserError
from raydpp.ingest import files as files_module
from raydpp.ingest.files import RawFile, RawRow, list_files, read_rows
from raydpp.storage import Folder

SHARED = Path(__file__).parents[3] / "shared" / "data"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "data [1] 100%"  # a folder's name is not a glob
    names = "a.jsonl b.json.gz deep/c.parquet deep/er/d.csv notes.txt _SUCCESS .e.json _old/f.json .git/g.json"
    for name in names.split():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"{}" if name != "a.jsonl" else b'{"a": 1}\n')
    return root


def at(path: Path | str) -> RawFile:
    return RawFile(*Folder.holding(str(path)), 0)


def found(root: Path, *inputs: str) -> list[str]:
    return [str(Path(file.url).relative_to(root)) for file in list_files(inputs)]


def test_a_folder_is_searched_through(tree: Path) -> None:
    assert found(tree, str(tree)) == ["a.jsonl", "b.json.gz", "deep/c.parquet", "deep/er/d.csv"]
    assert list_files([str(tree / "a.jsonl")]) == [RawFile(Folder.at(tree), "a.jsonl", 9)]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("*.jsonl", ["a.jsonl"]),
        ("?.json*", ["a.jsonl", "b.json.gz"]),
        ("[ab].*", ["a.jsonl", "b.json.gz"]),
        ("**/*.csv", ["deep/er/d.csv"]),
        ("**", ["a.jsonl", "b.json.gz", "deep/c.parquet", "deep/er/d.csv"]),
        ("de*", ["deep/c.parquet", "deep/er/d.csv"]),
        ("*/*.parquet", ["deep/c.parquet"]),
        (".e*", [".e.json"]),
        ("_old/*", ["_old/f.json"]),
    ],
)
def test_globs(tree: Path, monkeypatch: pytest.MonkeyPatch, pattern: str, names: list[str]) -> None:
    monkeypatch.chdir(tree)
    assert found(tree, pattern) == names
    assert found(tree, f"./{pattern}") == names


def test_every_file_is_listed_once(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tree)
    inputs = ["deep", "*.jsonl", str(tree / "a.jsonl"), "./a.jsonl", (tree / "a.jsonl").as_uri(), "deep/"]
    assert found(tree, *inputs) == ["a.jsonl", "deep/c.parquet", "deep/er/d.csv"]


def test_a_file_whose_name_looks_like_a_glob(tree: Path) -> None:
    (tree / "x[1]*.json").write_text("{}")
    assert found(tree, str(tree / "x[1]*.json")) == ["x[1]*.json"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing.jsonl", "does not exist"),
        ("notes.txt", r"unknown suffix. Known are \.jsonl"),
        ("empty", "has no file to read.*jsonl"),
        ("*.xml", "matches no file to read"),
        ("*.txt", "matches no file to read"),
    ],
)
def test_an_input_that_leads_nowhere_is_refused(
    tree: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    (tree / "empty").mkdir()
    monkeypatch.chdir(tree)
    with pytest.raises(UserError, match=message):
        list_files([str(tree), name])
    with pytest.raises(UserError, match="give at least one"):
        list_files([])


def test_a_folder_that_may_not_be_listed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(url: str) -> Any:
        raise PermissionError(errno.EACCES, "Access denied")

    monkeypatch.setattr(files_module, "resolve", denied)
    with pytest.raises(UserError, match=r"s3://closed cannot be listed: .*Access denied"):
        list_files(["s3://closed"])


def test_remote_files() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/in/a b.jsonl": b'{"a": 1}\n', "/corpus/in/deep/b.json": b"[{}]", "/corpus/in/_c.json": b""})
    expected = [("memory://corpus/in/a b.jsonl", 9), ("memory://corpus/in/deep/b.json", 4)]
    assert [(file.url, file.bytes) for file in list_files(["memory://corpus/in"])] == expected
    found = list_files(["memory://corpus/in/**/*.json*", "memory://corpus/in/a b.jsonl"])
    assert [(file.url, file.bytes) for file in found] == expected
    assert list(read_rows(found[0])) == [RawRow(0, {"a": 1}, None)]


def test_a_damaged_file_ends_with_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"a": 1}, {"a": 2}, {"a"')
    *good, last = read_rows(at(path))
    assert [row.value for row in good] == [{"a": 1}, {"a": 2}]
    assert (last.row, last.value) == (2, None)
    assert str(last.reason).startswith("the file cannot be read from here on: Expecting ':'")
    for name in ("b.jsonl.gz", "c.parquet"):
        (tmp_path / name).write_bytes(gzip.compress(b"{}\n" * 9)[:-9] + b"PAR1")
        (only,) = read_rows(at(tmp_path / name))
        assert (only.row, only.value) == (0, None)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.parquet"])
def test_bytes_that_cannot_be_fetched_are_no_damage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable(fsspec.implementations.memory.MemoryFile):
        def _fail(self, *_: Any) -> Any:
            raise TimeoutError("no answer")

        read = readinto = _fail

    fsspec.filesystem("memory").pipe(f"/unreachable/{name}", b"x" * 100)
    monkeypatch.setattr(
        fsspec.implementations.memory.MemoryFileSystem,
        "_open",
        lambda self, path, **_: Unreachable(self, path, b"x" * 100),
    )
    with pytest.raises(TimeoutError, match="no answer"):
        list(read_rows(at(f"memory://unreachable/{name}")))
    with pytest.raises(FileNotFoundError):
        list(read_rows(at(f"/no/such/{name}")))


def test_an_unknown_suffix_is_not_read() -> None:
    with pytest.raises(UserError, match="unknown suffix"):
        next(read_rows(at("/data/notes.txt")))
