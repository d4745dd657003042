"""What a selection leaves behind: the selection table, its rows of the gradient table, and a dataset to train on.

``datasets.load_dataset(OUT)`` and what is built on it (TRL, axolotl) read README.md, which is a card for people too;
LLaMA-Factory reads dataset_info.json. Both name examples.jsonl, whose rows are in the order of picking: since greedy is
nested, the first part of them is the selection for a smaller budget.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import yaml

from raydpp import runs
from raydpp.cluster import Here
from raydpp.errors import UserError
from raydpp.ingest.schemas import tools_of, without_tools
from raydpp.report.table import Table, shorten
from raydpp.select.request import Picked, Request
from raydpp.storage import Folder
from raydpp.tables import GRADIENTS, SELECTION_SCHEMA, GradientTable, Part, parquet_parts, partition_files, write_table

if TYPE_CHECKING:
    from raydpp.report.html import Section

EXAMPLES = "examples.jsonl"
_DISTANCES = "distances.json"
_FIRST = ("messages", "id", "source", "rank", "log_gain")
_TURN = {"role": "string", "content": "string", "reasoning_content": "string", "weight": "int64"}
_KINDS = {bool: "bool", int: "int64", float: "float64", str: "string"}  # what datasets calls them
_LARGEST = 2**63


def write_selection(run: runs.Run, picked: Picked, request: Request) -> None:
    """OUT/selection and OUT/gradients, in the order of picking."""
    picks, gains = picked.rows, picked.selection.log_gains
    scores = request.scores(picks)
    columns = {
        "rank": np.arange(1, len(picks) + 1),
        "id": picks["id"],
        "source": picks["source"] if "source" in picks.column_names else pa.nulls(len(picks), pa.string()),
        "log_gain": gains,
        "log_det": np.cumsum(gains),
        "quality": pa.nulls(len(picks), pa.float64()) if scores is None else scores,
    }
    write_table(run.out, "selection/selection.parquet", pa.table(columns, schema=SELECTION_SCHEMA))
    write_table(run.out, f"{GRADIENTS}/part-00000.parquet", picks)


def read_examples(tasks: Here, corpus: Folder, ids: Sequence[str], log_gains: Iterable[float]) -> list[dict[str, Any]]:
    """The selected conversations, in the order of picking; the corpus is filtered where it is read.

    A row has the messages as they were ingested, id, source, rank, log_gain and all columns that it had itself; one
    that would take the name of another is called ``original_...``. A column has one type in all rows: objects and
    lists are JSON text, as are values of columns whose types differ.

    Raises:
        UserError: An id that the corpus does not have.
    """
    found = _of_corpus(tasks, corpus, _of_ids, ids)
    rows = {row["id"]: row for table in found for row in table.to_pylist()}
    if missing := [identity for identity in ids if identity not in rows]:
        raise UserError(
            f"{len(missing)} of the selected examples are not in {corpus} (first: {missing[0]}): give the corpus that"
            " the gradient table was made of with --corpus"
        )
    chosen = [rows[identity] for identity in ids]
    extras = [json.loads(row.pop("extra", None) or "{}") for row in chosen]
    own = _uniform([_own_columns(row, extra) for row, extra in zip(chosen, extras, strict=True)])
    turns = [without_tools(row["messages"], tools_of(extra)) for row, extra in zip(chosen, extras, strict=True)]
    keys = [key for key in _TURN if any(turn.get(key) is not None for messages in turns for turn in messages)]
    return [
        {
            "messages": [{key: turn.get(key) for key in keys} for turn in turns[n]],
            "id": row["id"],
            "source": row["source"],
            "rank": n + 1,
            "log_gain": gain,
            **own[n],
        }
        for n, (row, gain) in enumerate(zip(chosen, map(float, log_gains), strict=True))
    ]


def read_texts(tasks: Here, corpus: Folder, ids: Sequence[str], longest: int) -> dict[str, str]:
    """Conversations as text, cut to so many characters, by id; of those that the corpus has."""
    found = _of_corpus(tasks, corpus, _texts, ids, longest)
    return {identity: text for texts in found for identity, text in texts.items()}


@dataclass(frozen=True)
class Distances:
    """Log-det distances of the first 1, 2, ... m picks, and of as many random examples, where they were computed."""

    method: str
    curves: Mapping[str, Sequence[float]]  # by method, the selection's own and random

    @classmethod
    def read(cls, folder: Folder) -> Distances:
        return cls(**json.loads(folder.read_text(_DISTANCES) or '{"method": "", "curves": {}}'))

    def say(self, size: int) -> str | None:
        found = {name: f"{curve[size - 1]:.4f}" for name, curve in self.curves.items() if len(curve) >= size}
        if self.method not in found:
            return None
        beside = f"; of as many random ones {found['random']}" if {"random"} < found.keys() else ""
        return f"{found[self.method]} nats per example{beside} (smaller is more diverse)"


def about(table: GradientTable, request: Request, how: str, config: Mapping[str, Any]) -> dict[str, str]:
    """What a card says of how its examples were selected, by name."""
    made, weight = table.fingerprint, config["quality_weight"]
    scored = " ".join(config["quality"] or [config["cost_column"]])
    judged = f", quality weight {weight:g} on {scored}" if weight else ""
    limits = ("size", "tokens", "min_log_gain", "min_per_source", "max_per_source", "keep_mix", "owned", "exclude")
    given = {name.replace("_", "-"): config[name] for name in limits if config[name] not in (None, [], 0.0)}
    budget = [f"--{name} {' '.join(value) if isinstance(value, list) else value}" for name, value in given.items()]
    points = f"{table.dimension:,} dimensions"
    if made:
        points = f"{made['representation']} under {made['model']}, {points}"
    return {
        "picked from": f"`{config['table']}`, {table.rows:,} examples of `{config['corpus'] or table.corpus}`",
        "points": points,
        "picked by": f"{how}, {request.objective.kernel}{judged}",
        "budget": f"`{' '.join(budget)}`",
        "again": f"`raydpp select --config {config['out']}/run.json --out NEW`",
    }


def cost_section(facts: Mapping[str, Any]) -> Section:
    """What run.json says of the work, and the command that repeats it."""
    from raydpp.report.html import Section

    counts = facts["counts"]
    rows = {
        "examples to select from": counts["in"],
        "examples selected": counts["rows"],
        "examples owned before": counts["owned"] or None,
        "partitions": counts["partitions"],
        **{name: facts[name] for name in ("oracle", "rounds", "gamma", "log_det")},
        **{f"seconds, {part}": took for part, took in facts["seconds"].items()},
    }
    table = Table("From run.json", ["", ""], [[name, value] for name, value in rows.items() if value is not None])
    again = facts["card"]["again"].strip("`")
    return Section("What it cost", "The command below repeats the selection.", table, command=again)


def write_dataset(
    out: Folder,
    rows: Sequence[Mapping[str, Any]],
    facts: Mapping[str, str],
    log_det: float,
    whole: Mapping[str, float],
    distances: Distances,
) -> None:
    """OUT/examples.jsonl, README.md and dataset_info.json.

    Args:
        out: The selection's folder.
        rows: From ``read_examples``, or the first of them.
        facts: What the card says, by name.
        log_det: Of the selection, in nats.
        whole: The share of each source in what was selected from.
        distances: Of the selection, or of one that this is the first part of.
    """
    facts = {**facts, "log det": f"{log_det:,.2f} nats"}
    if said := distances.say(len(rows)):
        facts["log-det distance"] = said
    facts["order"] = "that of picking: under a budget of examples, the first rows are the selection for a smaller one"
    picked = Counter(row["source"] for row in rows)
    mix = [f"| {name} | {share:.1%} | {picked[name] / len(rows):.1%} |" for name, share in whole.items()]
    front = {
        "configs": [{"config_name": "default", "data_files": [{"split": "train", "path": EXAMPLES}]}],
        "dataset_info": {"features": _features(rows)},  # else datasets guesses by the first megabytes
    }
    listed = [f"- {name}: {value}" for name, value in facts.items()]
    table = ["", "| source | of all | of the selection |", "|---|---|---|", *mix] if mix else []
    title = f"# {len(rows):,} selected examples"
    card = ["---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "", title, "", *listed, *table, ""]
    tags = {f"{name}_tag": name for name in ("role", "content", "user", "assistant", "system")}
    tags["observation_tag"] = "tool"
    described = {"file_name": EXAMPLES, "formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    out.write_json_lines(EXAMPLES, rows)
    out.write_json("dataset_info.json", {"raydpp": described})
    if distances.curves:
        out.write_json(_DISTANCES, {"method": distances.method, "curves": dict(distances.curves)})
    out.write_text("README.md", "\n".join(card))


def _of_corpus(tasks: Here, corpus: Folder, look: Callable[..., Any], ids: Sequence[str], *more: Any) -> list[Any]:
    """What ``look(files, ids, ...)`` finds in groups of the corpus's files."""
    parts = parquet_parts(corpus.below("corpus"))
    wanted = tasks.put(pa.array(ids, pa.string()))
    groups = partition_files(parts, tasks.cpus) if tasks.on_ray else [parts]
    found: list[Any] = tasks.get([tasks.submit(look, group, wanted, *more) for group in groups])
    return found


