"""What a GPU gives beside the CPU, with random weights: ``python tests/benchmarks/gpu.py``; it needs no corpus.

- agree: float32 features of a small model on both, and twice on the GPU;
- extraction: tokens a second of models of real widths, beside forward and backward pass alone on the same batches;
- adam: a warm-up of a LoRA adapter, and gradients over its optimizer's moments: features on both devices, tokens a
  second beside plain gradients;
- spread: that of one wide layer's entries, beside a scatter of each entry to a place of its own;
- selection: the picks of both, and their times.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from printed import machine, table

from raydpp import greedy_map
from raydpp.gradients.batches import TokenBatches, pad
from raydpp.gradients.config import Adapter, Dtype, ExtractorConfig, rank_for
from raydpp.gradients.losses import ResponseLoss
from raydpp.gradients.model import load_model
from raydpp.gradients.projection import Projection
from raydpp.gradients.representations import load_extractor
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.warmup.training import Recipe, train_adapter, whole_checkpoints

PARTS = ["agree", "adam", "spread", "selection", "extraction"]
MODELS: dict[str, dict[str, int]] = {  # their shapes: Llama's names
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "vocab_size": 49152},
    "1.7B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
    | {"num_key_value_heads": 32, "vocab_size": 49152},
    "7B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "vocab_size": 32768},
}


def random_model(folder: Path, shape: dict[str, int], device: str, dtype: torch.dtype) -> str:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = str(folder / f"{shape['hidden_size']}-{shape['num_hidden_layers']}")
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    with torch.device(device):
        LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(path)  # type: ignore[arg-type]
    torch.set_default_dtype(torch.float32)
    return path


def random_examples(count: int, vocabulary: int, most: int = 2048) -> list[TokenizedExample]:
    """Lengths of instruction data: half of them below 200 tokens, half of the tokens a response's."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(5.3, 0.8, count), 16, most).astype(int)
    return [
        TokenizedExample(random.integers(0, vocabulary, n).astype(np.int32), np.arange(n) >= n // 2, cut=0)
        for n in lengths
    ]


def agree(folder: Path, device: str) -> Any:
    shape = MODELS["135M"] | {"num_hidden_layers": 4, "vocab_size": 1024}
    model = random_model(folder, shape, "cpu", torch.float32)
    examples = random_examples(64, 1024, 400)
    config = ExtractorConfig(model, dtype="float32", batch_tokens=4096)
    cpu, gpu = (load_extractor(config, where)(examples) for where in ("cpu", device))
    again = load_extractor(config, device)(examples)
    cosines = (cpu.features * gpu.features).sum(1)
    found = {
        "least cosine": float(cosines.min()),
        "the same bits twice": bool(np.array_equal(gpu.features, again.features)),
        "reasons": sum(reason is not None for reason in gpu.reasons),
    }
    print(f"features on {device} and CPU: {found}\n")
    return found


def extraction(folder: Path, device: str, names: list[str], rounds: int) -> Any:
    rows, found = [], []
    for name in names:
        shape, dtype = MODELS[name], torch.bfloat16
        path = random_model(folder, shape, device, dtype)
        examples = random_examples({"135M": 1000, "1.7B": 500}.get(name, 250), shape["vocab_size"])
        tokens = sum(len(example.ids) for example in examples)
        config = ExtractorConfig(path, rank=rank_for(shape["hidden_size"]))
        bare = _bare(path, device, config)
        alone = _rate(tokens, partial(bare, examples), rounds)
        for rank in (config.rank, 2 * config.rank):
            ours = load_extractor(ExtractorConfig(path, rank=rank), device)
            rate = _rate(tokens, partial(ours, examples), rounds)
            one = {"model": name, "rank": rank, "bare": alone, "raydpp": rate, "share": rate / alone}
            one["peak"] = torch.cuda.max_memory_allocated() / 2**30 if device == "cuda" else 0.0
            found.append(one)
            rows.append((name, str(rank), f"{alone:,.0f}", f"{rate:,.0f}", f"{rate / alone:.1%}", f"{one['peak']:.1f}"))
            del ours
    table(("bfloat16", "rank", "bare, tokens/s", "raydpp, tokens/s", "share", "GiB at most"), rows)
    return found


def _bare(path: str, device: str, config: ExtractorConfig) -> Callable[[list[TokenizedExample]], Any]:
    model: Any = load_model(path, torch.device(device), "bfloat16")
    model.enable_input_require_grads()  # no weight needs a gradient: the graph starts at the embeddings
    loss, batches = ResponseLoss(model), TokenBatches(config.budget(device))

    def one_batch(examples: list[TokenizedExample]) -> dict[str, torch.Tensor]:
        found, _ = loss(*pad(examples, torch.device(device)))
        found.sum().backward()
        return {"loss": found.detach()}

    return lambda examples: batches.run(examples, one_batch)


def _rate(tokens: int, run: Callable[[], Any], rounds: int) -> float:
    run()  # warms up
    return tokens / min(_seconds(run) for _ in range(rounds))


def _seconds(run: Callable[[], Any]) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def adam(folder: Path, device: str, rank: int, rounds: int) -> Any:
    small = MODELS["135M"] | {"num_hidden_layers": 4, "vocab_size": 1024}
    shapes = {"4 layers of 135M, float32": (small, torch.float32), "135M, bfloat16": (MODELS["135M"], torch.bfloat16)}
    found, rows = [], []
    for name, (shape, dtype) in shapes.items():
        path = random_model(folder, shape, device, dtype)
        precision: Dtype = "float32" if dtype == torch.float32 else "bfloat16"
        some, out = random_examples(64, shape["vocab_size"], 400), folder / f"warmup-{shape['num_hidden_layers']}"
        began = time.perf_counter()
        before, after = train_adapter(path, some, str(out), Recipe(2, rank, None, 1e-3, 8, precision, 0))
        one: dict[str, Any] = {"model": name, "seconds": time.perf_counter() - began, "loss": (before, after)}
        adapter = Adapter(whole_checkpoints(str(out))[-1])
        plain = ExtractorConfig(path, adapter=adapter, dtype=precision)
        scaled = replace(plain, optimizer="adam")
        ours = load_extractor(scaled, device)
        if dtype == torch.float32:
            cpu, gpu = load_extractor(scaled)(some), ours(some)
            one["least cosine"] = float((cpu.features * gpu.features).sum(1).min())
            one["the same bits twice"] = bool(np.array_equal(gpu.features, ours(some).features))
        examples = random_examples(500, shape["vocab_size"])
        tokens = sum(len(example.ids) for example in examples)
        one["adam"] = _rate(tokens, partial(ours, examples), rounds)
        one["sgd"] = _rate(tokens, partial(load_extractor(plain, device), examples), rounds)
        found.append(one)
        cells = (f"{one['seconds']:.0f}", f"{before:.3f}, {after:.3f}", f"{one['sgd']:,.0f}", f"{one['adam']:,.0f}")
        rows.append((name, *cells, f"{one.get('least cosine', math.nan):.9f}"))
    table((f"r = {rank}", "warm-up, s", "loss", "sgd, tokens/s", "adam, tokens/s", "cosine with the CPU's"), rows)
    return found


def spread(device: str) -> Any:
    n, outputs, rows, dimension = 16, 14336, 64, 8192
    entries = torch.randn(n, rows, outputs, device=device)
    total = torch.zeros(n, dimension, device=device)
    projection = Projection({"layer": (outputs, 4096)}, dimension, rows, device=device)
    place = torch.randint(dimension, (rows * outputs,), device=device)
    flat, halves = entries.view(n, -1), entries.view(n, 2, -1)
    ways: dict[str, Callable[[], Any]] = {
        "shifted sums": lambda: projection._spread(total.view(n, 2, -1), "layer", halves),
        "index_add": lambda: total.index_add_(1, place, flat),
        "reading the entries": lambda: flat.sum(1),
    }
    found = {name: min(_seconds(way) for _ in range(20)) * 1e3 for name, way in ways.items()}
    table(("spreading 16 x 64 x 14,336 entries", "ms"), [(name, f"{value:.3f}") for name, value in found.items()])
    return found


def selection(device: str, rows: int, size: int) -> Any:
    random = np.random.default_rng(0)
    centers = random.standard_normal((rows // 8, 8192)).astype(np.float32)
    points = np.rint(2 * (centers[random.integers(0, len(centers), rows)] + random.standard_normal((rows, 8192))))
    points = points.clip(-127, 127).astype(np.int8)
    found, printed = [], []
    for kernel in ("rbf", "cosine"):
        picks, seconds = {}, {}
        for where in (device, "cpu"):
            began = time.perf_counter()
            picks[where] = greedy_map(points, size, kernel=kernel, device=where).indices
            seconds[where] = time.perf_counter() - began
        same = bool(np.array_equal(picks[device], picks["cpu"]))
        found.append({"kernel": kernel, "same picks": same, **seconds})
        printed.append((kernel, str(same), *(f"{seconds[where]:.1f}" for where in (device, "cpu"))))
    table((f"{size:,} of {rows:,} x 8,192", "same picks", f"{device}, s", "CPU, s"), printed)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="a torch device (cuda)")
    parser.add_argument(
        "--models", nargs="*", default=list(MODELS), choices=list(MODELS), help="shapes to extract with"
    )
    parser.add_argument("--parts", nargs="+", default=PARTS, choices=PARTS, help="which of the above (all)")
    parser.add_argument("--rounds", type=int, default=3, help="the best of so many counts (3)")
    parser.add_argument("--rows", type=int, default=20_000, help="to select from (20000)")
    parser.add_argument("--size", type=int, default=1_000, help="to select (1000)")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args()
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"{name}, torch {torch.__version__}; {machine()}\n")
    with tempfile.TemporaryDirectory() as folder:
        parts: dict[str, Callable[[], Any]] = {
            "agree": lambda: agree(Path(folder), options.device),
            "adam": lambda: adam(Path(folder), options.device, 128, options.rounds),
            "spread": lambda: spread(options.device),
            "selection": lambda: selection(options.device, options.rows, options.size),
            "extraction": lambda: extraction(Path(folder), options.device, options.models, options.rounds),
        }
        found = {part: parts[part]() for part in options.parts}
    if options.out:
        options.out.write_text(json.dumps({"device": name, **found}, indent=1))


if __name__ == "__main__":
    main()
