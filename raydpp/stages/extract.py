"""extract: corpus table -> gradient table (model actors; Ray Data)."""

from __future__ import annotations

import functools
import hashlib
import logging
import math
import time
import warnings
from dataclasses import asdict
from typing import Any, Literal

from raydpp import __version__, store
from raydpp.corpus.sample import Sample, choose
from raydpp.corpus.tokenization import Masking, template_of
from raydpp.errors import UserError
from raydpp.filesystem import resolve
from raydpp.gradients.extractor import ExtractorConfig
from raydpp.gradients.model import Dtype, Lora, load_config, load_tokenizer, revision
from raydpp.stages import run as runs
from raydpp.stages.actors import GradientActor, Work, tokenize_table
from raydpp.stages.cluster import cluster_plan, connect, explain
from raydpp.stages.progress import progress_bar

log = logging.getLogger(__name__)

_LIGHT = 0.25  # CPUs: reading and tokenising beside the actors


def extract(
    corpus: str,
    out: str,
    model: str,
    *,
    sources: list[str] | None = None,
    limit: int | None = None,
    per_source: int | None = None,
    dimension: int = 1024,
    seed: int = 0,
    lora_rank: int = 8,
    lora_targets: list[str] | None = None,
    max_length: int = 1024,
    end_of_turn: bool = True,
    dtype: Dtype = "auto",
    batch_tokens: int | None = None,
    store_as: Literal["float16", "float32"] = "float16",
    rows_per_file: int | None = None,
    gpus_per_actor: float | None = None,
    actors: int | None = None,
    address: str | None = None,
) -> runs.Outcome:
    """Turn every conversation of a corpus into a point: its projected LoRA gradient, with unit norm.

    Actors on the cluster each hold the model; each batch of conversations becomes one Parquet file of OUT/gradients.
    Conversations without a usable gradient go to OUT/rejects with a reason.

    Args:
        corpus: Output folder of raydpp ingest.
        out: Folder to write; it must be new, empty, or this same run's.
        model: Language model: a Hugging Face name, a folder written by save_pretrained, or a .gguf file. Actors on
            other nodes must find it under the same name.
        sources: Only conversations of these sources (names as ingest printed them); default all.
        limit: Only this many conversations: those with the smallest ids, which is a uniform sample and always the
            same one; default all.
        per_source: Only this many conversations of each source, those with the smallest ids; default all.
        dimension: D, the number of coordinates of a projected gradient.
        seed: Seeds the LoRA adapter and the projection.
        lora_rank: Rank r of the LoRA adapter.
        lora_targets: Module names to adapt (such as q_proj v_proj); default every linear layer but the output head.
        max_length: The most tokens of one conversation; longer ones lose the start of their prompt first.
        end_of_turn: Whether the token that ends an assistant turn counts as a response token, as in fine-tuning.
        dtype: Floating point type of the model; auto is float32 on a CPU and bfloat16 on a GPU.
        batch_tokens: The most tokens, padding included, in one forward and backward pass; default 512 on a CPU, 16384
            on a GPU.
        store_as: Floating point type of the stored gradients.
        rows_per_file: Conversations in one Parquet file, the unit of work and of progress; default by corpus size, 16
            to 4096.
        gpus_per_actor: GPUs of one actor; default 1 where the cluster has or can get GPUs, else 0.
        actors: How many actors; default one for every GPU, or one for every node where there is no GPU.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
    """
    config = dict(locals())
    if dimension < 2 or lora_rank < 1 or max_length < 8:
        raise UserError("--dimension must be at least 2, --lora-rank at least 1 and --max-length at least 8")
    corpus_record = runs.require(["ingest"], corpus)
    run = runs.begin("extract", config, [{"corpus": runs.identity(corpus_record)}])
    if run.done:
        return run.done
    chosen = choose(corpus, corpus_record["counts"]["sources"], sources, limit, per_source)

    load_config(model)  # what cannot be loaded is better known before actors are started
    tokenizer = load_tokenizer(model)
    connect(address)
    plan = cluster_plan(gpus_per_actor, actors)
    log.info("extract: %d conversations of %s, %s", chosen.rows, corpus, plan)
    masking = Masking(max_length, end_of_turn)
    exact = ("bfloat16" if plan.gpus else "float32") if dtype == "auto" else dtype
    targets: Any = tuple(lora_targets) if lora_targets else "all-linear"
    extractor = ExtractorConfig(model, Lora(lora_rank, targets, seed), dimension, seed, exact, batch_tokens)
    per_file = rows_per_file or min(max(math.ceil(chosen.rows / 64), 16), 4096)
    schema = store.gradient_schema(dimension, store_as)
    work = Work(run.out, extractor, masking, schema, plan)

    totals = dict.fromkeys(("rows", "rejects", "tokens", "response_tokens", "padded_tokens", "truncated"), 0)
    model_seconds, began = 0.0, time.perf_counter()
    with explain(), progress_bar("extract", chosen.rows, "conversation") as bar:
        for summary in _dataset(chosen, work, per_file).iter_rows():
            bar.update(int(summary["rows"] + summary["rejects"]))
            model_seconds += float(summary["seconds"])
            for name in totals:
                totals[name] += int(summary[name])
    seconds = time.perf_counter() - began
    if totals["rows"] + totals["rejects"] != chosen.rows:
        raise RuntimeError(f"{chosen.rows} conversations went in, but {totals} came out")
    if not totals["rows"]:
        raise UserError(f"no conversation has a usable gradient: {run.path('rejects')} says why for each")
    rate = totals["tokens"] / max(seconds, 1e-9)
    summary_line = (
        f"extract: {chosen.rows:,} conversations in = {totals['rows']:,} gradients of {dimension} dimensions"
        f" + {totals['rejects']:,} rejects, {rate:,.0f} tokens/s -> {run.out}"
    )
    return run.finish(
        summary_line,
        fingerprint=fingerprint(extractor, masking, tokenizer, store_as),
        corpus=corpus,
        counts={"in": chosen.rows, **totals},
        timings={
            "seconds": round(seconds, 3),
            "model_seconds": round(model_seconds, 3),
            "tokens_per_second": rate,
        },
        plan=asdict(plan),
    )


