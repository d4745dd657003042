"""What the parts of the extraction benchmark share: examples, extractors, and rates taken in turns."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from raydpp import runs
from raydpp.errors import RowError
from raydpp.extract.sample import choose
from raydpp.gradients.batches import take_batch
from raydpp.gradients.config import Dtype, ExtractorConfig, Masking
from raydpp.gradients.model import load_tokenizer
from raydpp.gradients.representations import Extractor, load_extractor
from raydpp.gradients.tokenization import TokenizedExample, tokenize
from raydpp.storage import Folder
from raydpp.tables import read_columns


def source_rows(corpus: str) -> dict[str, int]:
    """The number of conversations of every source."""
    return dict(runs.load_finished(["ingest"], Folder.at(corpus))["counts"]["sources"])


def tokenised(
    options: argparse.Namespace, masking: Masking, per_source: int | None = None, limit: int | None = None
) -> dict[str, TokenizedExample]:
    """By id, the examples that the extract stage takes with these options."""
    chosen = choose(Folder.at(options.corpus), source_rows(options.corpus), options.sources, limit, per_source)
    rows = chosen.filter(read_columns(chosen.parts, ["id", "source", "messages"]))
    tokenizer = load_tokenizer(options.model)
    found = {}
    for row in rows.to_pylist():
        with contextlib.suppress(RowError):
            found[row["id"]] = tokenize(row["messages"], tokenizer, masking)
    return found


def few_examples(options: argparse.Namespace) -> list[TokenizedExample]:
    """``--per-source`` examples of every source, none longer than a batch."""
    examples = list(tokenised(options, Masking(longest(options)), options.per_source).values())
    responses = sum(int(example.response.sum()) for example in examples)
    print(f"{len(examples)} examples, {tokens_of(examples):,} tokens, {responses:,} of them responses\n")
    return examples


def longest(options: argparse.Namespace) -> int:
    """The most tokens of an example: those of a batch, and no more than extract takes by itself."""
    return min(options.batch_tokens, Masking().max_length)


def sorted_batches(examples: Sequence[TokenizedExample], budget: int) -> list[list[int]]:
    """The indices of the examples in each batch that the extractor makes."""
    lengths = [len(example.ids) for example in examples]
    waiting = sorted(range(len(examples)), key=lambda i: lengths[i])
    batches = []
    while waiting:
        batches.append(take_batch(waiting, lengths, budget))
    return batches


def tokens_of(examples: Sequence[TokenizedExample]) -> int:
    return sum(len(example.ids) for example in examples)


def extractor(options: argparse.Namespace, dtype: Dtype) -> Extractor:
    config = ExtractorConfig(options.model, dtype=dtype, batch_tokens=options.batch_tokens)
    return load_extractor(config, options.device, options.gpus)


def rate(tokens: int, run: Callable[..., Any], *arguments: Any) -> float:
    """Tokens a second of a call that works on that many tokens."""
    began = time.perf_counter()
    run(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return tokens / (time.perf_counter() - began)


def peak_gigabytes(run: Callable[[], Any]) -> float:
    """The most memory that tensors have on the GPUs while a call runs, the model's among them; 0 without GPUs."""
    gpus = range(torch.cuda.device_count())
    for gpu in gpus:
        torch.cuda.reset_peak_memory_stats(gpu)
    run()
    return sum(torch.cuda.max_memory_allocated(gpu) for gpu in gpus) / 1e9


def in_turns(timed: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, np.ndarray]:
    """By name the (rounds,) tokens a second of every call; in each round each has its turn."""
    found: dict[str, list[float]] = {name: [] for name in timed}
    for turn in range(rounds):
        for name, run in timed.items():
            found[name].append(run())
            print(f"round {turn + 1}, {name}: {found[name][-1]:.0f} tokens/s", file=sys.stderr, flush=True)
    return {name: np.array(rates) for name, rates in found.items()}
