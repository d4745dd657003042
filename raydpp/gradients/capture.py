"""Per-example gradients of linear layers, captured with hooks during one ordinary backward pass.

A forward hook keeps what a layer was given (for a LoRA side of rank r: r numbers a position), a hook on its output
receives the output's gradient; their product is projected at once and forgotten. No gradient of any weight is
computed, and no example's full gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raydpp.gradients.projection import Projection


class GradientCapture:
    """A context in which backward passes fill ``projected()`` with one row an example.

    Every parameter of the model must be frozen (``requires_grad`` false): the first captured layer's output starts
    the graph, so nothing before it is differentiated. The loss must be a SUM over examples, so that an example's
    gradient does not depend on its neighbours.

    Args:
        layers: The linear layers by name: modules mapping (n, s, inputs) to (n, s, outputs).
        projection: The map, made for these names.
        dtype: In which the projected gradients are summed.
    """

    def __init__(
        self, layers: Mapping[str, nn.Module], projection: Projection, dtype: torch.dtype = torch.float32
    ) -> None:
        self._layers = layers
        self._projection = projection
        self._dtype = dtype
        self._handles: list[RemovableHandle] = []
        self._total: Tensor | None = None  # (n, D)

    def __enter__(self) -> GradientCapture:
        for name, layer in self._layers.items():
            self._handles.append(layer.register_forward_hook(self._keep_inputs(name)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._total = None

    def _keep_inputs(self, name: str) -> Any:
        def forward_hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = arguments[0].detach()  # (n, s, inputs)
            if not output.requires_grad:
                output.requires_grad_(True)  # the graph starts here: nothing upstream needs a gradient

            def backward_hook(gradient: Tensor) -> None:  # (n, s, outputs)
                if self._total is None:
                    self._total = torch.zeros(
                        len(inputs), self._projection.dimension, dtype=self._dtype, device=inputs.device
                    )
                self._projection.add_layer(self._total, name, inputs, gradient)

            output.register_hook(backward_hook)

        return forward_hook

    def projected(self) -> Tensor:
        """The (n, D) projected gradients of the backward pass since the last call; forgets them."""
        if self._total is None:
            raise RuntimeError("no backward pass has reached a captured layer")
        total, self._total = self._total, None
        return total
