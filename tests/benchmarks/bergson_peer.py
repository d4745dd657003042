"""The part of the extraction benchmark that runs ``bergson build`` in another interpreter."""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extraction_inputs import extractor, few_examples, in_turns, rate, tokens_of
from printed import table
from torch import nn

from raydpp.gradients.model import load_model, load_tokenizer, local_model
from raydpp.gradients.tokenization import TokenizedExample


def bergson(options: argparse.Namespace) -> Any:
    """Tokens a second beside those of ``bergson build``, whose first batch does not count: it makes the projections."""
    if not options.bergson:
        print("left out: give an interpreter that has bergson with --bergson PYTHON\n")
        return None
    examples = few_examples(options)
    ours: dict[str, Callable[[], float]] = {}
    for dtype in options.dtype:
        loaded = extractor(options, dtype)
        loaded(examples[:8])  # warms up
        ours[f"raydpp, {dtype}"] = functools.partial(rate, tokens_of(examples), loaded, examples)
    with tempfile.TemporaryDirectory() as folder:
        rows = _write(examples, f"{folder}/rows.jsonl")
        own_head = _untied(options.model, f"{folder}/untied")
        theirs = {"fp32": (local_model(options.model), "fp32"), "fp32, untied head": (own_head, "fp32")}
        if "bfloat16" in options.dtype:
            theirs["bf16, untied head"] = (own_head, "bf16")
        peers = {
            f"bergson, {name}": functools.partial(_build, options, rows, model, precision)
            for name, (model, precision) in theirs.items()
        }
        rates = in_turns({**ours, **peers}, options.rounds)
    table(
        ("", "tokens/s", *(f"of {peer}" for peer in peers)),
        [
            (name, f"{np.median(values):.0f}", *(f"{np.median(values / rates[peer]):.2f}x" for peer in peers))
            for name, values in rates.items()
        ],
    )
    return {name: values.tolist() for name, values in rates.items()}


def _build(options: argparse.Namespace, rows: str, model: str, precision: str) -> float:
    script = str(Path(__file__).with_name("bergson_build.py"))
    numbers = str(options.batch_tokens), str(torch.get_num_threads())
    done = subprocess.run(
        [options.bergson, script, rows, model, precision, *numbers], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"bergson failed:\n{done.stderr[-4000:]}")
    batches = json.loads(done.stdout.strip().split("\n")[-1])[1:]
    return float(sum(tokens for tokens, _ in batches) / sum(seconds for _, seconds in batches))


def _write(examples: Sequence[TokenizedExample], path: str) -> str:
    with open(path, "w") as stream:
        for example in examples:
            labels = np.where(example.response, example.ids, -100).tolist()
            row = {"input_ids": example.ids.tolist(), "labels": labels, "length": len(labels)}
            stream.write(json.dumps(row) + "\n")
    return path


def _untied(model: str, folder: str) -> str:
    """A copy of the model whose head has weights of its own, with which bergson is faster."""
    copy: Any = load_model(model, torch.device("cpu"), "float32")
    head = copy.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    copy.config.tie_word_embeddings = False
    copy.save_pretrained(folder)
    load_tokenizer(model).save_pretrained(folder)
    return folder
