"""Batches of examples of similar length within a budget of tokens, learned where memory ends.

One bad example must not take its batch with it: a batch that fails is halved until the example is alone, which then
gets a reason instead of a feature.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from raydpp.gradients.tokenization import TokenizedExample

OneBatch = Callable[[list[TokenizedExample]], Mapping[str, Tensor]]
"""What a model makes of the n examples of one batch: tensors with n rows, by name."""


@dataclass(frozen=True, slots=True)
class BatchedRows:
    """What became of some examples.

    Attributes:
        columns: Arrays with one row an example, in the order they were given; rows with a reason hold zeros.
        reasons: Why an example has no row, or None, for each.
        padded_tokens: Token positions that were computed, padding included.
    """

    columns: dict[str, np.ndarray]
    reasons: list[str | None]
    padded_tokens: int


class TokenBatches:
    """Runs a model over examples in batches, the longest first, so that a budget too large shows at once.

    The budget is the most token positions of one batch, padding included; a longer example goes alone. After a batch
    that ran out of memory it is half of what that batch had, for all that come after it.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget

    def run(self, examples: Sequence[TokenizedExample], one_batch: OneBatch) -> BatchedRows:
        """Every example through ``one_batch``; torch.AcceleratorError passes, since its device is lost."""
        lengths = [len(example.ids) for example in examples]
        waiting = sorted(range(len(examples)), key=lambda i: lengths[i])
        halves: list[list[int]] = []  # of batches with a bad example: the next to do
        reasons: list[str | None] = [None] * len(examples)
        done: list[tuple[list[int], Mapping[str, Tensor]]] = []
        padded = 0
        while waiting or halves:
            batch = halves.pop() if halves else take_batch(waiting, lengths, self.budget)
            size = len(batch) * max(lengths[i] for i in batch)
            padded += size
            found, reason = _attempt(one_batch, [examples[i] for i in batch])
            if found is not None:
                done.append((batch, found))
                continue
            if reason is None:  # out of memory: no later batch is to be larger than half of this one
                self.budget = min(self.budget, max(1, size // 2))
            if reason is None and len(batch) > 1:
                waiting += batch[::-1]  # the same examples again, the longest last, in batches within the new budget
            elif len(batch) > 1:  # an example in it is bad: halves of halves lead to it
                halves += [batch[: len(batch) // 2], batch[len(batch) // 2 :]]
            else:
                reasons[batch[0]] = reason or (
                    f"out of memory on {lengths[batch[0]]} tokens alone: a smaller --max-length would let it fit,"
                    " or more --gpus-per-actor"
                )
        return BatchedRows(_in_order(done, len(examples)), reasons, padded)


def take_batch(waiting: list[int], lengths: Sequence[int], budget: int) -> list[int]:
    """Take indices off the end of ``waiting`` (sorted by length) whose padded size stays within the budget."""
    batch = [waiting.pop()]
    width = lengths[batch[0]]
    while waiting and (len(batch) + 1) * width <= budget:
        batch.append(waiting.pop())
    return batch


def _attempt(one_batch: OneBatch, batch: list[TokenizedExample]) -> tuple[Mapping[str, Tensor] | None, str | None]:
    """What the batch gave, or the reason why not, or neither where memory ran out."""
    try:
        return one_batch(batch), None
    except getattr(torch, "AcceleratorError", ()):
        raise
    except Exception as error:  # any: whatever a model raises on one example must not end the job
        text = (str(error).strip() or "no message").splitlines()[0]
        failed = f"the model failed on this example: {type(error).__name__}: {text}"
        reason = None if _is_out_of_memory(error) else failed
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # outside of the except block: its traceback holds the batch's tensors
    return None, reason


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and ("DefaultCPUAllocator" in text or "out of memory" in text.lower())
    )


def _in_order(done: Sequence[tuple[list[int], Mapping[str, Tensor]]], rows: int) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for batch, found in done:  # only here are results brought to the CPU: a GPU is never waited for between batches
        for name, values in found.items():
            array = at_least_float32(values.detach()).cpu().numpy()
            if name not in columns:
                columns[name] = np.zeros((rows, *array.shape[1:]), array.dtype)
            columns[name][batch] = array
    return columns


def pad(examples: Sequence[TokenizedExample], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-padded (n, s) token ids and (n, s) response mask.

    With causal attention and padding on the right no token of an example ever sees it, and a pad's own outputs are
    never read: no attention mask is needed, and any id serves as the pad. Encoders do need a mask.
    """
    width = max(len(example.ids) for example in examples)
    ids = np.zeros((len(examples), width), np.int64)
    response = np.zeros((len(examples), width), bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        response[row, : len(example.ids)] = example.response
    return to_device(ids, device), to_device(response, device)


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """An array as a tensor there; to a GPU through pinned memory, without waiting."""
    tensor = torch.from_numpy(array)
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
