from __future__ import annotations

import pytest

from raydpp.errors import UserError
from raydpp.ingest.sources import matches, name_sources, value_for


@pytest.mark.parametrize(
    ("urls", "names"),
    [
        (["/in/a.jsonl"], ["a"]),
        (["/in/a.v1.jsonl.gz", "/in/a.v2.parquet"], ["a.v1", "a.v2"]),
        (["/in/gsm/train.jsonl", "/in/alpaca/train.jsonl"], ["gsm", "alpaca"]),
        (["/in/gsm/data/train.jsonl", "/in/alpaca/data/train.jsonl"], ["gsm", "alpaca"]),
        (["/in/gsm/train.jsonl", "/in/alpaca/train.jsonl", "/in/dolly.csv"], ["gsm", "alpaca", "dolly"]),
        (["/in/gsm/train.jsonl", "/in/alpaca/train.jsonl", "/in/gsm.csv"], ["gsm/train", "alpaca/train", "gsm"]),
        (
            ["/in/gsm/train.jsonl", "/in/gsm/test.jsonl", "/in/alpaca/train.jsonl", "/in/alpaca/test.jsonl"],
            ["gsm/train", "gsm/test", "alpaca/train", "alpaca/test"],
        ),
        (["/in/train-00000-of-00002.parquet", "/in/train-00001-of-00002.parquet"], ["train", "train"]),
        (["/in/set/train-00000-of-00002-ab12ef.parquet", "/in/set/test.parquet"], ["train", "test"]),
        (["/in/a/part-00000-77.snappy.parquet", "/in/a/part-00001-78.snappy.parquet"], ["a", "a"]),
        (["/in/a/part-00000.parquet", "/in/b/part-00000.parquet"], ["a", "b"]),
        (["/in/web_0001.jsonl", "/in/web_0002.jsonl", "/in/code_v2.jsonl"], ["web", "web", "code_v2"]),
        (["/in/alpaca_52k.json", "/in/data-2023.json", "/in/data-2024.json"], ["alpaca_52k", "data-2023", "data-2024"]),
        (["/in/train.jsonl", "/in/train.csv"], ["train", "train"]),
        (["s3://b/gsm/train.jsonl", "s3://c/gsm/train.jsonl"], ["b", "c"]),
        (["s3://b/in/gsm.jsonl.gz?region=x&scheme=http", "s3://b/in/b.csv?region=x"], ["gsm", "b"]),
        (["/train.jsonl", "/in/train.jsonl"], ["train", "in/train"]),
        (["/00000.parquet"], ["00000"]),
    ],
)
def test_a_source_is_named_by_what_tells_paths_apart(urls: list[str], names: list[str]) -> None:
    assert name_sources(urls) == dict(zip(urls, names, strict=True))


def test_rules_come_first() -> None:
    urls = ["/in/gsm/train.jsonl", "/in/gsm/test.jsonl", "/in/b/train.jsonl"]
    assert list(name_sources(urls, ["maths=gsm/*", "rest=*.jsonl"]).values()) == ["maths", "maths", "rest"]
    assert list(name_sources(urls, ["a=b=gsm/*", "maths=gsm/*"][1:]).values()) == ["maths", "maths", "train"]
    for rule in ("maths", "=gsm/*", "maths=other/*", "maths="):
        with pytest.raises(UserError, match=r"--source .*NAME=GLOB.*the files are /in/gsm/train\.jsonl, "):
            name_sources(urls, [rule])


def test_a_column_is_named_for_all_files_or_for_some() -> None:
    options = ["gsm/*=problem", "text", "*.csv=q"]
    assert value_for("/in/gsm/a.jsonl", options, "--prompt-column") == "problem"
    assert value_for("/in/b/a.csv", options, "--prompt-column") == "q"
    assert value_for("/in/b/a.jsonl", options, "--prompt-column") == "text"
    assert value_for("/in/b/a.jsonl", options[:1], "--prompt-column") is None
    with pytest.raises(UserError, match="--prompt-column a b: give one name"):
        value_for("/in/a.jsonl", ["a", "b"], "--prompt-column")


def test_a_glob_is_compared_from_the_right() -> None:
    assert matches("s3://bucket/in/gsm/a.jsonl", "gsm/*.jsonl")
    assert matches("s3://bucket/in/gsm/a.jsonl?region=eu-west-1", "gsm/*.jsonl")
    assert not matches("s3://bucket/in/gsm/a.jsonl", "gsm/*.csv")
    assert matches("/in/a.jsonl", "/in/*.jsonl")
    assert not matches("/x/in/a.jsonl", "/in/*.jsonl")
