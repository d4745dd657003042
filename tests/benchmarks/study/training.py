"""Fine-tuning in small: LoRA on the last layers, whose inputs the frozen layers below compute once and for all."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import get_linear_schedule_with_warmup, set_seed

from raydpp.gradients.batches import pad, take_batch
from raydpp.gradients.model import load_model
from raydpp.gradients.tokenization import TokenizedExample

_TOGETHER = 512  # token positions that go through the model at once, padding included


@dataclass(frozen=True)
class Recipe:
    """How a model is trained, by AdamW; the learning rate rises for a tenth of the steps, then falls to 0."""

    layers: int = 10
    rank: int = 16
    epochs: int = 1
    batch_size: int = 4
    learning_rate: float = 1e-3


@dataclass(frozen=True)
class Inputs:
    """Examples as the trained layers see them.

    Attributes:
        hidden: (tokens, width) float32, what the frozen layers make of all examples, one after the other.
        starts: (n + 1,) where each example begins.
        examples: n of them.
    """

    hidden: np.ndarray
    starts: np.ndarray
    examples: Sequence[TokenizedExample]

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """(b, s, width) hidden states, padded on the right; (b, s) token ids; (b, s) which of them are responses."""
        ids, response = pad([self.examples[n] for n in indices], torch.device("cpu"))
        hidden = torch.zeros(*ids.shape, self.hidden.shape[1])
        for row, n in enumerate(indices):
            own = self.hidden[self.starts[n] : self.starts[n + 1]]
            hidden[row, : len(own)] = torch.from_numpy(np.array(own))
        return hidden, ids, response

    def batches(self, indices: Sequence[int]) -> list[list[int]]:
        lengths = np.diff(self.starts).tolist()
        waiting = sorted(indices, key=lambda n: lengths[n])
        found = []
        while waiting:
            found.append(take_batch(waiting, lengths, _TOGETHER))
        return found


@torch.inference_mode()
def frozen_inputs(model: str, examples: Sequence[TokenizedExample], recipe: Recipe, file: Path) -> Inputs:
    """The outputs of the layers below those that are trained, kept in a file: a minute for 100,000 tokens."""
    starts = np.cumsum([0, *(len(example.ids) for example in examples)])
    if not file.exists():
        lower: Any = load_model(model, torch.device("cpu"), "float32")
        lower = lower.model
        lower.layers, lower.norm = lower.layers[: len(lower.layers) - recipe.layers], torch.nn.Identity()
        hidden = np.empty((starts[-1], lower.config.hidden_size), np.float32)
        inputs = Inputs(hidden, starts, examples)
        for batch in tqdm(inputs.batches(range(len(examples))), "frozen layers", unit="batch"):
            found = lower(pad([examples[n] for n in batch], torch.device("cpu"))[0], use_cache=False)[0]  # (b, s, w)
            for row, n in zip(found.numpy(), batch, strict=True):
                hidden[starts[n] : starts[n + 1]] = row[: starts[n + 1] - starts[n]]
        part = file.with_suffix(".part.npy")
        np.save(part, hidden)
        part.rename(file)
    return Inputs(np.load(file, mmap_mode="r"), starts, examples)


class FineTuning:
    """A model that is trained again and again from the same weights."""

    def __init__(self, model: str, inputs: Inputs, recipe: Recipe) -> None:
        self._inputs, self._recipe, self._model = inputs, recipe, model

    def losses(self, train: Sequence[int], evaluated: Sequence[int], seed: int) -> np.ndarray:
        """Train on some examples, none: not at all; then the sum of the response loss of each of others: (n,) nats."""
        recipe = self._recipe
        upper: Any = load_model(self._model, torch.device("cpu"), "float32")
        upper.model.layers = upper.model.layers[-recipe.layers :]
        set_seed(seed)
        config = LoraConfig(
            r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        get_peft_model(upper, config)  # in place
        if len(train):
            self._train(upper, np.asarray(train), np.random.default_rng(seed))
        found = np.zeros(len(evaluated))
        place = {n: row for row, n in enumerate(evaluated)}
        with torch.inference_mode():
            for batch in self._inputs.batches(evaluated):
                losses, owner = self._token_losses(upper, batch)
                np.add.at(found, [place[batch[row]] for row in owner.tolist()], losses.double().numpy())
        return found

    def _train(self, upper: Any, train: np.ndarray, random: np.random.Generator) -> None:
        recipe = self._recipe
        steps = recipe.epochs * math.ceil(len(train) / recipe.batch_size)
        learned = [parameter for parameter in upper.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(learned, recipe.learning_rate, weight_decay=0.0)
        schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
        for _ in range(recipe.epochs):
            order = random.permutation(train)
            for at in range(0, len(order), recipe.batch_size):
                step = order[at : at + recipe.batch_size].tolist()
                responses = sum(int(self._inputs.examples[n].response[1:].sum()) for n in step)
                for batch in self._inputs.batches(step):
                    (self._token_losses(upper, batch)[0].sum() / responses).backward()
                torch.nn.utils.clip_grad_norm_(learned, 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()

    def _token_losses(self, upper: Any, batch: Sequence[int]) -> tuple[Tensor, Tensor]:
        """The loss of every response token, (t,) nats, and the row of the batch that each is of, (t,)."""
        hidden, ids, response = self._inputs.batch(batch)
        found = upper.model(inputs_embeds=hidden, use_cache=False)[0][:, :-1]  # (b, s - 1, width)
        predicted = response[:, 1:]
        logits = upper.lm_head(found[predicted])  # (t, vocabulary): of what counts only
        return cross_entropy(logits, ids[:, 1:][predicted], reduction="none"), predicted.nonzero()[:, 0]
