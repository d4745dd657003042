"""Check and time gradient extraction, in one run: ``python tests/benchmarks/extraction.py [CORPUS] [--device cuda]``.

CORPUS is the output folder of ``raydpp ingest``; default the demo's conversations. The parts:

- laws: float32 features beside the CPU's, and features of examples in common batches beside those of each alone;
- bare: against the same batches' forward and backward pass alone, with the head at response positions only and no
  weight's gradient; the loss is autograd's, or the extractor's own. On a GPU also the most memory of each;
- memory: what is left of a budget of a million tokens in a batch on a GPU of which little may be used;
- bergson: against ``bergson build`` with a projection to 16 x 16 of every layer, on the same rows and token budget;
- ray: the extract stage, against a loop over the same batches in one process;
- cheap: few layers and hidden states, against the default;
- padding: sorted batches against batches in the order of the corpus.

bergson lives in an environment of its own, whose interpreter --bergson names. Where a .pth file in its site-packages
names raydpp's site-packages, it needs no more than

    pip install --no-deps bergson==2.5.1 datasets==5.2.0 simple-parsing==0.1.9 jaxtyping==0.3.11 wadler_lindig==0.1.8
        ml_dtypes==0.6.0 natsort==8.4.0 petname==2.9 torchopt==0.7.3 optree==0.20.0 graphviz==0.21 xxhash==4.1.0
        dill==0.4.1 multiprocess==0.70.19
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from bergson_peer import bergson
from extraction_inputs import (
    extractor,
    few_examples,
    in_turns,
    longest,
    peak_gigabytes,
    rate,
    sorted_batches,
    source_rows,
    tokenised,
    tokens_of,
)
from printed import machine, table
from torch import Tensor, nn

from raydpp import runs
from raydpp.demo import demo_model, write_corpus
from raydpp.extract.dry_run import batch_error
from raydpp.extract.dry_run import padding as padding_within
from raydpp.extract.stage import extract
from raydpp.extract.units import unit_rows
from raydpp.gradients.batches import pad
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking
from raydpp.gradients.losses import ResponseLoss
from raydpp.gradients.model import load_model
from raydpp.gradients.representations import load_extractor
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.ingest.stage import ingest
from raydpp.tables import GRADIENTS

Loss = Callable[[Tensor, Tensor], Tensor]


def laws(options: argparse.Namespace) -> Any:
    """How far features are from the CPU's, and from those of their examples alone."""
    examples = few_examples(options)
    rows, found = [], {}
    for dtype in options.dtype:
        ours = extractor(options, dtype)
        one: dict[str, Any] = {"batch error": batch_error(ours, examples)}
        if dtype == "float32" and options.device != "cpu":
            exact = load_extractor(ours.config)(examples).features  # (n, D)
            one[_LEAST] = float((exact * ours(examples).features).sum(1).min())
        found[dtype] = one
        rows.append((dtype, f"{one['batch error']:.1e}", f"{one.get(_LEAST, np.nan):.7f}"))
    table(("", "largest difference between a common batch and one's own, of 1", _LEAST), rows)
    return found


_LEAST = "least cosine with the CPU's"


def bare(options: argparse.Namespace) -> Any:
    """Tokens a second beside those of forward and backward alone."""
    examples = few_examples(options)
    batches = [[examples[i] for i in batch] for batch in sorted_batches(examples, options.batch_tokens)]
    rows, found = [], {}
    for dtype in options.dtype:
        ours = extractor(options, dtype)
        device = torch.device(options.device)
        model: Any = load_model(options.model, device, dtype, gpus=options.gpus)
        model.enable_input_require_grads()  # no weight needs a gradient: the graph starts at the embeddings
        own_loss = ResponseLoss(model)
        tokens = tokens_of(examples)
        timed = {
            "raydpp": partial(rate, tokens, ours, examples),
            "bare": partial(rate, tokens, both_passes, partial(autograd_loss, model), batches, device),
            "bare, raydpp's loss": partial(rate, tokens, both_passes, partial(only_loss, own_loss), batches, device),
        }
        in_turns(timed, 1)  # warms up
        rates = in_turns(timed, options.rounds)
        peaks = {name: peak_gigabytes(run) for name, run in timed.items()}  # of all three models
        found[dtype] = {name: {"rates": rates[name].tolist(), "peak GB": peaks[name]} for name in timed}
        own = rates.pop("raydpp")
        for name, peer in rates.items():
            medians = (f"{np.median(values):.0f}" for values in (peer, own))
            memory = f"{peaks[name]:.1f}, {peaks['raydpp']:.1f}"
            rows.append((dtype, name, *medians, f"{np.median(own / peer):.1%}", memory))
    table(("", "peer", "tokens/s", "raydpp", "share", "GB on GPUs"), rows)
    return found


