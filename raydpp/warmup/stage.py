"""warmup: corpus table -> checkpoints of a LoRA adapter, whose gradients extract takes (in this process)."""

from __future__ import annotations

import logging
import math
import os
from typing import Literal

from raydpp import runs
from raydpp.errors import RowError, UserError, checked_seed
from raydpp.extract.sample import choose
from raydpp.extract.sample import identity as identity_of
from raydpp.extract.stage import cuts_expected
from raydpp.extract.units import REJECTS
from raydpp.gradients.config import ExtractorConfig, Masking
from raydpp.storage import Folder, absolute
from raydpp.tables import ids_named, read_columns

log = logging.getLogger(__name__)

_SHARE, _LEAST = 0.05, 32  # of a corpus, by default


def warmup(
    corpus: str,
    out: str,
    model: str,
    *,
    sources: list[str] | None = None,
    limit: int | None = None,
    per_source: int | None = None,
    only: list[str] | None = None,
    max_length: int = 2048,
    end_of_turn: bool = True,
    epochs: int = 4,
    lora_rank: int = 128,
    lora_targets: list[str] | None = None,
    learning_rate: float = 2e-5,
    batch_size: int = 32,
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    seed: int = 0,
) -> runs.RunResult:
    """Train a LoRA adapter on a small sample of a corpus, so that extract can take the gradients that training sees.

    After every epoch there is a checkpoint, OUT/checkpoint-STEP, as transformers' Trainer saves it: give one to raydpp
    extract as --adapter, and --optimizer adam for the steps that Adam would make. The defaults are those of LESS (Xia
    et al. 2024), but for the layers: all linear ones. It runs in this process, on the GPU if there is one. Killed and
    started again with the same command, it goes on from the last checkpoint. Conversations without a response token go
    to OUT/rejects with a reason.

    Args:
        corpus: Output folder of raydpp ingest.

    Which conversations:
        sources: Only conversations of these sources (names as ingest printed them); default all.
        limit: Only this many conversations: those with the smallest ids, which is a uniform sample and always the
            same one; default 5 % of them, at least 32, unless --per-source or --only is given.
        per_source: Only this many conversations of each source, those with the smallest ids; default all.
        only: Only these conversations: output folders of raydpp select, cut or extract, Parquet files, or files of
            ids.
        max_length: The most tokens of one conversation, or the model's window where that is shorter. Longer ones lose
            the start of their prompt first, but never the last quarter of this length before the response.
        end_of_turn: Whether the token that ends an assistant turn counts as a response token.

    How to train:
        model: Language model: a Hugging Face name, a folder written by save_pretrained, or a .gguf file.
        epochs: How many times each conversation is seen.
        lora_rank: Rank r of the LoRA adapter; its alpha is four times that, its dropout 0.1.
        lora_targets: Module names the adapter goes on (such as q_proj v_proj); default every linear layer but the
            output head.
        learning_rate: The largest learning rate of AdamW: it rises to it over 3 % of the steps, then falls to 0.
        batch_size: Conversations in one step; on a GPU some go through the model together, as 4,096 tokens allow, on a
            CPU one by one.
        dtype: Floating point type of the model; auto is float32 on a CPU and bfloat16 on a GPU. The adapter has
            float32.
        seed: Seeds the adapter, its dropout and the order of the conversations.

    Output:
        out: Folder to write, local or shared; it must be new, empty, or this same run's.
    """
    corpus, out, only = absolute(corpus), absolute(out), [absolute(url) for url in only] if only else None
    model = absolute(model) if os.path.exists(model) else model
    config = dict(locals())
    if not os.path.isabs(out):
        raise UserError(f"--out {out}: Trainer writes its checkpoints to a local or shared folder, not to a URL")
    for name, value, least in (
        ("epochs", epochs, 1),
        ("lora-rank", lora_rank, 1),
        ("batch-size", batch_size, 1),
        ("max-length", max_length, 8),
    ):
        if value < least:
            raise UserError(f"--{name} {value}: it must be at least {least}")
    if not 0 < learning_rate < math.inf:
        raise UserError(f"--learning-rate {learning_rate:g}: it must be a number above 0")
    checked_seed("--seed", seed)
    source = Folder.at(corpus)
    corpus_record = runs.load_finished(["ingest"], source)
    counts = corpus_record["counts"]["sources"]
    shortlist = None if only is None else ids_named(only, "gradient")
    if limit is None and per_source is None and shortlist is None:
        limit = max(_LEAST, math.ceil(_SHARE * sum(counts.get(name, 0) for name in sources or counts)))
    chosen = choose(source, counts, sources, limit, per_source, shortlist)
    run = runs.begin("warmup", config, [identity_of(corpus_record, shortlist)], keep=True)
    if run.done:
        return run.done
    # torch and transformers take seconds: mistakes, and what is done already, are found before they are loaded
    from raydpp.extract.workers import cached_tokenizer, tokenize_row
    from raydpp.gradients.model import load_config, longest_input
    from raydpp.warmup.training import Recipe, train_adapter, whole_checkpoints

    settings = load_config(model)
    masking = Masking(min(max_length, longest_input(settings, cached_tokenizer(model)) or max_length), end_of_turn)
    examples, rejects = [], []
    for part in chosen.parts:
        for row in chosen.filter(read_columns([part], ["id", "source", "messages"])).to_pylist():
            try:
                examples.append(tokenize_row(row["messages"], ExtractorConfig(model), masking))
            except RowError as error:
                rejects.append({"id": row["id"], "source": row["source"], "reason": str(error)})
    if rejects:
        run.out.write_json_lines(f"{REJECTS}/warmup.jsonl", rejects)
    if not examples:
        raise UserError(f"no conversation can be trained on: {run.out.url_of(REJECTS)} says why for each")
    log.info("warmup: %d conversations of %s, %d epochs", len(examples), corpus, epochs)
    log.info("warmup: %s", cuts_expected([example.cut for example in examples], len(examples), masking.max_length))
    recipe = Recipe(epochs, lora_rank, lora_targets, learning_rate, batch_size, dtype, seed)
    before, after = train_adapter(model, examples, out, recipe)
    checkpoints = whole_checkpoints(out)
    summary = (
        f"warmup: {chosen.rows:,} conversations in = {len(examples):,} trained on + {len(rejects):,} rejects,"
        f" {epochs} epochs, {recipe.steps(len(examples)):,} steps, loss {before:.3f} before and {after:.3f} after"
        f" -> {run.out}"
    )
    return run.finish(
        summary,
        corpus=corpus,
        counts={
            "in": chosen.rows,
            "rows": len(examples),
            "rejects": len(rejects),
            "tokens": sum(len(example.ids) for example in examples),
        },
        loss={"before": before, "after": after},
        paths=checkpoints,
        next=f"Now: raydpp extract {corpus} --out NEW --model {model} --adapter {checkpoints[-1]} --optimizer adam",
    )
