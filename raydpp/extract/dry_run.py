"""extract --dry-run: what a run would cost, by one measured minute on this machine, without Ray."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import nn

from raydpp.diversity.fidelity import Fidelity, fidelity
from raydpp.errors import UserError
from raydpp.extract.sample import Sample
from raydpp.extract.units import unit_rows
from raydpp.extract.workers import tokenize_first
from raydpp.gradients.batches import take_batch
from raydpp.gradients.config import ExtractorConfig, Masking
from raydpp.gradients.representations import Extractor, GradientExtractor, load_extractor
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.progress import progress_bar
from raydpp.runs import RunResult

_TRIED = 8  # examples whose features are computed together and alone
_TOLERANCE = {"float64": 1e-6, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.1}
_TOLERANCE_QUANTISED = 0.5  # the last bit of an input decides now and then to which of 8 bits' numbers it is rounded
_ACTORS = (1, 2, 4, 8, 16, 32, 64)


def dry_run(
    chosen: Sample,
    config: ExtractorConfig,
    masking: Masking,
    out: str,
    store_as: str,
    gpus_per_actor: float | None = None,
    seconds: float = 60,
) -> RunResult:
    """Count, check and time a run without starting it: nothing is written, the record holds the ``estimate``.

    Raises:
        UserError: The model cannot be loaded, no conversation has a response token, or the features of a few examples
            depend on what they are batched with.
    """
    device = "cuda" if torch.cuda.is_available() and gpus_per_actor != 0 else "cpu"
    gpus = max(1, int(gpus_per_actor or 0))
    examples, reasons = tokenize_first(chosen, config, masking)
    rejected = sum(reasons.values())
    if not examples:
        raise UserError(
            f"none of the first {rejected} conversations can be used: {max(reasons, key=reasons.__getitem__)}"
        )
    began = time.perf_counter()
    extractor = load_extractor(config, device, gpus)
    start_up = time.perf_counter() - began
    dtype = _dtype(extractor)
    error = batch_error(extractor, examples[:_TRIED])
    tolerance = _TOLERANCE_QUANTISED if getattr(extractor.model, "is_quantized", False) else _TOLERANCE[dtype]
    if error > tolerance:
        raise UserError(
            f"the features of {min(_TRIED, len(examples))} examples change by {error:.1e} of their length with the"
            f" batch they are in ({dtype} allows {tolerance:g}): this model is not causal, or mixes the"
            " examples of a batch"
        )
    measured, features = _measure(extractor, examples, seconds)
    estimate = _estimate(chosen.rows, examples, rejected, extractor, store_as, measured)
    found = fidelity(features) if config.representation == "gradient" else None
    estimate |= {"device": device, "devices": gpus, "start_up_seconds": start_up, "batch_error": error}
    estimate |= {"fidelity": None if found is None else asdict(found)}
    return RunResult(out, {"stage": "extract", "estimate": estimate}, _summary(estimate))


def batch_error(extractor: Extractor, examples: list[TokenizedExample]) -> float:
    """How far a feature moves, relative to its length 1, between a common batch and one of its own; the largest."""
    together = extractor(examples).features  # (n, D)
    alone = np.concatenate([extractor([example]).features for example in examples])
    return float(np.linalg.norm(together - alone, axis=1).max())


def _measure(
    extractor: Extractor, examples: list[TokenizedExample], seconds: float
) -> tuple[dict[str, float], np.ndarray]:
    """Tokens a second over examples in units of 64, until the time is over or there are no more; the features."""
    tokens = rows = 0
    found = []
    extractor(examples[:_TRIED])  # the first batches are slow: caches, kernels, clocks
    began = time.perf_counter()
    with progress_bar("extract: measuring", math.ceil(seconds), "s") as bar:
        while (passed := time.perf_counter() - began) < seconds and rows < len(examples):
            unit = examples[rows : rows + 64]
            result = extractor(unit)
            found.append(result.features[[reason is None for reason in result.reasons]])
            rows += len(unit)
            tokens += sum(len(example.ids) for example in unit)
            bar.n = min(int(passed), bar.total)
            bar.update(0)
    passed = time.perf_counter() - began
    return {"seconds": passed, "tokens_per_second": tokens / passed, "examples": rows}, np.concatenate(found)


def _estimate(
    rows: int,
    examples: list[TokenizedExample],
    rejected: int,
    extractor: Extractor,
    store_as: str,
    measured: dict[str, float],
) -> dict[str, Any]:
    """What ``rows`` conversations would cost, extrapolated from the tokenised ones."""
    lengths = np.array([len(example.ids) for example in examples])  # (n,)
    tokenised = len(examples) + rejected
    usable = rows * len(examples) / tokenised
    tokens = float(lengths.mean() * usable)
    response_tokens = float(np.mean([example.response.sum() for example in examples]) * usable)
    error = float(lengths.std() / math.sqrt(len(lengths)) / lengths.mean())
    budget = extractor.batches.budget
    hours = tokens / measured["tokens_per_second"] / 3600
    return {
        "examples": rows,
        "tokenised": tokenised,
        "rejects": round(rows - usable),
        "tokens": round(tokens),
        "tokens_error": error if rows > tokenised else 0.0,
        "response_tokens": round(response_tokens),
        "truncated": round(usable * float(np.mean([example.cut > 0 for example in examples]))),
        "padding": padding(lengths.tolist(), budget, unit_rows(rows, budget)),
        "flops": _flops(extractor, tokens, response_tokens),
        "table_bytes": round(usable * (extractor.dimension * {"int8": 0.5, "float16": 2, "float32": 4}[store_as] + 60)),
        "dimension": extractor.dimension,
        "measured": measured,
        "actor_hours": hours,
        "hours": {str(count): hours / count for count in _ACTORS},
    }


def padding(lengths: list[int], budget: int, unit: int) -> float:
    """The share of token positions that are padding, in batches of that budget within units of ``unit`` rows."""
    computed = 0
    for start in range(0, len(lengths), unit):
        waiting = sorted(range(start, min(start + unit, len(lengths))), key=lambda i: lengths[i])
        while waiting:
            batch = take_batch(waiting, lengths, budget)
            computed += len(batch) * max(lengths[i] for i in batch)
    return 1 - sum(lengths) / computed


def _flops(extractor: Extractor, tokens: float, response_tokens: float) -> float:
    """Of the weights' products (2 a parameter and token forward, 2 more backward), without those of attention."""
    model = extractor.model
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    top = head.weight.numel() if head is not None else 0
    apart = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding) or module is head}
    packed = {id(p): 2 * p.element_size() for p in model.parameters() if type(p).__name__ == "Params4bit"}
    body = sum(packed.get(id(p), 1) * p.numel() for p in model.parameters() if id(p) not in apart)
    backward = 0.0
    if isinstance(extractor, GradientExtractor):
        order = {id(module): n for n, module in enumerate(model.modules())}
        backward = 1 - min(order[id(layer.module)] for layer in extractor.target_layers) / len(order)
    return 2 * body * tokens * (1 + backward) + 2 * top * response_tokens * (2 if backward else 1)


