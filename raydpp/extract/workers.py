"""The workers of extract: tasks that read and tokenise units, actors that hold the model, and Ray Data between them."""

from __future__ import annotations

import functools
import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import metrics, runs
from raydpp.cluster import ActorPlan
from raydpp.errors import RowError, UserError
from raydpp.extract.isolation import Features, IsolatedExtractor
from raydpp.extract.sample import Sample
from raydpp.extract.units import REJECTS, Completed, Piece, Unit, plan_units, scan_output
from raydpp.gradients.config import ExampleFeatures, ExtractorConfig, Masking
from raydpp.gradients.model import load_tokenizer, vocabulary_size
from raydpp.gradients.tokenization import TokenizedExample, tokenize, tokenize_for_encoder
from raydpp.storage import Folder, last_name
from raydpp.tables import GRADIENTS, Part, read_columns, vector_array, write_table

COUNTS = ("rows", "rejects", "tokens", "padded_tokens", "model_seconds", "actor_seconds")
"""What an actor reports of a unit; actor_seconds are those since the one before it, or since the actor was started."""

_REPORT = pa.schema(
    [(name, pa.float64() if "seconds" in name else pa.int64()) for name in COUNTS] + [("error", pa.string())]
)
_TOKENIZED = pa.schema(
    [
        ("unit", pa.string()),
        ("id", pa.string()),
        ("source", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("response", pa.list_(pa.bool_())),
        ("cut", pa.int32()),  # tokens left out
        ("reason", pa.string()),  # null where the row can be used
    ]
)
_LIGHT = 0.25  # CPUs of a task that reads and tokenises beside the actors


@dataclass(frozen=True)
class ExtractJob:
    """What the tasks and actors need; ``owner`` stands in run.json until another start takes the folder over."""

    corpus: Folder
    out: Folder
    owner: str
    extractor: ExtractorConfig
    masking: Masking
    schema: pa.Schema
    plan: ActorPlan


def run_units(
    chosen: Sample, job: ExtractJob, completed: Completed, size: int, bar: Any
) -> tuple[Completed, dict[str, float]]:
    """Work on what is not completed yet; what is completed then, and the COUNTS of this session.

    Raises:
        UserError: The job cannot go on.
        RuntimeError: Conversations are missing in the end.
    """
    session: dict[str, float] = dict.fromkeys(COUNTS, 0)
    # once more where a start that this one took over has put away what it was found to have written
    for _ in range(2):
        if not (units := plan_units(chosen, completed, size, job.owner)):
            break
        for report in _reports(units, job):
            if report["error"]:
                raise UserError(report["error"])
            bar.update(report["rows"] + report["rejects"])
            for name in COUNTS:
                session[name] += report[name]
        completed = scan_output(job.out)
        if len(completed.ids) == chosen.rows:
            break
    if len(completed.ids) != chosen.rows:
        raise RuntimeError(f"{chosen.rows} conversations went in, but {len(completed.ids)} came out: run it again")
    return completed, session


def _reports(units: list[Unit], job: ExtractJob) -> Iterator[dict[str, Any]]:
    """What the actors report of each unit, in the order in which they finish."""
    import ray
    from ray.data._internal.execution.operators.actor_pool_map_operator import ActorPoolMapOperator

    blocks = [
        pa.table(
            {
                "name": [unit.name] * len(unit.pieces),
                "file": [piece.part.name for piece in unit.pieces],
                "rows": pa.array([piece.rows for piece in unit.pieces], pa.list_(pa.int64())),
            }
        )
        for unit in units
    ]
    tokenised = ray.data.from_arrow(blocks).map_batches(
        functools.partial(_tokenise, job=job), batch_format="pyarrow", batch_size=None, num_cpus=_LIGHT
    )
    # Ray does a unit again, as often as it takes, whose actor or node is gone: what an example could do to its process
    # happens in a process apart, so that no unit can take one actor after the other with it.
    # The internal name, as the public one wants a batch size for GPUs: a batch is a unit, whatever its size.
    reports = tokenised.map_batches_internal(
        FeatureActor,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        batch_size=None,
        compute=ray.data.ActorPoolStrategy(min_size=job.plan.least, max_size=job.plan.most),
        num_cpus=job.plan.cpus,
        num_gpus=job.plan.gpus,
    )
    # By value: what an actor is made of, a few kilobytes here. Ray Data 2.60 would put it into the object store, for
    # which it has no option (ray-project/ray#57733), and Ray's core prints an error about actors whose arguments can
    # be lost. Inside the actor's own description they cannot.
    with mock.patch.multiple(
        ActorPoolMapOperator,
        _data_context_ref=property(lambda pool: pool.data_context),
        _map_transformer_ref=property(lambda pool: pool._map_transformer),
    ):
        yield from reports.iter_rows()


def _tokenise(table: pa.Table, job: ExtractJob) -> pa.Table:
    rows = table.to_pylist()
    pieces = (Piece(Part(job.corpus, row["file"]), np.asarray(row["rows"], np.int64)) for row in rows)
    return tokenize_unit(Unit(rows[0]["name"], tuple(pieces)), job)


def tokenize_unit(unit: Unit, job: ExtractJob) -> pa.Table:
    """The unit's conversations as the model reads them, or the reason why one cannot be used: _TOKENIZED."""
    rows: list[dict[str, Any]] = []
    for row in unit.read(["id", "source", "messages"]).to_pylist():
        found: dict[str, Any] = {"unit": unit.name, "id": row["id"], "source": row["source"], "cut": 0}
        try:
            example = tokenize_row(row["messages"], job.extractor, job.masking)
            found |= {"ids": example.ids, "response": example.response, "cut": example.cut}
        except RowError as error:
            found["reason"] = str(error)
        rows.append(found)
    return pa.Table.from_pylist(rows, schema=_TOKENIZED)


cached_tokenizer = functools.cache(load_tokenizer)  # once a process
_cached_vocabulary_size = functools.cache(vocabulary_size)


def tokenize_row(messages: Any, extractor: ExtractorConfig, masking: Masking) -> TokenizedExample:
    """One conversation as the model reads it. Raises UserError where there is no tokenizer, else RowError."""
    tokenizer = cached_tokenizer(extractor.model)
    try:
        if extractor.representation == "embedding":
            example = tokenize_for_encoder(messages, tokenizer, masking.max_length)
        else:
            example = tokenize(messages, tokenizer, masking)
        known, largest = _cached_vocabulary_size(extractor.model), int(example.ids.max())
        if known is not None and largest >= known:  # on a GPU it would end the process
            token = tokenizer.convert_ids_to_tokens(largest)
            raise RowError(f"the tokenizer has the token {token!r} (id {largest}), the model embeddings for {known}")
        return example
    except RowError:
        raise
    except Exception as error:  # any: one row must not end the job
        raise RowError(f"the tokenizer failed on this row: {type(error).__name__}: {error}") from error


def tokenize_first(
    chosen: Sample, extractor: ExtractorConfig, masking: Masking, most: int = 1_000
) -> tuple[list[TokenizedExample], dict[str, int]]:
    """Of the first conversations, a random sample, those that can be used; and the reasons of others, counted."""
    tables = (chosen.filter(read_columns([part], ["id", "source", "messages"])) for part in chosen.parts)
    rows = (row for table in tables for row in table.slice(0, most).to_pylist())
    examples: list[TokenizedExample] = []
    reasons: Counter[str] = Counter()
    for row in itertools.islice(rows, most):
        try:
            examples.append(tokenize_row(row["messages"], extractor, masking))
        except RowError as error:
            reasons[str(error)] += 1
    return examples, reasons


class FeatureActor:
    """Holds the model; turns a tokenised unit into its files, and reports COUNTS, or the error that ends the job."""

    def __init__(self, job: ExtractJob) -> None:
        self._job = job
        self._since = time.perf_counter()
        metrics.label("extract", last_name(job.out.url))
        self._extractor: IsolatedExtractor | UserError
        try:
            self._extractor = IsolatedExtractor(self.loader())
        except UserError as error:  # raised from here, Ray would start the actor again and again
            self._extractor = error

    def loader(self) -> Callable[[], Features]:
        """What makes the extractor, in the model's own process."""
        return functools.partial(_load, self._job.extractor, self._job.plan)

    def __call__(self, table: pa.Table) -> pa.Table:
        try:
            report = self._extract(table)
        except UserError as error:
            report = {"error": str(error)}
        return pa.Table.from_pylist([report], schema=_REPORT)

    def _extract(self, table: pa.Table) -> dict[str, Any]:
        if isinstance(self._extractor, UserError):
            raise self._extractor
        usable = table.filter(pc.is_null(table["reason"]))
        examples = [
            TokenizedExample(np.asarray(row["ids"], np.int32), np.asarray(row["response"], bool), row["cut"])
            for row in usable.select(["ids", "response", "cut"]).to_pylist()
        ]
        began = time.perf_counter()
        result = self._extractor(examples)
        seconds = time.perf_counter() - began
        good = pa.array([reason is None for reason in result.reasons], pa.bool_())
        features = self._job.schema.empty_table()
        if None in result.reasons:  # else neither D nor the scores are known
            features = feature_table(usable, examples, result, self._job.schema).filter(good)
        refused = table.filter(pc.is_valid(table["reason"]))
        failed = usable.drop_columns("reason").append_column("reason", pa.array(result.reasons, pa.string()))
        failed = failed.filter(pc.invert(good))
        rejects = [row for part in (refused, failed) for row in part.select(["id", "source", "reason"]).to_pylist()]
        out, owner = self._job.out, self._job.owner
        runs.require_owner(out, owner)
        name = table["unit"][0].as_py()
        # The rejects first: a unit whose Parquet file is there, which is what people look at, is whole.
        if rejects:
            out.write_json_lines(f"{REJECTS}/{name}.jsonl", rejects)
        if features.num_rows:
            write_table(out, f"{GRADIENTS}/{name}.parquet", features)
        try:
            runs.require_owner(out, owner)
        except UserError:  # taken over while it wrote: the new owner does these rows itself
            out.delete(f"{GRADIENTS}/{name}.parquet")
            out.delete(f"{REJECTS}/{name}.jsonl")
            raise
        tokens = sum(len(example.ids) for example in examples)
        since, self._since = self._since, time.perf_counter()
        counts = (len(features), len(rejects), tokens, result.padded_tokens, seconds, self._since - since)
        report = dict(zip(COUNTS, counts, strict=True))
        for name in metrics.COUNTERS.keys() & report.keys():
            metrics.count(name, report[name])
        return report


def _load(config: ExtractorConfig, plan: ActorPlan) -> Features:
    import torch

    from raydpp.gradients.representations import load_extractor

    if not plan.gpus:
        torch.set_num_threads(plan.threads)
    return load_extractor(config, "cuda" if plan.gpus else "cpu", max(1, int(plan.gpus)))


def feature_table(
    usable: pa.Table, examples: list[TokenizedExample], result: ExampleFeatures, schema: pa.Schema
) -> pa.Table:
    """The rows of the gradient table for n tokenised examples."""
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
        "truncated": pc.greater(usable["cut"], 0),
    }
    if result.difficulties is not None:
        columns["difficulty"] = pa.array(result.difficulties)
    return pa.Table.from_arrays([columns[name] for name in schema.names], schema=schema)
