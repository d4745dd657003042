"""Which layers' gradients describe an example, and through which adapter they are seen.

Three kinds, all turned into a list of sites, each a linear layer with a name and the shape of its gradient:

- a fresh LoRA adapter (Hu et al. 2021, arXiv 2106.09685): B = 0, so that the gradient of A, being B^T times something,
  is exactly zero and is left out; B's is the full weight's gradient times A^T. The adapter itself changes nothing the
  model computes, so it is never put into the model: the layer's own inputs are multiplied by A, and that is all;
- a LoRA adapter that PEFT has trained and saved: both A and B count, and the model computes with it;
- the full weights of the linear layers (their biases are left out).
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from raydpp.errors import UserError
from raydpp.gradients.config import FULL_WEIGHTS, Adapter
from raydpp.gradients.projection import derived_generator


@dataclass(frozen=True, eq=False)
class Site:
    """One linear layer whose gradient is captured.

    Attributes:
        name: Its name in the model, with .lora_A or .lora_B after it where the gradient is an adapter's.
        module: Maps (n, s, features) to (n, s, outputs).
        outputs, inputs: The shape of the gradient.
        input_map: (inputs, features), what the module's inputs are multiplied by first (a fresh adapter's A), or None.
    """

    name: str
    module: nn.Module
    outputs: int
    inputs: int
    input_map: Tensor | None = None


def adapt(model: nn.Module, adapter: Adapter) -> tuple[nn.Module, list[Site]]:
    """The frozen model in evaluation mode (with the adapter, where it is a trained one), and its sites.

    Raises:
        UserError: The adapter cannot be put on this model, or no layer matches.
    """
    if adapter.kind == "fresh":
        sites = _fresh(model, adapter)
    elif adapter.kind == FULL_WEIGHTS:
        sites = _full_weights(model, adapter)
    else:
        model, sites = _trained(model, adapter)
    return model.requires_grad_(False).eval(), sites


def choose_layers(names: Iterable[str], layers: str) -> list[str]:
    """The names that an Adapter's ``layers`` means, in the order given. UserError where it means none."""
    names = list(names)
    if layers == "all":
        return names
    if last := re.fullmatch(r"last:(\d+)", layers):
        blocks = sorted({block for name in names if (block := _block(name)) is not None})
        kept = set(blocks[len(blocks) - int(last[1]) :] if int(last[1]) < len(blocks) else blocks)
        chosen = [name for name in names if _block(name) in kept]
    else:
        try:
            chosen = [name for name in names if re.search(layers, name)]
        except re.error as error:
            raise UserError(f"--layers {layers!r} is not a regular expression: {error}") from error
    if not chosen:
        raise UserError(
            f"--layers {layers!r} means no layer of this model: give all, last:N, or a regular expression that is"
            f" found in names such as {', '.join(names[:: max(1, len(names) // 3)][:3])}"
        )
    return chosen


def _block(name: str) -> int | None:
    """The transformer block a module belongs to: the first number in its name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _fresh(model: nn.Module, adapter: Adapter) -> list[Site]:
    from peft import LoraConfig, get_peft_model

    targets = adapter.targets if isinstance(adapter.targets, str) else list(adapter.targets)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about what PEFT would do to the layers, and its own use of transformers
            adapted = get_peft_model(model, LoraConfig(r=adapter.rank, lora_dropout=0.0, target_modules=targets))
    except ValueError as error:
        raise UserError(f"LoRA cannot be put on {targets!r} of this model: {error}") from error
    base: Any = adapted.base_model
    names = [str(name) for name in [*base.targeted_module_names, *getattr(base, "targeted_parameter_names", ())]]
    try:
        adapted.unload()  # PEFT has said which modules it would adapt; the model stays as it was
        wrong = next((name for name in names if not _is_linear(model.get_submodule(name))), None)
    except AttributeError as error:  # what PEFT adapts there is a parameter (the experts of a mixture), not a module
        wrong = str(error)
    if wrong is not None:
        raise UserError(
            f"LoRA on {targets!r} of this model would not only be on linear layers ({wrong}), and only theirs is"
            " captured: name linear layers with --lora-targets, or use --adapter full-weights"
        )
    sites = []
    for name in choose_layers(names, adapter.layers):
        module = model.get_submodule(name)
        outputs, inputs = weight_shape(module)
        bound = 1 / math.sqrt(inputs)  # PEFT's own distribution of A
        draw = derived_generator(adapter.seed, f"{name}.lora_A", "lora_A")
        values = draw.uniform(-bound, bound, size=(adapter.rank, inputs)).astype(np.float32)  # (r, inputs)
        weight = next(module.parameters())
        a = torch.from_numpy(values).to(weight.device, weight.dtype)
        sites.append(Site(f"{name}.lora_B", module, outputs, adapter.rank, a))
    return sites


def _full_weights(model: nn.Module, adapter: Adapter) -> list[Site]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    linear = {name: module for name, module in model.named_modules() if _is_linear(module) and module is not head}
    return [
        Site(name, linear[name], *weight_shape(linear[name])) for name in choose_layers(list(linear), adapter.layers)
    ]


def _trained(model: nn.Module, adapter: Adapter) -> tuple[nn.Module, list[Site]]:
    from peft import PeftModel

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
            warnings.filterwarnings("error", message="Found missing adapter keys")  # it would draw them at random
            adapted = PeftModel.from_pretrained(model, adapter.kind, is_trainable=True)
    except Exception as error:  # PEFT raises OSError, ValueError, RuntimeError, hub errors ... for a bad name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the adapter {adapter.kind!r} could not be loaded: {reason}. Give fresh, {FULL_WEIGHTS}, or a folder that"
            " PEFT's save_pretrained wrote for this model"
        ) from error
    modules = {
        name: module
        for name, module in adapted.named_modules()
        if re.search(r"\.lora_[AB]\.\w+$", name) and isinstance(module, nn.Linear)
    }
    captured = {id(parameter) for module in modules.values() for parameter in module.parameters()}
    others = [n for n, p in adapted.named_parameters() if p.requires_grad and id(p) not in captured]
    others += [n for n, module in adapted.named_modules() if type(module).__name__ == "ParamWrapper"]
    others += [f"{n}.bias" for n, module in modules.items() if module.bias is not None]
    if others or not modules:
        raise UserError(
            f"the adapter {adapter.kind!r} trains {others[0] if others else 'no linear layer'}: only plain LoRA on"
            " linear layers is captured (no DoRA, no biases, embeddings, experts or modules_to_save)"
        )
    by_name = {_plain(name): module for name, module in modules.items()}
    chosen = set(choose_layers(dict.fromkeys(name.rsplit(".", 1)[0] for name in by_name), adapter.layers))
    sites = [
        Site(name, module, *weight_shape(module))
        for name, module in by_name.items()
        if name.rsplit(".", 1)[0] in chosen
    ]
    return adapted, sites


def _plain(name: str) -> str:
    """A PEFT module's name without PEFT's own prefix and adapter name: model.layers.0.self_attn.q_proj.lora_B."""
    return re.sub(r"(\.lora_[AB])\.\w+$", r"\1", name.removeprefix("base_model.model."))


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def weight_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; transformers' Conv1D (GPT-2) keeps its weight the other way round."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    rows, columns = weight.shape
    return (columns, rows) if type(module).__name__ == "Conv1D" else (rows, columns)


def site_shapes(sites: Sequence[Site]) -> dict[str, tuple[int, int]]:
    """(outputs, inputs) of every site's gradient, by its name."""
    return {site.name: (site.outputs, site.inputs) for site in sites}
