"""One model, many examples in, one unit-norm feature each out: what every view of an example has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from raydpp.corpus.tokenization import TokenizedExample
from raydpp.extraction.adapters import Adapter
from raydpp.extraction.batches import TokenBatches
from raydpp.extraction.model import Dtype
from raydpp.extraction.projection import ProjectionKind

Representation = Literal["gradient", "hidden", "embedding"]


@dataclass(frozen=True)
class ExtractorConfig:
    """What the numbers depend on, beyond the text.

    Attributes:
        model: A transformers model name or folder, or a .gguf file; for embeddings, a text encoder.
        representation: How an example is seen: the projected gradient of its response loss, the mean of the model's
            last hidden states over its response tokens, or a text encoder's mean-pooled output.
        adapter: The parameters whose gradients are taken (gradients only).
        projection: How they are projected (gradients only).
        dimension: D, the number of coordinates of a projected gradient; the others have their model's width.
        projection_seed: Seeds the projection.
        dtype: The model's floating point type; "auto" is float32 on a CPU, bfloat16 on a GPU.
        batch_tokens: The most tokens, padding included, in one forward and backward pass; None is 512 on a CPU,
            where larger batches only add padding, and 16,384 on a GPU.
        difficulty: Whether to compute instruction-following difficulty too, one more forward pass.
    """

    model: str
    representation: Representation = "gradient"
    adapter: Adapter = field(default_factory=Adapter)
    projection: ProjectionKind = "kronecker"
    dimension: int = 1024
    projection_seed: int = 0
    dtype: Dtype = "auto"
    batch_tokens: int | None = None
    difficulty: bool = False

    def budget(self, device: str) -> int:
        """The most token positions of a batch on a type of device, such as cpu or cuda."""
        return self.batch_tokens or (512 if device == "cpu" else 16_384)


@dataclass(frozen=True, slots=True)
class ExampleFeatures:
    """Features and scores of n examples, in the order they were given.

    Attributes:
        features: (n, D) float32 (float64 for a model in float64), unit norm; rows with a reason hold zeros and must not
            be used.
        norms: (n,) float32, the features' lengths before they were divided by them (of a projected gradient: its
            square is an unbiased estimate of the squared length of the whole gradient).
        losses: (n,) float32, mean negative log-likelihood over response tokens, in nats (perplexity is its
            exponential); None where the model has no loss.
        difficulties: (n,) float32, instruction-following difficulty: the loss over the loss without the prompt (Li et
            al. 2023, arXiv 2308.12032); None where it was not asked for.
        reasons: Why an example has no feature, or None, for each.
        padded_tokens: Token positions that were computed, padding included.
    """

    features: np.ndarray
    norms: np.ndarray
    losses: np.ndarray | None
    difficulties: np.ndarray | None
    reasons: list[str | None]
    padded_tokens: int


class Extractor(ABC):
    """A loaded model that turns tokenised examples into features; neither their order nor number changes any.

    Args:
        config: See ExtractorConfig.
        device: Where the model lives.
    """

    dimension: int

    def __init__(self, config: ExtractorConfig, device: torch.device | str = "cpu") -> None:
        self.config = config
        self.device = torch.device(device)
        self.batches = TokenBatches(config.budget(self.device.type))

    @abstractmethod
    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        """``feature`` (n, D) of any norm, and ``loss`` and ``difficulty`` (n,) where there are such."""

    def __call__(self, examples: Sequence[TokenizedExample]) -> ExampleFeatures:
        """The features of n examples."""
        rows = self.batches.run(examples, self.one_batch)
        features = rows.columns.get("feature", np.zeros((len(examples), self.dimension), np.float32))  # (n, D)
        loss, difficulty = rows.columns.get("loss"), rows.columns.get("difficulty")  # (n,) each
        norms = np.linalg.norm(features, axis=1)  # (n,)
        reasons = list(rows.reasons)
        for i, reason in enumerate(reasons):
            if reason is None:
                reasons[i] = self._unusable(float(norms[i]), 0.0 if loss is None else float(loss[i]))
            if reasons[i]:
                features[i], norms[i] = 0, 1
        features /= norms[:, None]
        return ExampleFeatures(features, norms, loss, difficulty, reasons, rows.padded_tokens)

    def _unusable(self, norm: float, loss: float) -> str | None:
        what = self.config.representation
        if not np.isfinite(norm) or not np.isfinite(loss):
            return f"the {what} is not finite (overflow, or a model that yields NaN for this text)"
        if norm == 0:
            return f"the {what} is zero" + (": the model is certain of this response" if what == "gradient" else "")
        return None
