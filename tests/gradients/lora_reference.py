"""The gradients of a PEFT adapter by plain autograd, one example at a time: what captured ones are tested against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from raydpp.gradients.tokenization import TokenizedExample


def lora_b_gradients(
    model: Any, targets: Sequence[str], right: Mapping[str, Tensor], examples: Sequence[TokenizedExample]
) -> np.ndarray:
    """(n, E) gradients of the response losses with respect to lora_B (0 at the start), (outputs, rank) a layer.

    ``right`` are the (rank, inputs) numbers that lora_A has, by the names of the model's layers.
    """
    from peft import LoraConfig, get_peft_model

    rank = len(next(iter(right.values())))
    config = LoraConfig(
        r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian", task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, config).eval()
    weights = dict(adapted.named_parameters())
    with torch.no_grad():
        for name, numbers in right.items():
            weights[f"base_model.model.{name}.lora_A.default.weight"].copy_(numbers)
    trained = [weights[f"base_model.model.{name}.lora_B.default.weight"] for name in right]
    rows = []
    for example in examples:
        ids = torch.from_numpy(example.ids.astype(np.int64))
        counts = torch.from_numpy(example.response[1:])
        logits = adapted(input_ids=ids[None]).logits[0, :-1]  # (s - 1, V)
        loss = torch.nn.functional.cross_entropy(logits[counts], ids[1:][counts])
        found = torch.autograd.grad(loss, trained)  # (outputs, rank) each
        rows.append(torch.cat([gradient.flatten() for gradient in found]).float().numpy())
    return np.stack(rows)


def cosines(rows: np.ndarray) -> np.ndarray:
    """(n, E) -> those of all pairs: (n (n - 1) / 2,)."""
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray((unit @ unit.T)[np.triu_indices(len(unit), 1)])
