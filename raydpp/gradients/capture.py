"""Per-example gradients of linear layers, captured with hooks during one ordinary backward pass.

A forward hook keeps what a layer was given, reduced at once to the few numbers a position that the projection needs; a
hook on its output receives the output's gradient; their product is added to the projected sum and forgotten. No
gradient of any weight is computed, and no example's full gradient is ever formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from raydpp.gradients.adapters import TargetLayer
from raydpp.gradients.projection import Projection


class GradientCapture:
    """A context, ``capture(n)``, in which backward passes fill ``projected()`` with one row for each of n examples.

    Every parameter of the model must be frozen (``requires_grad`` false): the first captured layer's output starts
    the graph, so nothing before it is differentiated. The loss must be a SUM over examples, so that an example's
    gradient does not depend on its neighbours. Forward passes without gradients (``torch.no_grad``) do not count. The
    projected gradients are summed in ``dtype``, on each device those of its layers.
    """

    def __init__(
        self, layers: Sequence[TargetLayer], projection: Projection, dtype: torch.dtype = torch.float32
    ) -> None:
        self._layers = layers
        self._projection = projection
        self._dtype = dtype
        self._totals: dict[torch.device, Tensor] = {}  # (n, D)

    @contextmanager
    def __call__(self, examples: int) -> Iterator[None]:
        handles = [layer.module.register_forward_hook(self._forward_hook(layer, examples)) for layer in self._layers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._totals = {}

    def projected(self) -> Tensor:
        """The (n, D) projected gradients of the backward passes since the last call; forgets them."""
        if not self._totals:
            raise RuntimeError("no backward pass has reached a captured layer")
        total, *others = self._totals.values()
        self._totals = {}
        for other in others:
            total += other.to(total.device)
        return total

    def _forward_hook(self, layer: TargetLayer, examples: int) -> Callable[..., None]:
        def keep_inputs(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            if not torch.is_grad_enabled():
                return
            # The forward pass comes by here: the layer's inputs a_s. Some models hand their layers all positions of
            # all examples in one row: (n * s, features). Where a model's layers are spread over devices, a layer moves
            # its inputs to its own as it is called.
            inputs = arguments[0].detach().to(output.device)
            inputs = inputs.reshape(examples, -1, inputs.shape[-1])  # (n, s, inputs)
            reduced = self._projection.reduce_inputs(layer.name, inputs)  # (n, s, rows)
            if not output.requires_grad:
                output.requires_grad_(True)  # the graph starts here: nothing upstream needs a gradient

            def add_gradient(gradient: Tensor) -> None:
                # The backward pass comes by here: the gradients g_s at the layer's outputs.
                if reduced.device not in self._totals:
                    shape = (examples, self._projection.dimension)
                    self._totals[reduced.device] = torch.zeros(shape, dtype=self._dtype, device=reduced.device)
                gradient = gradient.reshape(examples, reduced.shape[1], -1)  # (n, s, outputs)
                self._projection.add_layer(self._totals[reduced.device], layer.name, reduced, gradient)

            output.register_hook(add_gradient)

        return keep_inputs
