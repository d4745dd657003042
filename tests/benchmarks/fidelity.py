"""How faithful features are to the gradients: ``python tests/benchmarks/fidelity.py CORPUS``.

CORPUS is the output folder of ``raydpp ingest``. The exact kernel is that of the whole gradients of all linear layers
but the head, whose inner products are summed up layer by layer (passes over as many layers as --memory holds). Beside
it stand the features that extract would write with other options: Pearson's correlation of the cosines of all pairs
(with its bootstrap standard error over examples), their root mean square error and bias, the error that the halves of
the coordinates tell, the share of greedy's gain in exact log det over random subsets that a selection keeps, bytes a
row in Parquet, and tokens a second as a ratio in the same run.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from extraction_inputs import sorted_batches, tokenised, tokens_of
from printed import machine, table
from scipy.stats import bootstrap, pearsonr
from tqdm import tqdm

from raydpp import greedy_map
from raydpp.demo import demo_model
from raydpp.diversity.fidelity import fidelity
from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.gradients.adapters import TargetLayer
from raydpp.gradients.batches import pad
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking, rank_for
from raydpp.gradients.model import load_config
from raydpp.gradients.representations import Extractor, load_extractor
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.storage import Folder
from raydpp.tables import vector_array, write_table

CPU = torch.device("cpu")


def exact_cosines(extractor: Any, examples: Sequence[TokenizedExample], memory: float) -> np.ndarray:
    """(n, n) cosines of whole gradients: of the sums over layers of the inner products of the layers' own."""
    n = len(examples)
    groups: list[list[TargetLayer]] = [[]]
    held = 0.0
    for layer in extractor.target_layers:
        size = 4.0 * n * math.prod(layer.shape)  # bytes, as float32
        if groups[-1] and held + size > memory:
            groups.append([])
            held = 0.0
        groups[-1].append(layer)
        held += size
    products = np.zeros((n, n))
    for group in tqdm(groups, desc="exact gradients", unit="pass"):
        whole = {layer.name: torch.zeros(n, *layer.shape) for layer in group}
        for batch in sorted_batches(examples, extractor.batches.budget):
            handles = [_capture_whole(layer, whole[layer.name], batch) for layer in group]
            loss, _ = extractor.loss(*pad([examples[i] for i in batch], CPU))
            loss.sum().backward()
            for handle in handles:
                handle.remove()
        for gradients in whole.values():
            flat = gradients.flatten(1)
            products += (flat @ flat.T).double().numpy()
    norms = np.sqrt(np.diag(products))
    return np.asarray(products / np.outer(norms, norms))


def _capture_whole(layer: TargetLayer, into: torch.Tensor, batch: list[int]) -> Any:
    def forward(_module: Any, arguments: Any, output: torch.Tensor) -> None:
        if not torch.is_grad_enabled():
            return
        inputs = arguments[0].detach()
        if not output.requires_grad:
            output.requires_grad_(True)

        def backward(gradient: torch.Tensor) -> None:
            into[batch] = gradient.transpose(1, 2) @ inputs  # (b, outputs, inputs)

        output.register_hook(backward)

    return layer.module.register_forward_hook(forward)


def candidates(default: ExtractorConfig) -> dict[str, ExtractorConfig]:
    """Every setting but the default's own, by name."""
    found = {"default, seed 1": replace(default, projection_seed=1)}
    for dimension in (1024, 2048, 4096, 16384):
        found[f"D = {dimension:,}"] = replace(default, dimension=dimension)
    for rank in (8, 16, 64):
        found[f"r = {rank}"] = replace(default, rank=rank)
    attention = Adapter(targets=("q_proj", "k_proj", "v_proj", "o_proj"))
    found["q, k, v, o alone, r = 512, D = 4,096"] = replace(default, adapter=attention, rank=512, dimension=4096)
    found["last:8"] = replace(default, adapter=Adapter(layers="last:8"))
    return found


def storages(features: np.ndarray) -> dict[str, np.ndarray]:
    """The default's features, stored otherwise: (n, D) each."""
    found = {"float32": features, "float16": features.astype(np.float16)}
    scale = math.sqrt(features.shape[1])
    for step in (1.0, 2.0):
        found[f"whole numbers of {step:g} std"] = np.rint(features * (scale / step)).astype(np.int8)
    found["signs"] = np.where(features < 0, -1, 1).astype(np.int8)
    return found


def bytes_a_row(features: np.ndarray) -> float:
    """In a Parquet file as write_table writes it."""
    column = vector_array(features, pa.from_numpy_dtype(features.dtype))
    folder = Folder.at("memory://fidelity")
    write_table(folder, "rows.parquet", pa.table({"gradient": column}))
    with folder.system.open_input_file("rows.parquet") as stream:
        return len(stream.read()) / len(features)


def describe(name: str, features: np.ndarray, exact: np.ndarray, fraction: float) -> dict[str, Any]:
    """What a candidate's cosines are beside the exact ones."""
    n = len(exact)
    pairs = np.triu_indices(n, 1)
    x = UnitRows(features).take().numpy()
    found = x @ x.T
    error = found[pairs] - exact[pairs]
    told = fidelity(features)
    return {
        "candidate": name,
        "pearson": float(pearsonr(exact[pairs], found[pairs]).statistic),
        "pearson_error": _bootstrap_error(exact, found),
        "rmse": float(np.sqrt(np.mean(error**2))),
        "bias": float(error.mean()),
        "slope": float(np.polyfit(exact[pairs], found[pairs], 1)[0]),
        "told": None if told is None else told.error,
        "kept": kept_gain(exact, features, fraction),
        "bytes": bytes_a_row(features),
    }