def _dtype(extractor: Extractor) -> str:
    return str(next(extractor.model.parameters()).dtype).removeprefix("torch.")


def _summary(e: dict[str, Any]) -> str:
    error = f" (+- {2 * e['tokens_error']:.1%}, from {e['tokenised']:,} of them)" if e["tokens_error"] else ""
    measured = e["measured"]
    lines = [
        f"{e['examples']:,} examples, about {e['rejects']:,} of them without a response token",
        f"{e['tokens']:,} tokens{error}, {e['response_tokens']:,} of them responses;"
        f" {e['truncated']:,} examples truncated",
        f"{e['padding']:.1%} of the computed positions are padding; {e['flops']:.2e} FLOP without attention",
        f"table: {e['table_bytes'] / 2**20:,.1f} MiB",
        f"features of {_TRIED} examples, batched and alone, differ by {e['batch_error']:.1e} of their length",
        *([Fidelity(**e["fidelity"]).words(e["dimension"])] if e["fidelity"] else []),
        f"measured here on {'one' if e['devices'] == 1 else e['devices']} {e['device']}:"
        f" {measured['tokens_per_second']:,.0f} tokens/s over {measured['seconds']:.0f} s; the model loads in"
        f" {e['start_up_seconds']:.0f} s",
        f"{e['actor_hours']:,.2f} actor-hours on devices like this one: "
        + ", ".join(f"{hours:,.2f} h with {count}" for count, hours in e["hours"].items()),
        "dry run: nothing was written",
    ]
    return "\n".join(lines)
