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
    modified = (tree / "a.jsonl").stat().st_mtime_ns
    assert list_files([str(tree / "a.jsonl")]) == [RawFile(Folder.at(tree), "a.jsonl", 9, modified)]


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
        *good, last = read_rows(at(tmp_path / name))
        assert [row.value for row in good] == [{}] * len(good)
        assert (last.row, last.value) == (len(good), None)


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


def test_what_links_lead_to_is_listed_once_under_its_own_name(tree: Path) -> None:
    (tree / "a_link").symlink_to(tree / "deep")
    (tree / "deep" / "round").symlink_to(tree)
    (tree / "deep" / "er" / "round").symlink_to(tree / "deep")
    (tree / "again.jsonl").symlink_to(tree / "a.jsonl")
    names = ["a.jsonl", "b.json.gz", "deep/c.parquet", "deep/er/d.csv"]
    assert found(tree, str(tree)) == names
    assert found(tree, str(tree), str(tree / "a_link")) == names


def test_a_name_that_is_not_utf8_is_named(tree: Path) -> None:
    (tree / "odd").mkdir()
    with open(bytes(tree / "odd") + b"/\xff.jsonl", "wb"):
        pass
    for url in (tree, tree / "odd", tree / "odd" / "*.jsonl"):
        with pytest.raises(UserError, match=r"name is not UTF-8 .*rename it"):
            list_files([str(url)])


def test_what_describes_a_dataset_is_not_read_as_its_rows(tree: Path) -> None:
    for name in ("saved/train/data-00000-of-00001.arrow", "saved/train/state.json", "saved/train/dataset_info.json"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text("{}")
    (tree / "saved" / "dataset_dict.json").write_text("{}")
    (tree / "saved" / "state.json").write_text("{}")  # somebody's data: no .arrow file is beside it
    assert found(tree, str(tree / "saved")) == ["saved/state.json", "saved/train/data-00000-of-00001.arrow"]
    (tree / "hub" / "data").mkdir(parents=True)
    (tree / "hub" / "dataset_infos.json").write_text("{}")
    (tree / "hub" / "data" / "train-00000-of-00001.parquet").write_text("")
    assert found(tree, str(tree / "hub")) == ["hub/data/train-00000-of-00001.parquet"]
    assert found(tree, str(tree / "saved" / "dataset_dict.json")) == ["saved/dataset_dict.json"]  # it was named


def test_the_hub_is_a_file_system_like_others(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import HfFileSystem

    memory = fsspec.filesystem("memory")
    memory.pipe({"/datasets/me/set/train.jsonl": b'{"prompt": "Q", "completion": "A"}\n'})

    def in_memory(name: str) -> Any:
        return lambda _, path, *args, **more: getattr(memory, name)(path, *args, **more)

    for name in ("info", "ls", "find", "open", "_open"):
        monkeypatch.setattr(HfFileSystem, name, in_memory(name))
    (file,) = list_files(["hf://datasets/me/set/train.jsonl"])
    assert [row.value for row in read_rows(file)] == [{"prompt": "Q", "completion": "A"}]
