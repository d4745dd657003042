"""The loss of every example's response, and its gradient, without the logits of a whole batch.

The vocabulary is the widest layer of a small model: its logits are made only at positions that predict a response
token, a few hundred positions at a time, turned at once into the loss and the gradient of the last hidden state, and
forgotten. No float32 copy of the logits is larger than one such chunk.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from raydpp.gradients.batches import at_least_float32

_CHUNK_BYTES = 64 * 2**20  # of float32 logits
_CHUNK_BYTES_GPU = 512 * 2**20
_FEWEST = 8
"""Rows of a product with the head: for fewer than four BLAS takes a vector path whose sums over the vocabulary are ten
times less exact, which a deep model made into relative errors of 3e-4 of a gradient."""


class ResponseLoss:
    """Mean negative log-likelihood of every example's own response tokens, in nats.

    The model is a causal one of transformers, or PEFT's wrapper of one; the ``captured`` modules have hooks, and so
    must be called themselves. Where the model is a decoder followed by one linear head (found out by comparing the two
    on a few tokens), these are its ``parts``, and the head is applied in chunks; a model that does more to its logits
    (caps or scales them, say) is called as it is.
    """

    def __init__(self, model: nn.Module, captured: Iterable[nn.Module] = ()) -> None:
        self._model = model
        parts = _decoder_and_head(model)
        self.parts = None if parts and any(module is parts[1] for module in captured) else parts

    def __call__(self, ids: Tensor, response: Tensor) -> tuple[Tensor, Tensor | None]:
        """(n,) losses in at least float32, and the (n, s, H) last hidden states (None where there are no ``parts``).

        ``ids`` (n, s) are padded on the right; ``response`` (n, s) is true at one token or more of every example, but
        never at its first.
        """
        predicts = response[:, 1:]  # (n, s - 1): position p predicts token p + 1
        row, column = torch.nonzero(predicts, as_tuple=True)  # (t,) each
        target = ids[row, column + 1]  # (t,)
        hidden = None
        if self.parts is not None:
            decoder, head = self.parts
            hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state  # (n, s, H)
            last, top = hidden.device, head.weight.device  # other ones than the tokens', where the model is spread
            states = hidden[row.to(last), column.to(last)].to(top)  # (t, H)
            nats = _ChunkedCrossEntropy.apply(states, head.weight, head.bias, target.to(top))  # (t,)
        else:
            first = int(column.min())
            kept = ids.shape[1] - first  # positions, from the first that predicts: as a number it has no device
            logits = self._model(input_ids=ids, logits_to_keep=kept, use_cache=False).logits  # (n, kept or more, V)
            chosen = logits[:, -kept:-1][predicts[:, first:]]  # (t, V), in the order of row and column
            nats = nn.functional.cross_entropy(at_least_float32(chosen), target, reduction="none")  # (t,)
        nats = nats.to(ids.device)
        total = torch.zeros(len(ids), dtype=nats.dtype, device=nats.device).index_add(0, row, nats)
        return total / predicts.sum(1), hidden


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(t, H) hidden states, (V, H) head -> (t,) nats; the gradient is made with the loss, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        precision = torch.promote_types(hidden.dtype, torch.float32)
        nats = torch.empty(len(hidden), dtype=precision, device=hidden.device)
        gradient = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (t, H), of each token's own nats
        limit = _CHUNK_BYTES if hidden.device.type == "cpu" else _CHUNK_BYTES_GPU
        step = max(1, limit // (4 * len(weight)))
        for start in range(0, len(hidden), step):
            states = hidden[start : start + step]  # (chunk, H)
            size, some = len(states), slice(start, start + len(states))
            if size < _FEWEST:
                states = nn.functional.pad(states, (0, 0, 0, _FEWEST - size))
            logits = at_least_float32(nn.functional.linear(states, weight, bias))  # (chunk, V)
            normaliser = torch.logsumexp(logits, 1, keepdim=True)  # (chunk, 1)
            wanted = target[some, None]  # (size, 1)
            nats[some] = (normaliser[:size] - logits[:size].gather(1, wanted))[:, 0]
            if gradient is not None:
                error = logits.sub_(normaliser).exp_()  # (chunk, V): probabilities, less one for the right token
                error[:size].scatter_add_(1, wanted, torch.full_like(error[:size, :1], -1))
                gradient[some] = (error.to(hidden.dtype) @ weight)[:size]
        ctx.save_for_backward(gradient)
        return nats

    @staticmethod
    def backward(ctx: Any, *output_gradients: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * output_gradients[0][:, None].to(gradient.dtype), None, None, None


def _decoder_and_head(model: nn.Module) -> tuple[nn.Module, nn.Linear] | None:
    """The model's two parts, if together they are the whole model."""
    plain: Any = getattr(model, "get_base_model", lambda: model)()
    decoder = getattr(plain, "base_model", None)
    head = getattr(plain, "get_output_embeddings", lambda: None)()
    if decoder is None or decoder is plain or type(head) is not nn.Linear:  # a class of its own may do more
        return None
    if head.weight.is_meta:  # it lies on disk, but while it is called
        return None
    ids = torch.arange(8, device=head.weight.device)[None] % len(head.weight)  # (1, 8)
    with torch.no_grad():
        states = decoder(input_ids=ids, use_cache=False).last_hidden_state
        parts = at_least_float32(head(states))  # (1, 8, V)
        whole = at_least_float32(model(input_ids=ids, use_cache=False).logits)
    scale = whole.abs().max()
    same = bool(torch.isfinite(scale)) and bool((parts - whole).abs().max() <= 1e-4 * scale)
    return (decoder, head) if same else None
