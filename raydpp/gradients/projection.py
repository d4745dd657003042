"""Johnson-Lindenstrauss projection of layer gradients that are never formed.

The gradient of a linear layer's weight is ``G = sum_s g_s a_s^T`` over positions s, with inputs ``a_s`` and output
gradients ``g_s``. A two-sided (Kronecker) map needs only the small products: ``L G R^T = sum_s (L g_s)(R a_s)^T``.
The entries of all layers' small matrices are then spread over D coordinates with random signs (a sparse JL map,
one non-zero per input coordinate: Charikar et al. 2002; Kane & Nelson 2014).

Both steps preserve inner products in expectation, ``E[<p(G), p(H)>] = <G, H>``, at a scale that does not depend on
the layer's shape. Their variances are about ``1 / (rows of L * layers)`` and ``1 / D``: the number of rows is chosen
so that the second one leads (Wang et al. 2024, section 3, project LoRA gradients the same way in spirit).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class KroneckerProjection:
    """A two-sided map of every layer, then a sparse JL map of all layers' entries together.

    ``shapes`` are the (outputs, inputs) of every layer's gradient, ``dimension`` is D. The same seed gives the same
    map, another seed an independent one. The number of rows of each one-sided map is ``max(16, 2 D / layers)``; a side
    that has no more features than that is kept whole (a LoRA side of rank 8 costs nothing and loses nothing).
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dimension: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        if dimension < 1:
            raise ValueError(f"the projection's dimension is {dimension}: it must be at least 1")
        if not shapes:
            raise ValueError("there is no layer to project")
        self.dimension = dimension
        self.rows = max(16, math.ceil(2 * dimension / len(shapes)))
        self._left: dict[str, Tensor | None] = {}
        self._right: dict[str, Tensor | None] = {}
        self._target: dict[str, Tensor] = {}
        self._sign: dict[str, Tensor] = {}
        for name, (outputs, inputs) in shapes.items():
            self._left[name] = self._one_side(seed, name, "left", outputs, device)
            self._right[name] = self._one_side(seed, name, "right", inputs, device)
            entries = min(self.rows, outputs) * min(self.rows, inputs)
            spread = derived_generator(seed, name, "spread")
            # Distinct targets within each run of D entries: fewer collisions, and no atomic adds that race on a GPU.
            runs = [spread.permutation(dimension) for _ in range(math.ceil(entries / dimension))]
            self._target[name] = torch.from_numpy(np.concatenate(runs)[:entries]).to(device)
            self._sign[name] = torch.from_numpy(_signs(entries, spread)).to(device)

    def _one_side(self, seed: int, name: str, side: str, features: int, device: torch.device | str) -> Tensor | None:
        if features <= self.rows:
            return None
        return torch.from_numpy(rademacher(self.rows, features, derived_generator(seed, name, side))).to(device)

    def reduce_inputs(self, name: str, inputs: Tensor) -> Tensor:
        """R a_s, all that must be kept of a layer's inputs until its backward pass: (n, s, inputs) -> (n, s, rows)."""
        right = self._right[name]
        return inputs if right is None else inputs @ right.to(inputs.dtype).T

    def add_layer(self, total: Tensor, name: str, reduced: Tensor, output_gradients: Tensor) -> None:
        """Add one layer's projected gradients to ``total`` (n, D) in place.

        They come of what ``reduce_inputs`` kept (n, s, rows) and the loss's gradient at the outputs (n, s, outputs).
        """
        left = self._left[name]
        g = output_gradients if left is None else output_gradients @ left.to(output_gradients.dtype).T  # (n, s, rows)
        # L G R^T, the sum over positions of (L g_s)(R a_s)^T: G itself, (n, outputs, inputs), is never formed.
        small = g.to(total.dtype).transpose(1, 2) @ reduced.to(total.dtype)  # (n, rows or outputs, rows or inputs)
        total.index_add_(1, self._target[name], small.flatten(1) * self._sign[name].to(total.dtype))


def derived_generator(seed: int, name: str, side: str) -> np.random.Generator:
    """A random generator that depends on (seed, module name, side) alone.

    Nothing has to be stored or broadcast: every actor, on any machine, derives the same numbers.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}\0{side}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def rademacher(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """A (rows, columns) float32 matrix of independent signs over sqrt(rows), so that E[M^T M] is the identity."""
    return _signs((rows, columns), generator) / np.float32(math.sqrt(rows))


def _signs(shape: int | tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    return (generator.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1).astype(np.float32)