def both_passes(loss: Loss, batches: Iterable[list[TokenizedExample]], device: torch.device) -> None:
    for batch in batches:
        loss(*pad(batch, device)).sum().backward()


_ROOM = 4 * 2**30  # bytes beyond the model


def memory(options: argparse.Namespace) -> Any:
    """The budget that is left, and whether every example has its feature, where memory runs out."""
    if options.device == "cpu":
        print("left out: it is for GPUs\n")
        return None
    examples = list(tokenised(options, Masking(longest(options))).values())
    ours = load_extractor(ExtractorConfig(options.model, batch_tokens=2**20), options.device)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    torch.cuda.set_per_process_memory_fraction(min(1.0, (torch.cuda.memory_reserved() + _ROOM) / total))
    done = ours(examples)
    torch.cuda.set_per_process_memory_fraction(1.0)
    found = {"tokens": tokens_of(examples), "budget": ours.batches.budget}
    found["rejects"] = sum(reason is not None for reason in done.reasons)
    table(list(found), [[f"{value:,}" for value in found.values()]])
    return found


def autograd_loss(model: Any, ids: Tensor, response: Tensor) -> Tensor:
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # (n, s, H)
    row, column = torch.nonzero(response[:, 1:], as_tuple=True)  # (t,) each
    logits = model.get_output_embeddings()(hidden[row, column]).float()  # (t, V)
    return nn.functional.cross_entropy(logits, ids[row, column + 1], reduction="none")  # (t,)


def only_loss(loss: ResponseLoss, ids: Tensor, response: Tensor) -> Tensor:
    return loss(ids, response)[0]


