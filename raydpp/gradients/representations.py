"""The ways to see an example (Wang et al. 2024 compare them): gradient, hidden states, text embedding.

All give the same kind of row, so that everything after them is the same.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from raydpp.errors import UserError, few
from raydpp.gradients.adapters import TargetLayer, attach_adapter
from raydpp.gradients.batches import TokenBatches, at_least_float32, pad, to_device
from raydpp.gradients.capture import GradientCapture
from raydpp.gradients.config import ExampleFeatures, ExtractorConfig
from raydpp.gradients.losses import ResponseLoss
from raydpp.gradients.model import hidden_width, load_encoder, load_model
from raydpp.gradients.optimizer import adam_scales
from raydpp.gradients.projection import Projection
from raydpp.gradients.tokenization import TokenizedExample

log = logging.getLogger(__name__)


def load_extractor(config: ExtractorConfig, device: torch.device | str = "cpu", gpus: int = 1) -> Extractor:
    """The extractor that a configuration means, with its model loaded on the device, or spread over ``gpus`` GPUs.

    UserError where the model cannot be used.
    """
    kinds: dict[str, type[Extractor]] = {
        "gradient": GradientExtractor,
        "hidden": HiddenExtractor,
        "weighted-hidden": HiddenExtractor,
        "embedding": EmbeddingExtractor,
    }
    try:
        return kinds[config.representation](config, device, gpus)
    except UserError:
        raise
    except Exception as error:  # whatever a model's own code raises on the probe: no second try would help
        reason = (str(error).strip() or "no reason given").splitlines()[0].rstrip(".")
        raise UserError(
            f"{config.model!r} cannot be used for --representation {config.representation}: {type(error).__name__}:"
            f" {reason}"
        ) from error


class Extractor(ABC):
    """A loaded model that turns tokenised examples into features; neither their order nor number changes any."""

    model: nn.Module
    dimension: int

    def __init__(self, config: ExtractorConfig, device: torch.device | str = "cpu", gpus: int = 1) -> None:
        self.config = config
        self.device = torch.device(device)
        self.batches = TokenBatches(config.budget(self.device.type))

    @abstractmethod
    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        """``feature`` (n, D) of any norm, and ``loss`` and ``difficulty`` (n,) where the model has them."""

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


class GradientExtractor(Extractor):
    """The gradient of the response loss with respect to the adapter, projected to D coordinates."""

    def __init__(self, config: ExtractorConfig, device: torch.device | str = "cpu", gpus: int = 1) -> None:
        super().__init__(config, device)
        model = load_model(config.model, self.device, config.dtype, config.quantization, gpus)
        self.model, layers = attach_adapter(model, config.adapter)
        self.target_layers, places = _capturable(self.model, layers, config.model, self.device)
        self.dimension = config.dimension
        shapes = {layer.name: layer.shape for layer in self.target_layers}
        dtype = _dtype(self.model)
        product = torch.float32 if dtype == torch.float16 else dtype  # which a product of two could leave
        scales = None
        if config.optimizer == "adam":
            scales = adam_scales(self.model, self.target_layers, config.adapter.kind)
        self.projection = Projection(
            shapes,
            config.dimension,
            config.rank,
            config.projection_seed,
            places,
            product,
            config.adapter.init,
            scales,
        )
        _require_causal(self.model, config.model, self.device)
        self.loss = ResponseLoss(self.model, [layer.module for layer in self.target_layers])
        self._capture = GradientCapture(self.target_layers, self.projection, torch.promote_types(dtype, torch.float32))
        self.one_batch([_probe()])

    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        ids, response = pad(examples, self.device)
        with self._capture(len(ids)):
            loss, _ = self.loss(ids, response)  # (n,)
            # The SUM of the examples' losses: its gradient at an example's positions is that of the example's own
            # loss. A mean would divide it by the number of neighbours.
            loss.sum().backward()
            found = {"feature": self._capture.projected(), "loss": loss.detach()}
        return _with_difficulty(found, self, examples)


class HiddenExtractor(Extractor):
    """The mean of the model's last hidden states over the response tokens, or over all tokens, weighted by position.

    The latter is RDS+ (Ivison et al. 2025, arXiv 2503.01807): of s tokens the i-th has the weight i / (1 + ... + s), so
    that later ones, which have seen more, count more (SGPT, Muennighoff 2022, arXiv 2202.08904). What a template puts
    behind the last response, such as a line break, is no token here; RDS+'s code counts it.
    """

    def __init__(self, config: ExtractorConfig, device: torch.device | str = "cpu", gpus: int = 1) -> None:
        super().__init__(config, device)
        self.model = load_model(config.model, self.device, config.dtype, config.quantization, gpus)
        self.dimension = hidden_width(self.model.config)
        _require_causal(self.model, config.model, self.device)
        self.loss = ResponseLoss(self.model)

    @torch.no_grad()
    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        ids, response = pad(examples, self.device)
        loss, hidden = self.loss(ids, response)
        if hidden is None:
            hidden = self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # type: ignore[operator]
        weights = _positions(examples, ids) if self.config.representation == "weighted-hidden" else response  # (n, s)
        found = {"feature": _mean_over(hidden, weights), "loss": loss}
        return _with_difficulty(found, self, examples)


class EmbeddingExtractor(Extractor):
    """A text encoder's last hidden states, averaged over all tokens of the text."""

    def __init__(self, config: ExtractorConfig, device: torch.device | str = "cpu", gpus: int = 1) -> None:
        super().__init__(config, device)
        self.model = load_encoder(config.model, self.device, config.dtype, gpus)
        self.dimension = hidden_width(self.model.config)

    @torch.no_grad()
    def one_batch(self, examples: list[TokenizedExample]) -> Mapping[str, Tensor]:
        ids, _ = pad(examples, self.device)  # (n, s)
        own = _positions(examples, ids) > 0  # (n, s): not padding
        hidden = self.model(input_ids=ids, attention_mask=own.long()).last_hidden_state  # (n, s, H)
        return {"feature": _mean_over(hidden, own)}


