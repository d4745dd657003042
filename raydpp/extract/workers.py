"""What the workers of extract do: the tasks that read and tokenise, and the actors that hold the model."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.cluster import ActorPlan
from raydpp.errors import RowError, UserError
from raydpp.extract.isolation import Features, IsolatedExtractor
from raydpp.extract.sample import Sample
from raydpp.extract.units import REJECTS, Done, Unit, look, plan_units
from raydpp.gradients.model import load_tokenizer
from raydpp.gradients.representations import ExampleFeatures, Extractor, ExtractorConfig, load_extractor
from raydpp.gradients.tokenization import Masking, TokenizedExample, tokenize, tokenize_text
from raydpp.storage import Folder
from raydpp.tables import GRADIENTS, Part, vector_array, write_table

COUNTS = ("rows", "rejects", "tokens", "padded_tokens")
"""What the actors report of every unit, beside its seconds."""


@dataclass(frozen=True)
class Work:
    """What the tasks and actors need to know.

    ``attempt`` is what run.json must still say when something is to be written: a worker of a run that another one has
    taken over must not write any more.
    """

    corpus: Folder
    out: Folder
    attempt: int
    extractor: ExtractorConfig
    masking: Masking
    schema: pa.Schema
    plan: ActorPlan


_cached_tokenizer = functools.cache(load_tokenizer)  # once a worker process


def tokenize_unit(unit: Unit, work: Work) -> pa.Table:
    """Some corpus rows -> unit, id, source, ids, response, truncated, reason (null where the row can be used)."""
    rows: list[dict[str, Any]] = []
    for row in unit.read(["id", "source", "messages"]).to_pylist():
        example: dict[str, Any] = {"ids": None, "response": None, "truncated": False, "reason": None}
        try:
            done = tokenize_row(row["messages"], work.extractor, work.masking)
            example |= {"ids": done.ids, "response": done.response, "truncated": done.truncated}
        except RowError as error:
            example["reason"] = str(error)
        rows.append({"unit": unit.name, "id": row["id"], "source": row["source"], **example})
    return pa.Table.from_pylist(rows, schema=_TOKENIZED)


def tokenize_row(messages: Any, extractor: ExtractorConfig, masking: Masking) -> TokenizedExample:
    """One conversation as the model reads it. Raises UserError where there is no tokenizer, else RowError."""
    tokenizer = _cached_tokenizer(extractor.model)
    try:
        if extractor.representation == "embedding":
            return tokenize_text(messages, tokenizer, masking.max_length)
        return tokenize(messages, tokenizer, masking)
    except RowError:
        raise
    except Exception as error:  # any: one row must not end the job
        raise RowError(f"the tokenizer failed on this row: {type(error).__name__}: {error}") from error


_TOKENIZED = pa.schema(
    [
        ("unit", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("response", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
        ("reason", pa.string()),
    ]
)


def tokenized_examples(table: pa.Table) -> list[TokenizedExample]:
    """The rows of such a table that have tokens."""
    return [
        TokenizedExample(np.asarray(row["ids"], np.int32), np.asarray(row["response"], bool), row["truncated"])
        for row in table.select(["ids", "response", "truncated"]).to_pylist()
    ]


class FeatureActor:
    """Holds the model; turns one unit into one Parquet file, and reports the counts, or why the job must end."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._extractor: IsolatedExtractor | UserError
        try:
            self._extractor = IsolatedExtractor(self.loader())
        except UserError as error:  # raised from here, Ray would start the actor again and again
            self._extractor = error

    def loader(self) -> Callable[[], Features]:
        """What makes the extractor, in the model's own process."""
        return functools.partial(_load, self._work.extractor, self._work.plan)

    def __call__(self, table: pa.Table) -> pa.Table:
        if isinstance(self._extractor, UserError):
            return _report(error=str(self._extractor))
        began = time.perf_counter()
        usable = table.filter(pc.is_null(table["reason"]))
        examples = tokenized_examples(usable)
        try:
            result = self._extractor(examples)
        except UserError as error:
            return _report(error=str(error))
        seconds = time.perf_counter() - began
        good = pa.array([reason is None for reason in result.reasons], pa.bool_())
        features = self._work.schema.empty_table()
        if None in result.reasons:  # else neither D nor the scores are known
            features = feature_table(usable, examples, result, self._work.schema).filter(good)
        failed = usable.drop_columns("reason").append_column("reason", pa.array(result.reasons, pa.string()))
        rejects = _rejects(table.filter(pc.is_valid(table["reason"]))) + _rejects(failed.filter(pc.invert(good)))
        if taken := taken_over(self._work):
            return _report(error=taken)
        name = table["unit"][0].as_py()
        if rejects:  # first: a table without its rejects would look whole
            self._work.out.write_json_lines(f"{REJECTS}/{name}.jsonl", rejects)
        if features.num_rows:
            write_table(self._work.out, f"{GRADIENTS}/{name}.parquet", features)
        tokens = sum(len(example.ids) for example in examples)
        return _report(len(features), len(rejects), tokens, result.padded_tokens, seconds)


