"""The conversations of the study: pools to select from, a validation set, held-out rows, and near copies."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.errors import RowError, UserError
from raydpp.extract.stage import extract
from raydpp.gradients.config import Masking
from raydpp.gradients.model import load_tokenizer
from raydpp.gradients.tokenization import TokenizedExample, tokenize
from raydpp.ingest.stage import ingest
from raydpp.storage import Folder
from raydpp.tables import open_table, parquet_parts, read_columns, vectors

MAX_LENGTH = 256
"""Only conversations of at most so many tokens take part: nothing is cut."""

HELD_OUT, TARGET, POOL = 32, 16, 300
"""Rows of each source: to measure the loss on, to aim at, to select from."""

SET = 144
"""Rows of each set whose diversity is measured; 2, 3, 4 and 6 divide it."""

COPIES = (1, 2, 3)
"""How many copies of each row a set has, beside the row."""

_FRAMES = ("Could you help me with this, please? {}", "Here is my request: {} Thank you.", "{} Take your time.")


@dataclass(frozen=True)
class Study:
    """What everything is made of.

    Attributes:
        rows: By id, those chosen: source, role (held-out, target, pool), place in it, tokens, response_tokens.
        copies: By id, near copies: copy_of (an id) and number.
        redundant: The source that half of a pool is of.
        features: By space (gradient, embedding), (n, D) of unit norm, and by space and id the place in them.
    """

    model: str
    redundant: str
    rows: pd.DataFrame
    copies: pd.DataFrame
    messages: Mapping[str, Any]
    features: Mapping[str, np.ndarray]
    places: Mapping[str, Mapping[str, int]]
    scores: pd.DataFrame  # by id: loss and gradient_norm

    @property
    def sources(self) -> list[str]:
        return sorted(set(self.rows.source))

    def ids(self, role: str, source: str | None = None, most: int | None = None) -> list[str]:
        """The ids of a role, the sources in turns."""
        held = self.rows[(self.rows.role == role) & (self.rows.place < (most or len(self.rows)))]
        held = held if source is None else held[held.source == source]
        return list(held.sort_values(["place", "source"]).index)

    def vectors(self, space: str, ids: Sequence[str]) -> np.ndarray:
        return self.features[space][[self.places[space][one] for one in ids]]  # (n, D)

    def tokenized(self, ids: Sequence[str]) -> list[TokenizedExample]:
        tokenizer = load_tokenizer(self.model)
        return [tokenize(self.messages[one], tokenizer, Masking(MAX_LENGTH)) for one in ids]

    def pools(self) -> dict[str, list[str]]:
        """By name, pools of the same size: of every source alike, or half of them of the redundant one."""
        others = [source for source in self.sources if source != self.redundant]
        half = POOL * len(self.sources) // 2
        rest = [one for source in others for one in self.ids("pool", source, half // len(others))]
        return {
            "diverse": self.ids("pool", most=POOL),
            "redundant": rest + self.ids("pool", self.redundant, 2 * half - len(rest)),
        }


def prepare(
    files: Sequence[str], out: str, model: str, encoder: str, redundant: str, gradients: str | None = None
) -> Study:
    """Ingest, choose and extract, or read what is there; ``gradients`` may hold those of the rows already."""
    ingest(list(files), f"{out}/corpus")
    rows, messages = _choose(out, model, redundant)
    Folder.at(out).write_text("ids.txt", "\n".join(rows.index) + "\n")
    Folder.at(out).write_json_lines("copies/copies.jsonl", _near_copies(rows, messages))
    ingest([f"{out}/copies"], f"{out}/copies-corpus")
    copied = _read(f"{out}/copies-corpus", ["id", "messages", "extra"])
    copies = pd.DataFrame([{"id": row["id"], **json.loads(row["extra"])} for row in copied]).set_index("id")
    messages |= {row["id"]: row["messages"] for row in copied}
    features, places, scores = {}, {}, []
    spaces: dict[str, dict[str, Any]] = {
        "gradient": {"model": model, "max_length": MAX_LENGTH},
        "embedding": {"model": encoder, "representation": "embedding"},
    }
    for space, options in spaces.items():
        found = []
        for corpus, only in (("corpus", [f"{out}/ids.txt"]), ("copies-corpus", None)):
            url = f"{out}/{space}s-of-{corpus}"
            if space == "gradient" and only and gradients:
                url = gradients
            else:
                extract(f"{out}/{corpus}", url, only=only, **options)
            table = open_table(url, "gradient")
            read = table.read(table.parts, ["loss", "gradient_norm"])
            found.append(read.filter(pc.is_in(read["id"], pa.array(rows.index))) if only else read)
        own = np.concatenate([vectors(one["gradient"]) for one in found]).astype(np.float32)  # (n, D)
        features[space] = own / np.linalg.norm(own, axis=1, keepdims=True)
        places[space] = {name: n for n, name in enumerate(name for one in found for name in one["id"].to_pylist())}
        scores.append(found[0].select(["id", "loss", "gradient_norm"]).to_pandas().set_index("id"))
    return Study(model, redundant, rows, copies, messages, features, places, scores[0])


def mixed(rows: pd.DataFrame) -> list[str]:
    """As many pool rows of every source as make a set, the sources in turns."""
    first = rows[(rows.role == "pool") & (rows.place < SET // rows.source.nunique())]
    return list(first.sort_values(["place", "source"]).index)


def _read(corpus: str, columns: Sequence[str]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = (
        read_columns(parquet_parts(Folder.at(corpus).below("corpus")), list(columns)).sort_by("id").to_pylist()
    )
    return rows


def _choose(out: str, model: str, redundant: str) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The first rows of every source that are short enough, by id, and the messages of each."""
    counts = runs.load_finished(["ingest"], Folder.at(f"{out}/corpus"))["counts"]["sources"]
    if redundant not in counts:
        raise UserError(f"--redundant {redundant}: the sources are {', '.join(counts)}")
    tokenizer = load_tokenizer(model)
    most = dict.fromkeys(counts, HELD_OUT + TARGET + POOL)
    most[redundant] += POOL * len(counts) // 2 - POOL
    taken: dict[str, list[dict[str, Any]]] = {source: [] for source in counts}
    messages = {}
    for row in _read(f"{out}/corpus", ["id", "source", "messages"]):
        have = taken[row["source"]]
        with contextlib.suppress(RowError):
            if len(have) == most[row["source"]]:
                continue
            example = tokenize(row["messages"], tokenizer, Masking(2 * MAX_LENGTH))
            if len(example.ids) > MAX_LENGTH:
                continue
            sizes = {"tokens": len(example.ids), "response_tokens": int(example.response.sum())}
            have.append({"id": row["id"], "source": row["source"], **_role(len(have)), **sizes})
            messages[row["id"]] = row["messages"]
    for source, have in taken.items():
        if len(have) < most[source]:
            raise UserError(f"{source} has {len(have)} rows of at most {MAX_LENGTH} tokens, too few: leave it out")
    return pd.DataFrame([row for have in taken.values() for row in have]).set_index("id"), messages


def _role(place: int) -> dict[str, Any]:
    for role, count in (("held-out", HELD_OUT), ("target", TARGET)):
        if place < count:
            return {"role": role, "place": place}
        place -= count
    return {"role": "pool", "place": place}


def _near_copies(rows: pd.DataFrame, messages: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Of the mixed set: other words around the prompt, and of every text one word in ten left out."""
    random, ids = np.random.default_rng(0), mixed(rows)
    for number in COPIES:
        for one in ids[: SET // (number + 1)]:
            turns = [{"role": turn["role"], "content": turn["content"]} for turn in messages[one]]
            for turn in turns:
                words = np.array(turn["content"].split(" "), object)
                turn["content"] = " ".join(words[random.random(len(words)) > 0.1]) or turn["content"]
            asked = next(turn for turn in turns if turn["role"] == "user")
            asked["content"] = _FRAMES[number - 1].format(asked["content"])
            yield {"messages": turns, "copy_of": one, "number": number}
