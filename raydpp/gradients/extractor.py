"""One model, many examples in, one projected unit-norm gradient each out (Wang et al. 2024, section 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from raydpp.corpus.tokenization import TokenizedExample
from raydpp.gradients.capture import GradientCapture
from raydpp.gradients.model import Dtype, Lora, load_model, lora_layers
from raydpp.gradients.projection import Projection


@dataclass(frozen=True)
class ExtractorConfig:
    """What the numbers depend on, beyond the text.

    Attributes:
        model: A transformers model name or folder, or a .gguf file.
        lora: The adapter.
        dimension: D, the number of coordinates of a feature.
        projection_seed: Seeds the projection.
        dtype: The model's floating point type; "auto" is float32 on a CPU, bfloat16 on a GPU.
        batch_tokens: The most tokens, padding included, in one forward and backward pass; None is 512 on a CPU,
            where larger batches only add padding, and 16,384 on a GPU.
    """

    model: str
    lora: Lora = field(default_factory=Lora)
    dimension: int = 1024
    projection_seed: int = 0
    dtype: Dtype = "auto"
    batch_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class ExampleGradients:
    """Features of n examples, in the order they were given.

    Attributes:
        gradients: (n, D) float32, unit norm; rows with a reason hold zeros and must not be used.
        norms: (n,) float32, the projected gradients' lengths before they were divided by them (an unbiased estimate
            of the squared length of the full LoRA gradient, once squared).
        losses: (n,) float32, mean negative log-likelihood over response tokens, in nats.
        reasons: Why an example has no feature, or None, for each.
        padded_tokens: Token positions that were computed, padding included.
    """

    gradients: np.ndarray
    norms: np.ndarray
    losses: np.ndarray
    reasons: list[str | None]
    padded_tokens: int


def token_batches(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Groups of indices of similar length whose padded size stays within the budget (a longer one goes alone)."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[index] > budget:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(examples: Sequence[TokenizedExample], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded (n, s) token ids and (n, s) response mask.

    The attention is causal and padding stands on the right, so that no token of an example ever sees it; a pad's
    own outputs are never read. No attention mask is needed, and any id serves as the pad.
    """
    width = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), width), np.int64)
    response = np.zeros((len(examples), width), bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        response[row, : len(example.ids)] = example.response
    return torch.from_numpy(ids).to(device), torch.from_numpy(response).to(device)


def response_losses(model: nn.Module, ids: Tensor, response: Tensor) -> Tensor:
    """(n,) mean negative log-likelihood of every example's own response tokens, in nats.

    Logits are computed only at positions some example of the batch predicts a response token from.
    """
    predicts = response[:, 1:]  # (n, s - 1): position p predicts token p + 1
    columns = torch.nonzero(predicts.any(0)).squeeze(1)  # (c,)
    logits = model(input_ids=ids, logits_to_keep=columns, use_cache=False).logits  # (n, c, V)
    chosen = predicts[:, columns]  # (n, c)
    target = ids[:, columns + 1][chosen]  # (t,)
    nats = nn.functional.cross_entropy(logits[chosen].float(), target, reduction="none")  # (t,)
    row = torch.nonzero(chosen)[:, 0]  # (t,)
    total = torch.zeros(len(ids), dtype=nats.dtype, device=nats.device).index_add(0, row, nats)
    return total / chosen.sum(1)


class GradientExtractor:
    """A loaded model that turns tokenised examples into unit-norm projected LoRA gradients."""

    def __init__(self, config: ExtractorConfig, device: torch.device | str = "cpu") -> None:
        self.device = torch.device(device)
        self._budget = config.batch_tokens or (512 if self.device.type == "cpu" else 16_384)
        self._model = load_model(config.model, config.lora, self.device, config.dtype)
        layers = lora_layers(self._model)
        shapes = {name: (layer.out_features, layer.in_features) for name, layer in layers.items()}
        projection = Projection(shapes, config.dimension, config.projection_seed, self.device)
        self.dimension = config.dimension
        self._capture = GradientCapture(layers, projection)

    def __call__(self, examples: Sequence[TokenizedExample]) -> ExampleGradients:
        """The features of n examples; neither their order nor their number changes any of them."""
        gradients = np.zeros((len(examples), self.dimension), np.float32)
        norms, losses = (np.zeros(len(examples), np.float32) for _ in range(2))
        reasons: list[str | None] = [None] * len(examples)
        padded = 0
        with self._capture:
            for batch in token_batches([len(example.ids) for example in examples], self._budget):
                ids, response = pad([examples[i] for i in batch], self.device)
                padded += ids.numel()
                loss = response_losses(self._model, ids, response)  # (n,)
                loss.sum().backward()  # a sum: no example's gradient depends on its neighbours
                raw = self._capture.projected()  # (n, D)
                norm = torch.linalg.vector_norm(raw, dim=1)  # (n,)
                for i, row in zip(batch, (raw / norm[:, None]).cpu().numpy(), strict=True):
                    gradients[i] = row
                norms[batch] = norm.cpu().numpy()
                losses[batch] = loss.detach().cpu().numpy()
        for i in range(len(examples)):
            if not np.isfinite(norms[i]) or not np.isfinite(losses[i]):
                reasons[i] = "the gradient is not finite (overflow, or a model that yields NaN for this text)"
            elif norms[i] == 0:
                reasons[i] = "the gradient is zero: the model predicts this response with certainty"
            if reasons[i]:
                gradients[i] = 0
        return ExampleGradients(gradients, norms, losses, reasons, padded)
