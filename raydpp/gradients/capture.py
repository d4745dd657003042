"""Per-example gradients of linear layers, captured with hooks during one ordinary backward pass.

A forward hook keeps what a layer was given, reduced at once to the few numbers a position that the projection needs; a
hook on its output receives the output's gradient; their product is added to the projected sum and forgotten. No
gradient of any weight is computed, and no example's full gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from raydpp.gradients.adapters import Site
from raydpp.gradients.projection import KroneckerProjection


class GradientCapture:
    """A context, ``capture(n)``, in which backward passes fill ``projected()`` with one row for each of n examples.

    Every parameter of the model must be frozen (``requires_grad`` false): the first captured layer's output starts
    the graph, so nothing before it is differentiated. The loss must be a SUM over examples, so that an example's
    gradient does not depend on its neighbours. Forward passes without gradients (``torch.no_grad``) pass unnoticed.

    Args:
        sites: The linear layers: modules mapping (n, s, features) to (n, s, outputs), or (n * s, features) to
            (n * s, outputs).
        projection: The map, made for these sites.
        dtype: In which the projected gradients are summed.
    """

    def __init__(
        self, sites: Sequence[Site], projection: KroneckerProjection, dtype: torch.dtype = torch.float32
    ) -> None:
        self._sites = sites
        self._projection = projection
        self._dtype = dtype
        self._handles: list[RemovableHandle] = []
        self._total: Tensor | None = None  # (n, D)
        self._examples = 1
        self.reached: set[str] = set()  # names of the sites whose gradients have come

    def __call__(self, examples: int) -> GradientCapture:
        """The context for a batch of so many examples."""
        self._examples = examples
        return self

    def __enter__(self) -> GradientCapture:
        self._total = None
        for site in self._sites:
            self._handles.append(site.module.register_forward_hook(self._keep_inputs(site)))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._total = None

    def _keep_inputs(self, site: Site) -> Any:
        def forward_hook(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            # Some models hand their layers all positions of all examples in one row: (n * s, features).
            inputs = arguments[0].detach().reshape(self._examples, -1, arguments[0].shape[-1])  # (n, s, features)
            if site.input_map is not None:
                inputs = inputs @ site.input_map.T  # (n, s, inputs)
            inputs = self._projection.reduce_inputs(site.name, inputs)
            if not output.requires_grad:
                output.requires_grad_(True)  # the graph starts here: nothing upstream needs a gradient

            def backward_hook(gradient: Tensor) -> None:  # (n, s, outputs)
                if self._total is None:
                    shape = (len(inputs), self._projection.dimension)
                    self._total = torch.zeros(shape, dtype=self._dtype, device=inputs.device)
                self.reached.add(site.name)
                gradient = gradient.reshape(len(inputs), inputs.shape[1], -1)
                self._projection.add_layer(self._total, site.name, inputs, gradient)

            output.register_hook(backward_hook)

        return forward_hook

    def projected(self) -> Tensor:
        """The (n, D) projected gradients of the backward pass since the last call; forgets them."""
        if self._total is None:
            raise RuntimeError("no backward pass has reached a captured layer")
        total, self._total = self._total, None
        return total