def through_ray(options: argparse.Namespace) -> Any:
    """The job from the end of its first unit to its own, beside the extractor alone on the same later units."""
    import ray

    examples = tokenised(options, Masking(longest(options)), options.job_per_source)
    dtype = options.dtype[0]
    alone = extractor(options, dtype)
    alone(list(examples.values())[:8])  # warms up
    rows, found = [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory() as out:
            extract(
                options.corpus,
                out,
                options.model,
                sources=options.sources,
                per_source=options.job_per_source,
                max_length=longest(options),
                batch_tokens=options.batch_tokens,
                dtype=dtype,
                gpus_per_actor=0 if options.device == "cpu" else options.gpus,
                actors=1,
            )
            ray.shutdown()
            files = sorted(Path(out, GRADIENTS).iterdir(), key=lambda file: file.stat().st_mtime)
            seconds = Path(out, runs.SUCCESS).stat().st_mtime - files[0].stat().st_mtime
            ids = [pq.read_table(file, columns=["id"])["id"].to_pylist() for file in files[1:]]
        units = [[examples[identity] for identity in unit] for unit in ids]
        tokens = sum(map(tokens_of, units))
        job, loop = tokens / seconds, rate(tokens, lambda units: [alone(unit) for unit in units], units)
        found.append({"tokens": tokens, "ray": job, "loop": loop})
        rows.append((f"{len(units)}", f"{tokens:,}", f"{loop:.0f}", f"{job:.0f}", f"{job / loop:.1%}"))
    ratios = [one["ray"] / one["loop"] for one in found]
    rows.append(("median", "", "", "", f"{np.median(ratios):.1%}"))
    table((f"units ({dtype})", "tokens", "loop, tokens/s", "through Ray", "share"), rows)
    return found


def cheap(options: argparse.Namespace) -> Any:
    """Tokens a second of representations that a shortlist can be made by."""
    examples = few_examples(options)
    default = ExtractorConfig(options.model, dtype=options.dtype[0], batch_tokens=options.batch_tokens)
    last = {f"last:{n}": replace(default, adapter=Adapter(layers=f"last:{n}")) for n in (1, 2, 4, 8, 15)}
    configs = {"default": default, **last, "hidden": replace(default, representation="hidden")}
    loaded = {name: load_extractor(config, options.device, options.gpus) for name, config in configs.items()}
    timed = {name: partial(rate, tokens_of(examples), one, examples) for name, one in loaded.items()}
    rates = in_turns(timed, options.rounds)
    table(
        ("", "tokens/s", "of the default"),
        [
            (name, f"{np.median(values):.0f}", f"{np.median(values / rates['default']):.2f}x")
            for name, values in rates.items()
        ],
    )
    return {name: values.tolist() for name, values in rates.items()}


_BUDGETS = (512, 16_384)  # of a batch, as on a CPU and on a GPU


def padding(options: argparse.Namespace) -> Any:
    """The share of computed positions that are padding."""
    lengths = [len(example.ids) for example in tokenised(options, Masking(), limit=options.padding_rows).values()]
    rows = sum(source_rows(options.corpus).values())
    units = sorted({16, *(unit_rows(rows, budget) for budget in _BUDGETS)})
    found = {
        budget: [padding_in_order(lengths, budget), *(padding_within(lengths, budget, unit) for unit in units)]
        for budget in _BUDGETS
    }
    print(f"{len(lengths):,} examples, {sum(lengths):,} tokens\n")
    table(
        ("tokens of a batch", "in the corpus's order", *(f"sorted, in units of {unit} rows" for unit in units)),
        [(f"{budget:,}", *(f"{share:.1%}" for share in shares)) for budget, shares in found.items()],
    )
    return found


def padding_in_order(lengths: Sequence[int], budget: int) -> float:
    """The share of padding in batches of neighbours within the budget."""
    computed = width = size = 0
    for length in lengths:
        if size and max(width, length) * (size + 1) > budget:
            computed, width, size = computed + width * size, 0, 0
        width, size = max(width, length), size + 1
    return 1 - sum(lengths) / (computed + width * size)


PARTS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "laws": laws,
    "bare": bare,
    "memory": memory,
    "bergson": bergson,
    "ray": through_ray,
    "cheap": cheap,
    "padding": padding,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corpus", nargs="?", help="output folder of raydpp ingest; default the demo's conversations")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where models are (cpu)")
    parser.add_argument("--gpus", type=int, default=1, help="GPUs that one model is spread over (1)")
    parser.add_argument("--model", help="a model, as for raydpp extract; default the demo's")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure; default all")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], help="of the model; ray takes the first")
    parser.add_argument("--sources", nargs="+", help="sources of the corpus; default all")
    parser.add_argument("--per-source", type=int, help="examples of each, for laws, bare and bergson (6; 200 on a GPU)")
    parser.add_argument("--job-per-source", type=int, help="examples of each, for ray (24; 200 on a GPU)")
    parser.add_argument("--padding-rows", type=int, default=4000, help="examples, for padding (4000)")
    parser.add_argument("--batch-tokens", type=int, help="tokens of a batch, and at most of an example (512; 16384)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds, whose medians are printed (3)")
    parser.add_argument("--bergson", metavar="PYTHON", help="an interpreter that has bergson")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args()
    options.model = options.model or demo_model()
    on_gpu = options.device == "cuda"
    options.per_source = options.per_source or (200 if on_gpu else 6)
    options.job_per_source = options.job_per_source or (200 if on_gpu else 24)
    options.batch_tokens = options.batch_tokens or ExtractorConfig(options.model).budget(options.device)
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.corpus is None:
            options.corpus = ingest([write_corpus(Path(folder, "raw"))], f"{folder}/corpus").out
        for name in options.parts:
            print(f"### {name}\n", flush=True)
            found[name] = PARTS[name](options)
    print(f"{torch.cuda.get_device_name()}; " if on_gpu else "", machine("torch", "transformers", "ray"), sep="")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
