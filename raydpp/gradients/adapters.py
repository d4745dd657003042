"""Which layers' gradients describe an example, and through which adapter.

Both kinds become a list of target layers: linear layers with a name and the shape of their gradient.

- A fresh LoRA adapter (Hu et al. 2021, arXiv 2106.09685) has B = 0, so that the gradient of A, being B^T times
  something, is exactly zero and is left out; B's is the weight's own gradient G times A^T. With random A that is a
  Johnson-Lindenstrauss map of G, the one that ``projection`` starts with: the adapter changes nothing that the model
  computes and is never put into it, and what it stands for, whatever its rank, is the gradient of the weights.
- Of a LoRA adapter that PEFT has trained and saved both A and B count, and the model computes with it.
"""

from __future__ import annotations

import logging
import math
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from raydpp.errors import UserError
from raydpp.gradients.config import Adapter
from raydpp.gradients.model import no_pickles

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class TargetLayer:
    """One linear layer whose gradient is captured.

    Attributes:
        name: Its name in the model, with .lora_A or .lora_B after it where the gradient is a trained adapter's.
        module: Maps (n, s, inputs) to (n, s, outputs).
        shape: (outputs, inputs) of the gradient.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int]


def attach_adapter(model: nn.Module, adapter: Adapter) -> tuple[nn.Module, list[TargetLayer]]:
    """The frozen model in evaluation mode (with the adapter, where it is a trained one), and its target layers.

    UserError where the adapter cannot be put on this model, or no layer matches.
    """
    if adapter.kind == "fresh":
        _require_most_weights(model, adapter)
        layers = _fresh(model, adapter)
    else:
        model, layers = _trained(model, adapter)
    return model.requires_grad_(False).eval(), layers


_LEAST_SEEN = 0.75  # of the weights of a model's blocks, where nobody has named the layers
_NEARLY_ALL_SEEN = 0.99  # below, the share is said


def _require_most_weights(model: nn.Module, adapter: Adapter) -> None:
    """UserError where much of a model is stacks of matrices (fused experts), whose gradients are not captured.

    A part of the model would stand for the whole: whoever names the layers wants that.
    """
    if adapter.targets != "all-linear" or (adapter.layers != "all" and _last_blocks(adapter.layers) is None):
        return
    linear = sum(math.prod(_weight_shape(module)) for _, module in _linear_layers(model))
    start = _decoder_prefix(model)
    stacks = {
        name: parameter.numel()
        for name, parameter in model.named_parameters()
        if parameter.ndim > 2 and name.startswith(start)
    }
    seen = linear / max(1, linear + sum(stacks.values()))
    if seen >= _NEARLY_ALL_SEEN or not stacks:
        return
    said = (
        f"{seen:.0%} of the weights of this model's blocks are in linear layers, and only the gradients of these"
        f" are captured; others, such as {next(iter(stacks))}, are stacks of matrices (fused experts)"
    )
    if seen < _LEAST_SEEN:
        raise UserError(
            f"{said}. Where a part will do, name it: --layers self_attn, or another regular expression of module names"
        )
    log.warning("%s", said)


def choose_layers(names: Iterable[str], layers: str) -> list[str]:
    """The names that an Adapter's ``layers`` means, in the order given. UserError where it means none."""
    names = list(names)
    if layers == "all":
        return names
    last = _last_blocks(layers)
    if last is not None:
        blocks = sorted({block for name in names if (block := _block(name)) is not None})
        kept = blocks[max(0, len(blocks) - last) :]
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


def _last_blocks(layers: str) -> int | None:
    found = re.fullmatch(r"last:(\d+)", layers)
    return int(found[1]) if found else None


