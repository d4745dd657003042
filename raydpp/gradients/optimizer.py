"""What transformers' Trainer left in a checkpoint's folder of the optimizer: Adam's second moments, the learning rate.

Adam (Kingma & Ba 2015, arXiv 1412.6980, algorithm 1) moves a parameter by the running mean of its gradients over
``sqrt(v_hat) + eps``, v_hat being the running mean of their squares, corrected for its start at zero. So the step that
training makes of an example's gradient g is ``g / (sqrt(v_hat) + eps)`` (LESS, Xia et al. 2024, arXiv 2402.04333,
section 3). It is linear in g. LESS's own code adds to it the first moment, which is the same for all examples, and to
v_hat the example's own share; both are left out here.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raydpp.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from raydpp.gradients.adapters import TargetLayer

_CURE = "give --adapter a checkpoint of plain AdamW (Trainer's --optim adamw_torch), or leave out --optimizer adam"


def moments_file(checkpoint: str) -> Path:
    """The file with a checkpoint's optimizer state: Trainer's optimizer.pt, or accelerate's optimizer.bin.

    UserError where there is none.
    """
    if checkpoint == "fresh":
        raise UserError(
            "--optimizer adam needs the moments of a training run, and a fresh adapter has none: give --adapter a"
            " checkpoint's folder, such as raydpp warmup writes"
        )
    files = [Path(checkpoint) / name for name in ("optimizer.pt", "optimizer.bin")]
    if found := [file for file in files if file.is_file()]:
        return found[0]
    raise UserError(
        f"--optimizer adam: {checkpoint} has no optimizer.pt or optimizer.bin. Give --adapter a checkpoint's folder"
        " that Trainer saved with its optimizer (not save_only_model, nor the shards of DeepSpeed or FSDP)"
    )


def adam_scales(model: nn.Module, layers: Sequence[TargetLayer], checkpoint: str) -> dict[str, Tensor]:
    """``1 / (sqrt(v_hat) + eps)`` for the gradients of a trained adapter's layers, by the layers' names.

    Args:
        model: PEFT's model with the adapter, as ``attach_adapter`` gives it.
        layers: Its target layers, or some of them.
        checkpoint: The adapter's folder.

    Returns:
        (outputs, inputs) tensors, of at least float32, where the weights are.

    Raises:
        UserError: The state is not that of Adam over this adapter's weights.
    """
    import torch

    file = moments_file(checkpoint)
    try:
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)  # a pickle, of which no code is run
        groups = [group for group in held["param_groups"] if group["params"]]
        named = [name for group in groups for name in group.get("param_names", group["params"])]
        found = [(held["state"][key], group) for group in groups for key in group["params"]]
    except Exception as error:  # torch raises errors of pickle, zip and files; KeyError: a parameter without a state
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"{file} is not an optimizer's whole state ({type(error).__name__}: {reason}): {_CURE}"
        ) from error
    trained = {name: p for name, p in model.named_parameters() if re.search(r"\.lora_[AB]\.\w+\.weight$", name)}
    if not all(isinstance(name, str) for name in named):  # torch numbers parameters by group, Trainer in this order
        if len(groups) > 1:
            raise UserError(
                f"{file} has {len(groups)} groups of nameless parameters, in an order of their own: {_CURE}"
            )
        named = list(trained) if len(found) == len(trained) else []
    if sorted(named) != sorted(trained):
        raise UserError(
            f"{file} is of {len(found)} parameters, not the {len(trained)} that the adapter in {checkpoint} trains:"
            f" {_CURE}"
        )
    layer_of = {id(layer.module.weight): layer.name for layer in layers}
    scales = {}
    for name, (moments, group) in zip(named, found, strict=True):
        square = moments.get("max_exp_avg_sq", moments.get("exp_avg_sq"))  # the former under AMSGrad
        if square is None or not {"step", "eps", "betas"} <= moments.keys() | group.keys():
            raise UserError(f"{file} holds no second moment of Adam for {name}, but {', '.join(moments)}: {_CURE}")
        weight, step = trained[name], float(moments["step"])
        if square.shape != weight.shape or not step:
            raise UserError(
                f"{file} has moments of shape {tuple(square.shape)} after {step:.0f} steps where {name} is"
                f" {tuple(weight.shape)}: {_CURE}"
            )
        if id(weight) in layer_of:
            square = square.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
            unbiased = square / (1 - group["betas"][1] ** step)
            scales[layer_of[id(weight)]] = 1 / (unbiased.sqrt() + group["eps"])
    return scales


def learning_rate(checkpoint: str) -> float | None:
    """The mean learning rate that Trainer logged in the epoch that ends at a checkpoint; None where it is not known."""
    try:
        state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
        end = state["epoch"]
        rates = [
            entry["learning_rate"]
            for entry in state["log_history"]
            if "learning_rate" in entry and math.ceil(end) - 1 < entry["epoch"] <= end
        ]
        return sum(rates) / len(rates)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