def _bootstrap_error(exact: np.ndarray, found: np.ndarray) -> float:
    """The standard error of Pearson's correlation over pairs of examples that are drawn again."""

    def statistic(drawn: np.ndarray) -> float:
        index = np.unique(drawn.astype(int))  # an example drawn twice makes no pair with itself
        pairs = np.triu_indices(len(index), 1)
        one, other = (matrix[np.ix_(index, index)][pairs] for matrix in (exact, found))
        return float(pearsonr(one, other).statistic)

    drawn = bootstrap(
        (np.arange(len(exact)),), statistic, n_resamples=200, vectorized=False, method="percentile", rng=0
    )
    return float(drawn.standard_error)


def kept_gain(exact: np.ndarray, features: np.ndarray, fraction: float) -> float:
    """The share of greedy's gain in log det over random subsets, by the exact kernel, that picks from features keep."""
    values, vectors = np.linalg.eigh(exact)
    rows = UnitRows(vectors * np.sqrt(np.maximum(values, 0)))  # unit rows with the exact inner products
    size, kernel, random = round(fraction * len(exact)), Kernel(), np.random.default_rng(0)

    def log_det(picks: np.ndarray) -> float:
        return sum(ordered_log_gains(rows, picks.tolist(), kernel))

    chance = np.mean([log_det(random.permutation(len(exact))[:size]) for _ in range(50)])
    best = log_det(greedy_map(rows.take(), size).indices)
    return float((log_det(greedy_map(features, size).indices) - chance) / (best - chance))


def show(records: Sequence[Mapping[str, Any]]) -> None:
    headings = ("features", "Pearson", "error", "told", "bias", "slope", "gain kept", "bytes", "speed")
    rows = [
        (
            one["candidate"],
            f"{one['pearson']:.4f} ± {one['pearson_error']:.4f}",
            f"{one['rmse']:.4f}",
            "" if one["told"] is None else f"{one['told']:.4f}",
            f"{one['bias']:+.4f}",
            f"{one['slope']:.2f}",
            f"{one['kept']:.0%}",
            f"{one['bytes']:,.0f}",
            f"{one['speed']:.2f}x" if "speed" in one else "",
        )
        for one in records
    ]
    table(headings, rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", help="output folder of raydpp ingest")
    parser.add_argument("--model", help="a language model (the demo's)")
    parser.add_argument("--sources", nargs="+", help="only these (all)")
    parser.add_argument("--per-source", type=int, default=25, help="examples of each source (25)")
    parser.add_argument("--max-length", type=int, default=160, help="tokens of an example (160)")
    parser.add_argument("--fraction", type=float, default=0.3, help="of the examples that are picked (0.3)")
    parser.add_argument("--memory", type=float, default=14.0, help="GB for whole gradients at one time (14)")
    parser.add_argument("--exact", type=Path, help=".npy file of exact cosines: read where it exists, else written")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args()
    options.model = options.model or demo_model()
    examples = list(tokenised(options, Masking(options.max_length), options.per_source).values())
    default = ExtractorConfig(options.model, rank=rank_for(load_config(options.model).get_text_config().hidden_size))
    extractor = load_extractor(default)
    if options.exact and options.exact.exists():
        exact = np.load(options.exact)
    else:
        exact = exact_cosines(extractor, examples, options.memory * 1e9)
        if options.exact:
            np.save(options.exact, exact)
    pairs = np.triu_indices(len(exact), 1)
    print(f"{len(examples)} examples, {tokens_of(examples):,} tokens; D = 8,192, r = {default.rank} unless named so")
    print(f"exact cosines: mean {exact[pairs].mean():.4f}, standard deviation {exact[pairs].std():.4f}\n")

    features, seconds = _timed(extractor, examples)
    stored = whole(features)
    records = [{**describe("default", stored, exact, options.fraction), "speed": 1.0}]
    records += [describe(f"default as {name}", x, exact, options.fraction) for name, x in storages(features).items()]
    others = {}
    for name, config in candidates(default).items():
        found, taken = _timed(load_extractor(config), examples)
        others[name] = whole(found)
        records.append({**describe(name, others[name], exact, options.fraction), "speed": seconds / taken})
    show(records)
    one, two = (UnitRows(x).take().numpy() for x in (stored, others["default, seed 1"]))
    between = float(pearsonr((one @ one.T)[pairs], (two @ two.T)[pairs]).statistic)
    print(f"two seeds of the default: Pearson {between:.4f} with one another\n\n{machine('transformers')}")
    if options.out:
        options.out.write_text(json.dumps({"records": records, "between seeds": between}, indent=1))


def whole(features: np.ndarray) -> np.ndarray:
    """(n, D) features as they are stored by default."""
    column = vector_array(features, pa.int8())
    return np.asarray(column.flatten().to_numpy()).reshape(features.shape)


def _timed(extractor: Extractor, examples: Sequence[TokenizedExample]) -> tuple[np.ndarray, float]:
    extractor(examples[:8])  # warms up
    began = time.perf_counter()
    found = extractor(examples)
    seconds = time.perf_counter() - began
    assert not any(found.reasons), found.reasons
    return found.features, seconds


if __name__ == "__main__":
    main()
