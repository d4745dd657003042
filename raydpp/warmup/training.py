"""A LoRA adapter trained by PEFT and transformers' Trainer, on the tokens and the mask that extract sees."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from raydpp.errors import UserError
from raydpp.gradients.batches import pad
from raydpp.gradients.config import Dtype
from raydpp.gradients.model import load_model
from raydpp.gradients.tokenization import TokenizedExample
from raydpp.progress import progress_bar

_EVALUATED = 64  # examples that the loss before and after is the mean of
_TOGETHER = 4096  # tokens, padding included, that go through the model at once on a GPU
_WARM_UP = 0.03  # of the steps, in which the learning rate rises


@dataclass(frozen=True)
class Recipe:
    """How an adapter is trained; what is not here is as LESS has it (Xia et al. 2024, arXiv 2402.04333, appendix)."""

    epochs: int
    rank: int
    targets: Sequence[str] | None
    learning_rate: float
    batch_size: int
    dtype: Dtype
    seed: int

    def steps(self, examples: int) -> int:
        return self.epochs * math.ceil(examples / self.batch_size)


def train_adapter(model: str, examples: Sequence[TokenizedExample], out: str, recipe: Recipe) -> tuple[float, float]:
    """Train with a checkpoint an epoch below the folder ``out``, from the last whole one where there is one.

    Returns:
        The mean loss of the first examples' responses, in nats a token, before and after.

    Raises:
        UserError: The model or the target modules cannot be used, memory runs out, or the loss is no number any more.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plain: Any = load_model(model, device, recipe.dtype)
    set_seed(recipe.seed)  # for the adapter's A
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=4 * recipe.rank,
        lora_dropout=0.1,
        target_modules=list(recipe.targets) if recipe.targets else "all-linear",
        task_type="CAUSAL_LM",
    )
    together = examples_together(recipe.batch_size, max(len(one.ids) for one in examples), device.type)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
            adapted = get_peft_model(plain, config)
    except ValueError as error:
        raise UserError(f"--lora-targets: {str(error).strip().splitlines()[0]}") from error
    arguments = TrainingArguments(
        out,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=together,
        per_device_eval_batch_size=1,
        gradient_accumulation_steps=recipe.batch_size // together,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=math.ceil(_WARM_UP * recipe.steps(len(examples))),
        save_strategy="epoch",
        logging_steps=1,  # extract reads the learning rates
        seed=recipe.seed,
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        remove_unused_columns=False,
        disable_tqdm=True,
        log_level="error",
        report_to="none",
    )
    if arguments.n_gpu > 1:
        arguments._n_gpu = 1  # or Trainer splits batches over all that it sees
    with progress_bar("warmup", recipe.steps(len(examples)), "step") as bar:
        trainer = Trainer(
            adapted,
            arguments,
            data_collator=_collate,
            train_dataset=examples,
            eval_dataset=examples[:_EVALUATED],
            callbacks=[_Progress(bar)],
        )
        trainer.remove_callback(PrinterCallback)
        try:
            before = trainer.evaluate()["eval_loss"]
            trainer.train(resume_from_checkpoint=next(reversed(whole_checkpoints(out)), None))
            after = trainer.evaluate()["eval_loss"]
        except torch.OutOfMemoryError as error:
            raise UserError("memory ran out: a smaller --max-length or --lora-rank takes less") from error
    if not math.isfinite(after):
        raise UserError(f"the loss became {after}: give a lower --learning-rate than {recipe.learning_rate:g}")
    return before, after


def examples_together(batch_size: int, longest: int, device: str) -> int:
    """How many examples of a step go through the model at once: one on a CPU, where more would only add padding."""
    if device == "cpu":
        return 1
    return next(n for n in (16, 8, 4, 2, 1) if n == 1 or (batch_size % n == 0 and n * longest <= _TOGETHER))


def whole_checkpoints(out: str) -> list[str]:
    """The folders of checkpoints, in the order of their steps; of each Trainer writes trainer_state.json last."""
    found = []
    for state in Path(out).glob("checkpoint-*/trainer_state.json"):
        with suppress(ValueError):  # killed as it was written
            found.append((json.loads(state.read_text())["global_step"], str(state.parent)))
    return [folder for _, folder in sorted(found)]


def _collate(examples: list[TokenizedExample]) -> dict[str, Tensor]:
    """(n, s) ids, and labels that are -100 where a token is not predicted; ``pad`` says why no mask is needed."""
    ids, response = pad(examples, torch.device("cpu"))
    return {"input_ids": ids, "labels": ids.masked_fill(~response, -100)}


class _Progress(TrainerCallback):
    """Moves a bar."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "loss" in logs:
            self._bar.n = state.global_step
            self._bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)
            self._bar.update(0)