def _positions(examples: Sequence[TokenizedExample], ids: Tensor) -> Tensor:
    """(n, s) 1, 2, ... at each example's own tokens, 0 at padding."""
    lengths = to_device(np.array([len(example.ids) for example in examples]), ids.device)  # (n,)
    places = torch.arange(1, ids.shape[1] + 1, device=ids.device)  # (s,)
    return places * (places <= lengths[:, None])


def _mean_over(hidden: Tensor, weights: Tensor) -> Tensor:
    """(n, s, H) states and (n, s) whole weights, or bool -> (n, H) weighted means, at least in float32."""
    weights = weights.to(hidden.device)
    return (at_least_float32(hidden) * weights[:, :, None]).sum(1) / weights.sum(1, keepdim=True)


_LEAST_LOSS = 1e-6  # nats a token: below, a model knows a response by heart


def _with_difficulty(
    found: dict[str, Tensor], extractor: GradientExtractor | HiddenExtractor, examples: list[TokenizedExample]
) -> dict[str, Tensor]:
    if extractor.config.difficulty:
        with torch.no_grad():
            alone, _ = extractor.loss(*pad([without_prompt(example) for example in examples], extractor.device))
        found["difficulty"] = found["loss"] / alone.clamp(min=_LEAST_LOSS)
    return found


def without_prompt(example: TokenizedExample) -> TokenizedExample:
    """The responses alone: their tokens, and the one before each turn's first, which it is predicted from."""
    kept = example.response.copy()
    kept[:-1] |= example.response[1:]
    return TokenizedExample(example.ids[kept], example.response[kept], example.cut)


def _probe() -> TokenizedExample:
    """Eight tokens that every vocabulary has, to try a model on."""
    return TokenizedExample(np.arange(8, dtype=np.int32), np.arange(8) > 0, cut=0)


def _dtype(model: nn.Module) -> torch.dtype:
    """That of its numbers; packed weights of quantised layers are of others."""
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _probe_ids(device: torch.device) -> Tensor:
    return torch.from_numpy(_probe().ids.astype(np.int64))[None].to(device)  # (1, 8)


_MOST_MISSED = 0.25  # of the target layers' weights, that may be left out with a word


def _capturable(
    model: nn.Module, layers: Sequence[TargetLayer], name: str, device: torch.device
) -> tuple[list[TargetLayer], dict[str, torch.device]]:
    """The layers that are called and give one tensor: all but, say, some mixtures' routers and state-space steps.

    Also on which devices these compute, by their names. UserError where much of the model would be left out.
    """
    places: dict[str, torch.device] = {}

    def look(layer: TargetLayer) -> Callable[..., None]:
        return lambda _module, _inputs, output: (
            places.update({layer.name: output.device}) if isinstance(output, Tensor) else None
        )

    handles = [layer.module.register_forward_hook(look(layer)) for layer in layers]
    with torch.no_grad():
        model(input_ids=_probe_ids(device), use_cache=False)
    for handle in handles:
        handle.remove()
    kept = [layer for layer in layers if layer.name in places]
    if left_out := [layer for layer in layers if layer not in kept]:
        names = few([layer.name for layer in left_out])
        if _weights(left_out) > _MOST_MISSED * _weights(layers):
            raise UserError(
                f"{name!r} computes {names} without calling them as layers that give a tensor, so that their gradients"
                " cannot be captured: leave them out with --layers or --lora-targets"
            )
        log.warning("%d layers are not called as layers that give a tensor, and are left out: %s", len(left_out), names)
    return kept, places


def _weights(layers: Sequence[TargetLayer]) -> int:
    return sum(math.prod(layer.shape) for layer in layers)


def _require_causal(model: nn.Module, name: str, device: torch.device) -> None:
    """UserError where a token's logits depend on later tokens, or on how many there are: padding would change them."""
    ids = _probe_ids(device)  # (1, 8)
    other = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], dim=1)  # of the same shape, so that rounding is the same
    with torch.no_grad():
        one, two, alone = (
            model(input_ids=some, use_cache=False).logits[0, :4].float() for some in (ids, other, ids[:, :4])
        )
    scale, eps = one.abs().max(), torch.finfo(_dtype(model)).eps
    if (one - two).abs().max() > max(1e-4, 2 * eps) * scale:
        raise UserError(
            f"{name!r} is not a causal language model: its tokens see later ones. Use --representation embedding for a"
            " text encoder"
        )
    if (one - alone).abs().max() > max(1e-2, 8 * eps) * scale:
        raise UserError(
            f"{name!r} gives a token other logits where more tokens follow, so that padding would change them"
        )