def fingerprint(extractor: ExtractorConfig, masking: Masking, tokenizer: Any, store_as: str) -> dict[str, Any]:
    """Everything a gradient's numbers depend on; tables whose fingerprints differ must not be mixed."""
    vocabulary = tokenizer.backend_tokenizer.to_str() + template_of(tokenizer)
    return {
        "model": extractor.model.rsplit("/", 1)[-1],
        "revision": revision(extractor.model),
        "adapter": {"kind": "fresh LoRA", **asdict(extractor.lora)},
        "tokenizer": hashlib.blake2b(vocabulary.encode(), digest_size=16).hexdigest(),
        "masking": asdict(masking),
        "projection": {
            "kind": "two-sided Rademacher, sparse JL",
            "dimension": extractor.dimension,
            "seed": extractor.projection_seed,
        },
        "normalisation": "unit norm",
        "dtype": extractor.dtype,
        "stored_as": store_as,
        "raydpp": __version__,
    }


def _dataset(chosen: Sample, work: Work, rows_per_file: int) -> Any:
    import ray
    from ray.util.annotations import RayDeprecationWarning

    light: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None, "num_cpus": _LIGHT}
    system, _ = resolve(chosen.parts[0].url)
    paths = [resolve(part.url)[1] for part in chosen.parts]
    tokenised = (
        ray.data.read_parquet(paths, filesystem=system, num_cpus=_LIGHT)
        .select_columns(["id", "source", "messages"])
        .map_batches(chosen.filter, **light)
        .repartition(target_num_rows_per_block=rows_per_file)
        .map_batches(functools.partial(tokenize_table, work=work), **light)
    )
    with warnings.catch_warnings():
        # Without max_task_retries a row that kills its process is tried for ever; Ray has no other name for it yet.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        return tokenised.map_batches(
            GradientActor,
            fn_constructor_args=(work,),
            batch_format="pyarrow",
            batch_size=rows_per_file,
            compute=ray.data.ActorPoolStrategy(min_size=work.plan.least, max_size=work.plan.most),
            num_cpus=work.plan.cpus,
            num_gpus=work.plan.gpus,
            max_task_retries=3,
        )