def _of_ids(parts: Sequence[Part], ids: pa.Array) -> pa.Table:
    """The rows of these ids, one file in memory at a time."""
    return pa.concat_tables([(rows := part.read(part.columns)).filter(pc.is_in(rows["id"], ids)) for part in parts])


def _texts(parts: Sequence[Part], ids: pa.Array, longest: int) -> dict[str, str]:
    found = {}
    for part in parts:
        rows = part.read(["id", "messages"])
        for row in rows.filter(pc.is_in(rows["id"], ids)).to_pylist():
            turns = (f"{turn['role']}: {turn['content'] or ''}" for turn in row["messages"])
            found[row["id"]] = shorten("\n\n".join(turns), longest)
    return found


def _own_columns(row: Mapping[str, Any], extra: Mapping[str, Any]) -> dict[str, Any]:
    carried = {name: value for name, value in row.items() if name not in _FIRST and value is not None}
    return {f"original_{name}" if name in _FIRST else name: value for name, value in {**carried, **extra}.items()}


def _uniform(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every row with every column, each column with values of one type, or null."""
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [row.get(name) for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if kinds == {int, float}:
            values = [None if value is None else float(value) for value in values]
        elif len(kinds) > 1 or kinds & {dict, list} or any(abs(v) >= _LARGEST for v in values if type(v) is int):
            values = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        for row, value in zip(rows, values, strict=True):
            row[name] = value
    return rows


def _features(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The types of the columns, as datasets writes them into a card."""
    turn = [{"name": key, "dtype": _TURN[key]} for key in rows[0]["messages"][0]]
    features: list[dict[str, Any]] = [{"name": "messages", "list": turn}]
    for name in list(rows[0])[1:]:
        kind = next((type(row[name]) for row in rows if row[name] is not None), str)
        features.append({"name": name, "dtype": _KINDS[kind]})
    return features