def _block(name: str) -> int | None:
    """The transformer block a module belongs to: the first number in its name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else None


def _fresh(model: nn.Module, adapter: Adapter) -> list[TargetLayer]:
    """The linear layers that an adapter goes on: all but the head, or those whose names end with one of the targets."""
    linear = dict(_linear_layers(model))
    names = list(linear)
    linear |= {name: module for name, module in model.named_modules() if module is _head(model)}
    if adapter.targets != "all-linear":
        names = []
        for target in adapter.targets:
            found = [name for name in linear if f".{name}".endswith(f".{target}")]
            if not found:
                known = sorted({name.rpartition(".")[2] for name in linear})
                raise UserError(
                    f"--lora-targets {target}: no linear layer of this model is named so; it has {', '.join(known)}"
                )
            names += found
    return [
        TargetLayer(name, linear[name], _weight_shape(linear[name]))
        for name in choose_layers(dict.fromkeys(names), adapter.layers)
    ]


_CONVERT = (
    "import torch; from safetensors.torch import save_file;"
    ' save_file(torch.load(d + "/adapter_model.bin", "cpu", weights_only=True), d + "/adapter_model.safetensors")'
)


def _trained(model: nn.Module, adapter: Adapter) -> tuple[nn.Module, list[TargetLayer]]:
    from peft import PeftModel

    try:
        with warnings.catch_warnings(), no_pickles(adapter.kind, _CONVERT):
            warnings.simplefilter("ignore", FutureWarning)  # PEFT's own use of transformers
            warnings.filterwarnings("error", message="Found missing adapter keys")  # it would draw them at random
            adapted = PeftModel.from_pretrained(model, adapter.kind, is_trainable=True)
    except UserError:
        raise
    except Exception as error:  # PEFT raises OSError, ValueError, RuntimeError, hub errors ... for a bad name
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"the adapter {adapter.kind!r} could not be loaded: {reason}. Give fresh, or a folder that"
            " PEFT's save_pretrained wrote for this model"
        ) from error
    modules = {  # model.layers.0.self_attn.q_proj.lora_B, without PEFT's own prefix and the adapter's name
        found[1]: module
        for name, module in adapted.named_modules()
        if isinstance(module, nn.Linear) and (found := re.fullmatch(r"base_model\.model\.(.+\.lora_[AB])\.\w+", name))
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
    adapted_names = dict.fromkeys(name.rsplit(".", 1)[0] for name in modules)
    chosen = set(choose_layers(adapted_names, adapter.layers))
    return adapted, [
        TargetLayer(name, module, _weight_shape(module))
        for name, module in modules.items()
        if name.rsplit(".", 1)[0] in chosen
    ]


def _head(model: nn.Module) -> nn.Module | None:
    return getattr(model, "get_output_embeddings", lambda: None)()


def _decoder_prefix(model: nn.Module) -> str:
    """What the names of the text decoder's parts begin with; nothing where the whole model is one."""
    decoder = getattr(model, "get_decoder", lambda: None)()
    if decoder is _head(model):  # some name their head so
        return ""
    return next((f"{name}." for name, module in model.named_modules() if name and module is decoder), "")


def _linear_layers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The linear layers of the model's body, by name; of one that sees pictures too, those of its text decoder."""
    head, start = _head(model), _decoder_prefix(model)
    return [
        (name, module)
        for name, module in model.named_modules()
        if _is_linear(module) and module is not head and name.startswith(start)
    ]


def _is_linear(module: nn.Module) -> bool:
    return _declared_shape(module) is not None or type(module).__name__ == "Conv1D"


def _declared_shape(module: nn.Module) -> tuple[int, int] | None:
    """(outputs, inputs) of torch's linear layer, and of a quantised one of a class of its own (GPTQ, AWQ).

    Their weights may be packed, in another shape and under another name.
    """
    shape = getattr(module, "out_features", None), getattr(module, "in_features", None)
    leaf = isinstance(module, nn.Linear) or next(module.children(), None) is None
    return cast("tuple[int, int]", shape) if leaf and all(isinstance(size, int) for size in shape) else None


def _weight_shape(module: nn.Module) -> tuple[int, int]:
    """(outputs, inputs) of a linear layer; transformers' Conv1D (GPT-2) keeps its weight the other way round."""
    if (shape := _declared_shape(module)) is not None:
        return shape
    weight: Tensor = module.weight  # type: ignore[assignment]
    columns, rows = weight.shape
    return rows, columns