def _load(config: ExtractorConfig, plan: ActorPlan) -> Extractor:
    import torch

    if not plan.gpus:
        torch.set_num_threads(plan.threads)
    return load_extractor(config, "cuda" if plan.gpus else "cpu")


def feature_table(
    usable: pa.Table, examples: list[TokenizedExample], result: ExampleFeatures, schema: pa.Schema
) -> pa.Table:
    """The rows of the gradient table for tokenised examples."""
    length = np.array([len(example.ids) for example in examples], np.int32)  # (n,)
    response = np.array([example.response.sum() for example in examples], np.int32)  # (n,)
    columns = {
        "id": usable["id"],
        "source": usable["source"],
        "gradient": vector_array(result.features, schema.field("gradient").type.value_type),
        "gradient_norm": pa.array(result.norms, pa.float32()),
        "loss": pa.nulls(len(length), pa.float32()) if result.losses is None else pa.array(result.losses),
        "prompt_tokens": pa.array(length - response),
        "response_tokens": pa.array(response),
        "truncated": usable["truncated"],
    }
    if result.difficulties is not None:
        columns["difficulty"] = pa.array(result.difficulties)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)


def taken_over(work: Work) -> str | None:
    """In words, that another run has taken over the folder; None while it has not."""
    record = json.loads(work.out.read_text(runs.RECORD) or "{}")
    if record.get("attempt") == work.attempt:
        return None
    return f"--out {work.out} was taken over by another run of the same command, which goes on; this one has ended"


def _report(
    rows: int = 0,
    rejects: int = 0,
    tokens: int = 0,
    padded_tokens: int = 0,
    seconds: float = 0.0,
    error: str | None = None,
) -> pa.Table:
    values = (*zip(COUNTS, (rows, rejects, tokens, padded_tokens), strict=True), ("seconds", seconds))
    columns = {name: [value] for name, value in values}
    return pa.table({**columns, "error": pa.array([error], pa.string())})


def _rejects(table: pa.Table) -> list[dict[str, Any]]:
    return table.select(["id", "source", "reason"]).to_pylist()


_LIGHT = 0.25  # CPUs: reading and tokenising beside the actors


def work_off(chosen: Sample, work: Work, done: Done, size: int, bar: Any) -> tuple[Done, dict[str, float]]:
    """Do what is not done yet.

    Args:
        chosen: The conversations that take part.
        work: What is done with them.
        done: What need not be done again.
        size: Conversations in one unit.
        bar: Progress, in conversations.

    Returns:
        What is done now, and what this session did of it: COUNTS and ``model_seconds``.

    Raises:
        UserError: The job cannot go on, in words.
        RuntimeError: Conversations are missing in the end.
    """
    session: dict[str, float] = dict.fromkeys((*COUNTS, "seconds"), 0)
    if units := plan_units(chosen, done, size, work.attempt):
        for report in _reports(units, work):
            if report["error"]:
                raise UserError(report["error"])
            bar.update(report["rows"] + report["rejects"])
            for name in session:
                session[name] += report[name]
        done = look(work.out)
    if len(done.ids) != chosen.rows:
        raise RuntimeError(f"{chosen.rows} conversations went in, but {len(done.ids)} came out: run it again")
    return done, {"model_seconds" if name == "seconds" else name: value for name, value in session.items()}


def _reports(units: list[Unit], work: Work) -> Iterator[dict[str, Any]]:
    """Do units on the cluster; what the actors report of each, as they finish."""
    import ray

    blocks = [
        pa.table({"name": [unit.name], "file": [unit.part.name], "rows": pa.array([unit.rows], pa.list_(pa.int64()))})
        for unit in units
    ]
    tokenised = ray.data.from_arrow(blocks).map_batches(
        functools.partial(_tokenise, work=work), batch_format="pyarrow", batch_size=None, num_cpus=_LIGHT
    )
    # Ray does a unit again, as often as it takes, whose actor or node is gone: what an example could do to its process
    # happens in a process apart, so that no unit can take one actor after the other with it.
    # The internal name, as the public one wants a batch size for GPUs: a batch is a unit, whatever its size.
    reports = tokenised.map_batches_internal(
        FeatureActor,
        fn_constructor_args=(work,),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=work.plan.least, max_size=work.plan.most),
        num_cpus=work.plan.cpus,
        num_gpus=work.plan.gpus,
    )
    yield from reports.iter_rows()


def _tokenise(table: pa.Table, work: Work) -> pa.Table:
    (row,) = table.to_pylist()
    return tokenize_unit(Unit(row["name"], Part(work.corpus, row["file"]), np.asarray(row["rows"], np.int64)), work)
