"""What the user says of some files by a glob, and the names of sources: what tells the files' paths apart."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import PurePosixPath

from raydpp.errors import UserError, few
from raydpp.ingest.rows import CODECS, SUFFIXES
from raydpp.storage import split_options

_SHARD = re.compile(
    r"(?:^|[-_.])(?:\d+[-_.]of[-_.]\d+(?:[-_.][0-9a-f]+)?"  # train-00000-of-00002, as the Hugging Face hub has them
    r"|(?:part|shard|chunk)[-_.]?\d+.*|0\d{2,}|\d{5,})$",  # part-00000-..., train_0001
    re.IGNORECASE,
)


def matches(url: str, pattern: str) -> bool:
    """Whether a file is meant by a glob; a relative one is compared from the right: ``gsm/*.jsonl``."""
    return PurePosixPath(split_options(url)[0]).match(pattern)


def value_for(url: str, options: Sequence[str], option: str) -> str | None:
    """What a list of options, each VALUE or GLOB=VALUE, says for a file: the first glob that fits, else the value.

    Raises:
        UserError: Two values without a glob.
    """
    general = [text for text in options if "=" not in text]
    if len(general) > 1:
        raise UserError(
            f"{option} {' '.join(general)}: give one name, and others with the files they are for, GLOB=NAME"
        )
    split = (text.rpartition("=") for text in options if "=" in text)
    return next((value for pattern, _, value in split if matches(url, pattern)), general[0] if general else None)


def name_sources(urls: Sequence[str], rules: Sequence[str] = ()) -> dict[str, str]:
    """The source of every file: as a rule NAME=GLOB says, else the shortest name that tells it from the others.

    That is the file's name without its suffixes; of ``gsm/train.jsonl`` and ``alpaca/train.jsonl`` the folders' names.
    Shards of one set (``train-00000-of-00002``) are one source.

    Raises:
        UserError: A rule that is not NAME=GLOB, or that fits no file.
    """
    named = ruled_sources(urls, rules)
    keys = {url: _key(url) for url in urls if url not in named}
    short = _shortest(sorted(set(keys.values())))
    return {url: named.get(url) or short[keys[url]] for url in urls}


def ruled_sources(urls: Sequence[str], rules: Sequence[str]) -> dict[str, str]:
    """The source of every file that a rule NAME=GLOB names. Raises UserError as ``name_sources`` does."""
    named: dict[str, str] = {}
    for rule in rules:
        name, _, pattern = rule.partition("=")
        found = [url for url in urls if pattern and matches(url, pattern)]
        if not name or not found:
            raise UserError(
                f"--source {rule}: write NAME=GLOB, with a glob that fits a file; the files are {few(urls)}"
            )
        for url in found:
            named.setdefault(url, name)
    return named


def _key(url: str) -> tuple[str, ...]:
    """A file's folders and its name without suffixes and without what tells it from other shards."""
    path = PurePosixPath(split_options(url)[0])
    stem = path.name
    for suffixes in (CODECS, SUFFIXES):
        if stem.lower().endswith(tuple(suffixes)):
            stem = stem.rpartition(".")[0]
    rest = _SHARD.sub("", stem)
    folders = [part for part in path.parent.parts if part != "/"]
    return (*folders, rest) if rest else tuple(folders) or (stem,)


def _shortest(keys: list[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    depth = dict.fromkeys(keys, 1)
    while True:
        count = Counter(key[-depth[key] :] for key in keys)
        equal = [key for key in keys if count[key[-depth[key] :]] > 1 and depth[key] < len(key)]
        if not equal:
            break
        for key in equal:
            depth[key] += 1
    # gsm/data/train and alpaca/data/train: what follows the first name is the same, and may go.
    first = {key: key[-depth[key]] for key in keys}
    count_first = Counter(first.values())
    by_tail: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
    for key in keys:
        by_tail.setdefault(key[len(key) - depth[key] + 1 :], []).append(key)
    names = {key: "/".join(key[-depth[key] :]) for key in keys}
    for tail, alike in by_tail.items():
        if tail and len(alike) > 1 and all(count_first[first[key]] == 1 for key in alike):
            names |= {key: first[key] for key in alike}
    return names
