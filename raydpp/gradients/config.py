"""What the gradient engine is asked for and what it returns: plain values, which need neither torch nor a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Representation = Literal["gradient", "hidden", "weighted-hidden", "embedding"]
LoraInit = Literal["signs", "gaussian"]
Optimizer = Literal["sgd", "adam"]
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]
Quantization = Literal["8bit", "4bit"]


@dataclass(frozen=True)
class Adapter:
    """The parameters whose gradients are taken.

    Attributes:
        kind: "fresh" for a new LoRA adapter, else the folder (or hub name) of an adapter saved by PEFT.
        targets: "all-linear", or the module names (suffixes) that a fresh adapter goes on.
        layers: "all", "last:N" for the last N transformer blocks, or a regular expression that module names are
            searched for. The backward pass ends at the first of them.
        init: How A of a fresh adapter is drawn: random signs, or normal numbers ("gaussian", as PEFT can). Signs
            estimate cosines better: large inputs cost them nothing.
    """

    kind: str = "fresh"
    targets: str | tuple[str, ...] = "all-linear"
    layers: str = "all"
    init: LoraInit = "signs"


@dataclass(frozen=True)
class ExtractorConfig:
    """What the numbers depend on, beyond the text.

    Attributes:
        model: A transformers model name or folder, or a .gguf file; for embeddings, a text encoder.
        representation: How an example is seen: the projected gradient of its response loss, the mean of the model's
            last hidden states over its response tokens, or over all tokens weighted by their position (RDS+), or a text
            encoder's mean-pooled output.
        adapter: The parameters whose gradients are taken (gradients only).
        dimension: D, the number of coordinates of a projected gradient, even; the others have their model's width.
        rank: r of a fresh adapter: to how many numbers a layer's inputs are mapped before the projection, even. Those
            of a trained adapter's layers are too.
        projection_seed: Seeds the fresh adapter and the projection; what it gives depends on a module's name, too.
        dtype: The model's floating point type; "auto" is float32 on a CPU, bfloat16 on a GPU.
        batch_tokens: The most tokens, padding included, in one forward and backward pass; None is 512 on a CPU,
            where larger batches only add padding, and 16,384 on a GPU.
        difficulty: Whether to compute instruction-following difficulty too, one more forward pass.
        optimizer: "sgd" for the gradient as it is, "adam" for what Adam makes of it by the second moments in the
            folder of a trained adapter (``optimizer``).
        quantization: To how many bits bitsandbytes rounds the weights of the model's linear layers, all but the head,
            as they are loaded: 8, and the layers' inputs token by token (LLM.int8 without its decomposition, Dettmers
            et al. 2022, arXiv 2208.07339, section 2), or 4 (NF4, Dettmers et al. 2023, arXiv 2305.14314, section 3);
            None leaves them as they are.
    """

    model: str
    representation: Representation = "gradient"
    adapter: Adapter = Adapter()
    dimension: int = 8192
    rank: int = 32
    projection_seed: int = 0
    dtype: Dtype = "auto"
    batch_tokens: int | None = None
    difficulty: bool = False
    optimizer: Optimizer = "sgd"
    quantization: Quantization | None = None

    def budget(self, device: str) -> int:
        """The most token positions of a batch on a type of device, such as cpu or cuda."""
        return self.batch_tokens or (512 if device == "cpu" else 16_384)


def rank_for(width: int) -> int:
    """The rank that a model of this width can afford: its map costs some percent of a forward and backward pass."""
    return min(64, max(32, width // 256 * 8))


def resolve_dtype(dtype: Dtype, device: str) -> Dtype:
    """What "auto" means on a type of device, such as cpu or cuda; any other type is itself."""
    if dtype != "auto":
        return dtype
    return "float32" if device == "cpu" else "bfloat16"


@dataclass(frozen=True)
class Masking:
    """What counts as a response token.

    A template with ``{% generation %}`` marks decides about the end of turn itself.

    Attributes:
        max_length: The most tokens an example may have. A longer one loses the oldest tokens of its prompt first, but
            never the last quarter of ``max_length`` before the first response; then the end of its responses.
        end_of_turn: Whether the token that ends an assistant turn counts, as it does in fine-tuning.
    """

    max_length: int = 2048
    end_of_turn: bool = True


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
