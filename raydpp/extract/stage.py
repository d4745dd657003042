"""extract: corpus table -> gradient table (model actors; Ray Data)."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import asdict, replace
from typing import Any, Literal

from raydpp import runs
from raydpp.cluster import checked_gpus, cluster_plan, connect, unwrap_task_errors
from raydpp.diversity.fidelity import SAMPLE, Fidelity, fidelity
from raydpp.errors import UserError, checked_seed
from raydpp.extract.sample import choose
from raydpp.extract.sample import identity as identity_of
from raydpp.extract.units import REJECTS, drop_absent, plan_units, scan_output, unit_rows
from raydpp.gradients.config import Adapter, ExtractorConfig, Masking, rank_for, resolve_dtype
from raydpp.gradients.model import check_quantization, require_plain_weights
from raydpp.gradients.optimizer import learning_rate, moments_file
from raydpp.progress import progress_bar
from raydpp.storage import Folder, absolute
from raydpp.tables import GRADIENTS, GradientTable, gradient_schema, ids_named, parquet_parts

log = logging.getLogger(__name__)


def extract(
    corpus: str,
    out: str,
    model: str,
    *,
    sources: list[str] | None = None,
    limit: int | None = None,
    per_source: int | None = None,
    only: list[str] | None = None,
    representation: Literal["gradient", "hidden", "weighted-hidden", "embedding"] = "gradient",
    dimension: int = 8192,
    seed: int = 0,
    adapter: str = "fresh",
    optimizer: Literal["sgd", "adam"] = "sgd",
    layers: str = "all",
    lora_rank: int | None = None,
    lora_targets: list[str] | None = None,
    lora_init: Literal["signs", "gaussian"] = "signs",
    max_length: int = 2048,
    end_of_turn: bool = True,
    difficulty: bool = False,
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "auto",
    quantization: Literal["8bit", "4bit"] | None = None,
    batch_tokens: int | None = None,
    store_as: Literal["int8", "float16", "float32"] | None = None,
    rows_per_file: int | None = None,
    gpus_per_actor: float | None = None,
    actors: int | None = None,
    prune: bool = False,
    address: str | None = None,
    dry_run: bool = False,
) -> runs.RunResult:
    """Turn every conversation of a corpus into a point: its projected LoRA gradient, with unit norm.

    Actors on the cluster each hold the model; each unit of conversations becomes one Parquet file of OUT/gradients.
    Conversations without a usable gradient go to OUT/rejects with a reason. Killed at any moment and started again with
    the same command, it resumes where it was; where the corpus has grown since, only what is new is worked on.

    Args:
        corpus: Output folder of raydpp ingest.

    Which conversations:
        sources: Only conversations of these sources (names as ingest printed them); default all.
        limit: Only this many conversations: those with the smallest ids, which is a uniform sample and always the
            same one; default all.
        per_source: Only this many conversations of each source, those with the smallest ids; default all.
        only: Only these conversations: output folders of raydpp select, cut or extract, Parquet files, or files of
            ids. A cheap representation's selection of several times the budget makes a shortlist, so that gradients
            are taken of few.
        max_length: The most tokens of one conversation, or the model's window where that is shorter. Longer ones lose
            the start of their prompt first, but never the last quarter of this length before the response.
        end_of_turn: Whether the token that ends an assistant turn counts as a response token, as in fine-tuning.

    What to extract of each:
        model: Language model: a Hugging Face name, a folder written by save_pretrained, or a .gguf file; for embeddings
            a text encoder. Actors on other nodes must find it under the same name.
        representation: How an example is seen: gradient (of its response loss), hidden (the mean of the model's last
            hidden states over the response), weighted-hidden (over prompt and response, later tokens counting more:
            RDS+, Ivison et al. 2025) or embedding (a text encoder's mean-pooled output).
        dimension: D, the number of coordinates of a projected gradient: a cosine is off by about 1 / sqrt(D). The
            other representations have their model's width.
        seed: Seeds the LoRA adapter and the projection.
        adapter: The parameters whose gradients are taken: fresh (a new LoRA adapter, whose gradient stands for that of
            the weights themselves), or the folder of an adapter that PEFT has trained and saved.
        optimizer: What is made of a gradient before it is projected: sgd (nothing), or adam, the step that training
            makes of it: every entry is divided by sqrt(v_hat) + eps, with the second moments that Trainer saved in the
            folder of --adapter (LESS, Xia et al. 2024, for training examples; its targets are plain gradients). The
            momentum, which is the same for all examples, is left out.
        layers: Which layers' gradients: all, last:N (the last N transformer blocks; the backward pass ends there), or a
            regular expression that module names are searched for.
        lora_rank: Rank r of a fresh LoRA adapter, the numbers that a layer's inputs are mapped to; default by the
            model's width, 32 (below 1,280) to 64 (from 2,048).
        lora_targets: Module names a fresh adapter goes on (such as q_proj v_proj); default every linear layer but the
            output head.
        lora_init: How A of a fresh adapter is drawn: random signs, or gaussian as PEFT does, which errs a little more.
        difficulty: Whether to add the score difficulty (instruction-following difficulty: the loss over the loss
            without the prompt), which costs one more forward pass.

    Scale:
        dtype: Floating point type of the model; auto is float32 on a CPU and bfloat16 on a GPU.
        quantization: To how many bits bitsandbytes (pip install bitsandbytes) rounds the weights of the model's linear
            layers as they are loaded: 8bit, or 4bit (NF4), for a half or about a quarter of bfloat16's memory. The
            gradients are those of the rounded model; default no rounding.
        batch_tokens: The most tokens, padding included, in one forward and backward pass; default 512 on a CPU, 16384
            on a GPU. Halved where memory runs out.
        gpus_per_actor: GPUs of one actor; default 1 where the cluster has GPUs, else 0. Where an autoscaler is to bring
            them, give it. Several hold a model that is too large for one, each some of its layers, and work one after
            the other; a part such as 0.5 lets actors with a small model share one.
        actors: How many actors; default one for every GPU, or one for every node where there is no GPU.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
        dry_run: Whether only to measure for a minute, here and without Ray, and say what the run would cost.

    Output:
        out: Folder to write; it must be new, empty, or this same run's.
        store_as: Type of the stored numbers; default int8 for gradients, else float16. int8 holds multiples of half a
            standard deviation, which lose next to nothing of a projection and take 4 bits each on disk.
        prune: Whether to delete what OUT has of conversations that are not in the corpus any more, or not among those
            asked for; else such a run is refused.
        rows_per_file: Conversations in one Parquet file, the unit of work and of progress; default by the size of
            the corpus and of a batch, 16 to 4096.
    """
    given = [corpus, out, *(only or []), *(name for name in (model, adapter) if os.path.exists(name))]
    corpus, out, only = absolute(corpus), absolute(out), [absolute(url) for url in only] if only else None
    model, adapter = (absolute(name) if name in given else name for name in (model, adapter))
    config = {name: value for name, value in locals().items() if name not in ("dry_run", "given")}
    if max_length < 8:
        raise UserError(f"--max-length {max_length}: it must be at least 8")
    for name, value in (("dimension", dimension), ("lora-rank", lora_rank)):
        if value is not None and (value < 2 or value % 2):
            raise UserError(f"--{name} {value}: it must be an even number, at least 2")
    checked_seed("--seed", seed)
    checked_gpus(gpus_per_actor or 0)
    for name, value in (("batch-tokens", batch_tokens), ("rows-per-file", rows_per_file)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: it must be at least 1")
    if representation == "embedding" and difficulty:
        raise UserError("--difficulty needs a language model's loss: a text encoder has none")
    if representation != "gradient" and store_as == "int8":
        raise UserError(
            f"--store-as int8 is for projected gradients, whose coordinates are all of one size: --representation"
            f" {representation} needs float16 or float32"
        )
    if optimizer == "adam":
        if representation != "gradient":
            raise UserError(f"--optimizer adam is for gradients, and --representation {representation} has none")
        moments_file(adapter)
    if quantization:
        if representation == "embedding":
            raise UserError("--quantization is for language models: leave it out for a text encoder")
        check_quantization(model, dtype)
    stored_as = store_as or ("int8" if representation == "gradient" else "float16")
    source = Folder.at(corpus)
    corpus_record = runs.load_finished(["ingest"], source)
    shortlist = None if only is None else ids_named(only, "gradient")
    chosen = choose(source, corpus_record["counts"]["sources"], sources, limit, per_source, shortlist)
    targets: Any = tuple(lora_targets) if lora_targets else "all-linear"
    extractor = ExtractorConfig(
        model,
        representation,
        Adapter(adapter, targets, layers, lora_init),
        dimension,
        lora_rank or 0,
        seed,
        dtype,
        batch_tokens,
        difficulty,
        optimizer,
        quantization,
    )
    if dry_run:
        from raydpp.extract.dry_run import dry_run as measure_cost
        from raydpp.gradients.model import hidden_width, load_config, load_tokenizer, longest_input

        settings = load_config(model)
        if quantization:
            require_plain_weights(model, settings)
        extractor = replace(extractor, rank=lora_rank or rank_for(hidden_width(settings)))
        longest = min(max_length, longest_input(settings, load_tokenizer(model)) or max_length)
        return measure_cost(chosen, extractor, Masking(longest, end_of_turn), out, stored_as, gpus_per_actor)
    if shortlist and not (sources or limit or per_source) and chosen.rows < len(shortlist):
        log.warning("extract: %d of the ids of --only are not in %s", len(shortlist) - chosen.rows, corpus)
    run = runs.resume("extract", config, [identity_of(corpus_record, shortlist)], free=["corpus", "only", "prune"])
    if run.done:
        return run.done
    # transformers takes seconds: mistakes, and what is done already, are found before it is loaded
    from raydpp.extract.workers import ExtractJob, cached_tokenizer, run_units, tokenize_first
    from raydpp.gradients.fingerprint import fingerprint
    from raydpp.gradients.model import hidden_width, load_config, longest_input

    settings = load_config(model)  # what cannot be loaded is better known before actors are started
    if quantization:
        require_plain_weights(model, settings)
    tokenizer = cached_tokenizer(model)
    masking = Masking(min(max_length, longest_input(settings, tokenizer) or max_length), end_of_turn)
    connect(address, given)
    plan = cluster_plan(gpus_per_actor, actors)
    extractor = replace(
        extractor,
        rank=lora_rank or rank_for(hidden_width(settings)),
        dtype=resolve_dtype(dtype, "cuda" if plan.gpus else "cpu"),
    )
    identity = fingerprint(extractor, masking, tokenizer, stored_as)
    per_file = rows_per_file or unit_rows(chosen.rows, extractor.budget("cuda" if plan.gpus else "cpu"), plan.most)
    if run.old and run.old.get("status") == "finished" and not prune:
        plan_units(chosen, scan_output(run.out), per_file)  # refuses another corpus while the finished run is whole
    owner = run.claim(identity)
    width = dimension if representation == "gradient" else hidden_width(settings)
    schema = gradient_schema(width, stored_as, difficulty)
    job = ExtractJob(source.below("corpus"), run.out, owner, extractor, masking, schema, plan)
    before = scan_output(run.out)
    dropped = drop_absent(chosen, run.out) if prune else 0
    if dropped:
        log.info("extract: %d examples that the corpus does not have any more were deleted", dropped)
        before = scan_output(run.out)
    log.info("extract: %d conversations of %s, %s", chosen.rows, corpus, plan)
    if len(before.ids):
        log.info("extract: %d of them are done already", len(before.ids))
    else:
        examples, _ = tokenize_first(chosen, extractor, masking)
        log.info("extract: %s", cuts_expected([example.cut for example in examples], chosen.rows, masking.max_length))
    began = time.perf_counter()
    with unwrap_task_errors(), progress_bar("extract", chosen.rows, "conversation", len(before.ids)) as bar:
        completed, session = run_units(chosen, job, before, per_file, bar)
    seconds = time.perf_counter() - began
    counts = completed.counts
    if not counts["rows"]:
        raise UserError(f"no conversation has a usable {representation}: {run.out.url_of(REJECTS)} says why for each")
    fidelity_found = None
    if representation == "gradient":
        parts = tuple(parquet_parts(run.out.below(GRADIENTS)))
        fidelity_found = _fidelity(GradientTable(out, parts, "gradient", schema.field("gradient").type, identity))
    rate = session["tokens"] / max(seconds, 1e-9)
    waste = 1 - session["tokens"] / session["padded_tokens"] if session["padded_tokens"] else 0.0
    summary = (
        f"extract: {chosen.rows:,} conversations in = {counts['rows']:,} {representation}s of"
        f" {schema.field('gradient').type.list_size} dimensions + {counts['rejects']:,} rejects,"
        f" {rate:,.0f} tokens/s, {waste:.1%} of them padding -> {run.out}"
    )
    return run.finish(
        summary,
        corpus=corpus,
        counts={"in": chosen.rows, **counts, "dropped": dropped},
        fidelity=fidelity_found and asdict(fidelity_found),
        learning_rate=learning_rate(adapter),
        timings={"seconds": round(seconds, 3), "tokens_per_second": rate, "padding": waste, **session},
        plan=asdict(plan),
    )


def _fidelity(table: GradientTable) -> Fidelity | None:
    """How far the cosines of a table are off, which is also said."""
    if found := fidelity(table.sample(SAMPLE)):
        log.log(logging.WARNING if found.poor else logging.INFO, "extract: %s", found.words(table.dimension))
    return found


def cuts_expected(cut: list[int], rows: int, max_length: int) -> str:
    """How many of ``rows`` conversations are longer than allowed, from the tokens that each of a sample loses."""
    losses = sorted(filter(None, cut))
    if not losses:
        return f"none of the {'first ' if len(cut) < rows else ''}{len(cut):,} has more than {max_length:,} tokens"
    share = f"about {len(losses) / len(cut):.1%} of all, " if len(cut) < rows else ""
    return (
        f"{share}{len(losses):,} of {len(cut):,} have more than {max_length:,} tokens and will be cut, by"
        f" {losses[len(losses) // 2]:,} tokens at the median and {losses[-1]:,} at most (--max-length)"
    )
