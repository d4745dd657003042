"""What the workers of extract do: the tasks that tokenise, and the actors that hold the model."""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import store
from raydpp.corpus.tokenization import Masking, TokenizedExample, tokenize
from raydpp.errors import RowError, UserError
from raydpp.gradients.extractor import ExtractorConfig, GradientExtractor
from raydpp.gradients.model import load_tokenizer
from raydpp.stages.cluster import ActorPlan
from raydpp.stages.tables import GRADIENTS


@dataclass(frozen=True)
class Work:
    """What the tasks and actors need to know."""

    out: str
    extractor: ExtractorConfig
    masking: Masking
    schema: pa.Schema
    plan: ActorPlan


_cached_tokenizer = functools.cache(load_tokenizer)  # once a worker process


def tokenize_table(table: pa.Table, work: Work) -> pa.Table:
    """Corpus rows -> id, source, ids, response, truncated, reason (null where the row can be used)."""
    tokenizer = _cached_tokenizer(work.extractor.model)
    rows: list[dict[str, Any]] = []
    for row in table.to_pylist():
        example: dict[str, Any] = {"ids": None, "response": None, "truncated": False, "reason": None}
        try:
            done = tokenize(row["messages"], tokenizer, work.masking)
            example |= {"ids": done.ids, "response": done.response, "truncated": done.truncated}
        except RowError as error:
            example["reason"] = str(error)
        rows.append({"id": row["id"], "source": row["source"], **example})
    return pa.Table.from_pylist(rows, schema=_TOKENIZED)


_TOKENIZED = pa.schema(
    [
        ("id", pa.string()),
        ("source", pa.string()),
        ("ids", pa.list_(pa.int32())),
        ("response", pa.list_(pa.bool_())),
        ("truncated", pa.bool_()),
        ("reason", pa.string()),
    ]
)


class GradientActor:
    """Holds the model; turns one batch of tokenised conversations into one Parquet file, and reports the counts.

    The file's name comes from the batch's first id, so that a batch done twice after a fault is written once.
    """

    def __init__(self, work: Work) -> None:
        import torch

        if work.plan.gpus:
            device = "cuda"
        else:
            device = "cpu"
            torch.set_num_threads(work.plan.threads)
        self._work = work
        self._extractor: GradientExtractor | UserError
        try:
            self._extractor = GradientExtractor(work.extractor, device)
        except UserError as error:  # raised from here, Ray would start the actor again and again
            self._extractor = error

    def __call__(self, table: pa.Table) -> pa.Table:
        if isinstance(self._extractor, UserError):
            raise self._extractor
        began = time.perf_counter()
        usable = table.filter(pc.is_null(table["reason"]))
        examples = [
            TokenizedExample(np.asarray(row["ids"], np.int32), np.asarray(row["response"], bool), row["truncated"])
            for row in usable.select(["ids", "response", "truncated"]).to_pylist()
        ]
        result = self._extractor(examples)
        seconds = time.perf_counter() - began
        response = np.array([example.response.sum() for example in examples], np.int32)
        length = np.array([len(example.ids) for example in examples], np.int32)
        gradients = pa.Table.from_arrays(
            [
                usable["id"],
                usable["source"],
                store.vector_array(result.gradients, self._work.schema.field("gradient").type.value_type),
                pa.array(result.norms),
                pa.array(result.losses),
                pa.array(length - response),
                pa.array(response),
                usable["truncated"],
            ],
            schema=self._work.schema,
        )
        good = pa.array([reason is None for reason in result.reasons], pa.bool_())
        gradients = gradients.filter(good)
        rejects = _rejects(table.filter(pc.is_valid(table["reason"]))) + _rejects(
            usable.set_column(
                usable.schema.get_field_index("reason"), "reason", pa.array(result.reasons, pa.string())
            ).filter(pc.invert(good))
        )
        name = f"part-{table['id'][0].as_py()}"
        if gradients.num_rows:
            store.write_table(store.join(self._work.out, GRADIENTS, f"{name}.parquet"), gradients)
        if rejects:
            store.write_json_lines(store.join(self._work.out, "rejects", f"{name}.jsonl"), rejects)
        return pa.table(
            {
                "rows": [gradients.num_rows],
                "rejects": [len(rejects)],
                "tokens": [int(length.sum())],
                "response_tokens": [int(response.sum())],
                "padded_tokens": [result.padded_tokens],
                "truncated": [sum(example.truncated for example in examples)],
                "seconds": [seconds],
            }
        )


def _rejects(table: pa.Table) -> list[dict[str, Any]]:
    return table.select(["id", "source", "reason"]).to_pylist()
