"""Johnson-Lindenstrauss projection of layer gradients that are never formed.

The gradient of a linear layer's weight is ``G = sum_s g_s a_s^T`` over positions s, with inputs ``a_s`` and output
gradients ``g_s``. It is projected in two steps: a map R of the inputs to a few rows, ``G R^T = sum_s g_s (R a_s)^T``,
and the spreading of all layers' entries over D coordinates with random signs (a sparse JL map, one non-zero per input
coordinate: Charikar et al. 2002; Kane & Nelson 2014). The layer's G R^T is the gradient of B of a LoRA adapter whose A
is R (Wang et al. 2024, arXiv 2402.02318, section 3).

Both steps preserve inner products in expectation, ``E[<p(G), p(H)>] = <G, H>``, at a scale that does not depend on
the layer's shape. R adds a variance of about ``2 |G^T H|^2 / rows``, in which output gradients meet one another; a map
of the outputs would add ``2 |G H^T|^2 / rows``, in which inputs meet. Inputs have a large part in common (their mean,
massive activations), output gradients have not, so that the same rows on the outputs would err several times more:
outputs are kept whole. Spreading adds about ``1 / D``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from raydpp.gradients.config import LoraInit

_ENTRIES = 2**26
"""The most entries of layer gradients at once."""


class Projection:
    """A map of every layer's inputs, then a sparse JL map of all layers' entries together.

    ``shapes`` are the (outputs, inputs) of every layer's gradient, ``dimension`` is D, and ``rows`` are those of R;
    both are even: each half of the coordinates is made of rows of its own, so that the halves are independent
    projections, and what they differ by tells how far their sum is off. Inputs of no more features than a half has
    rows are kept whole. R is of random signs, or of normal numbers (``init``). The same seed gives the same map,
    another seed an independent one. Products are rounded to ``dtype``, or to the gradients' own type where that is
    wider; sums are of the total's. ``device`` is that of all layers, or that of each by its name.

    ``scales`` multiply the gradients of the layers that they name entry by entry, (outputs, inputs) each, so that these
    are formed after all, a layer at a time, in the scales' type where that is wider.

    Attributes:
        maps: R of each layer, (rows, inputs); None where inputs are kept whole.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dimension: int,
        rows: int,
        seed: int = 0,
        device: torch.device | str | Mapping[str, torch.device] = "cpu",
        dtype: torch.dtype = torch.float32,
        init: LoraInit = "signs",
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        if dimension < 2 or dimension % 2 or rows < 2 or rows % 2:
            raise ValueError(f"a projection to {dimension} dimensions with {rows} rows: both must be even, at least 2")
        if not shapes:
            raise ValueError("there is no layer to project")
        self.dimension = dimension
        half = dimension // 2
        self._scales = scales or {}
        self.maps: dict[str, Tensor | None] = {}
        self._sign: dict[str, Tensor] = {}  # (2, E): of the E entries in each half
        self._shift: dict[str, int] = {}
        for name, (outputs, inputs) in shapes.items():
            place = device[name] if isinstance(device, Mapping) else device
            kept = inputs if inputs <= rows // 2 else rows // 2
            right = None
            if kept < inputs:
                draw = {"signs": rademacher, "gaussian": gaussian}[init]
                right = torch.from_numpy(draw(rows, inputs, derived_generator(seed, name, "right")))
                right = right.to(place, dtype)
            self.maps[name] = right
            spread = derived_generator(seed, name, "spread")
            self._sign[name] = torch.from_numpy(_signs((2, outputs * kept), spread)).to(place, dtype)
            self._shift[name] = int(spread.integers(half))

    def reduce_inputs(self, name: str, inputs: Tensor) -> Tensor:
        """R a_s, all that must be kept of a layer's inputs until its backward pass: (n, s, inputs) -> (n, s, rows).

        Where the gradient is scaled, the inputs themselves.
        """
        return inputs if name in self._scales else self._map_inputs(name, inputs)

    def _map_inputs(self, name: str, inputs: Tensor) -> Tensor:
        right = self.maps[name]
        if right is None:
            return torch.cat([inputs, inputs], dim=-1) * math.sqrt(0.5)  # each half sees all of them
        return inputs @ right.to(inputs.dtype).T

    def add_layer(self, total: Tensor, name: str, reduced: Tensor, output_gradients: Tensor) -> None:
        """Add one layer's projected gradients to ``total`` (n, D) in place.

        They come of what ``reduce_inputs`` kept (n, s, rows) and the loss's gradient at the outputs (n, s, outputs).
        """
        halves = total.view(len(total), 2, -1)
        dtype = torch.promote_types(output_gradients.dtype, self._sign[name].dtype)
        scale = self._scales.get(name)  # (outputs, inputs)
        entries = self._sign[name].numel()
        if scale is not None:
            dtype, entries = torch.promote_types(dtype, scale.dtype), max(entries, scale.numel())
        at_once = max(1, _ENTRIES // entries)
        for start in range(0, len(total), at_once):
            some = slice(start, start + at_once)
            kept, gradients = reduced[some].to(dtype), output_gradients[some].to(dtype)
            if scale is None:
                # R G^T, the sum over positions of (R a_s) g_s^T: G itself, (n, outputs, inputs), is never formed.
                small = kept.transpose(1, 2) @ gradients  # (n, rows, outputs)
            else:
                # A scale of every entry does not commute with R: G first.
                whole = (gradients.transpose(1, 2) @ kept).mul_(scale)  # (n, outputs, inputs)
                small = self._map_inputs(name, whole).transpose(1, 2)  # (n, rows, outputs)
            self._spread(halves[some], name, small.reshape(len(small), 2, -1))

    def _spread(self, halves: Tensor, name: str, entries: Tensor) -> None:
        """Entry e of a layer goes to coordinate (e + shift) modulo D / 2: (n, 2, D / 2), (n, 2, E).

        Shifts and signs are random, so that any two entries of different layers meet with a probability of 2 / D, and
        what meets cancels in expectation. No two entries are added at once: a GPU gives the same sums every time.
        """
        half, shift = halves.shape[2], self._shift[name]
        signed = entries * self._sign[name]
        whole = signed.shape[2] // half * half
        sums = signed[:, :, :whole].unflatten(2, (-1, half)).sum(2, dtype=halves.dtype)  # (n, 2, D / 2)
        sums[:, :, : signed.shape[2] - whole] += signed[:, :, whole:]
        halves[:, :, shift:] += sums[:, :, : half - shift]
        halves[:, :, :shift] += sums[:, :, half - shift :]


def derived_generator(seed: int, name: str, side: str) -> np.random.Generator:
    """A random generator that depends on (seed, module name, side) alone.

    Nothing has to be stored or broadcast: every actor, on any machine, derives the same numbers.
    """
    digest = hashlib.blake2b(f"{seed}\0{name}\0{side}".encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def rademacher(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """A (rows, columns) float32 matrix of independent signs over sqrt(rows), so that E[M^T M] is the identity."""
    return _signs((rows, columns), generator) / np.float32(math.sqrt(rows))


def gaussian(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    """The same of normal numbers, as PEFT's init_lora_weights="gaussian" draws A, up to its scale."""
    return generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(math.sqrt(rows))


def _signs(shape: tuple[int, int], generator: np.random.Generator) -> np.ndarray:
    return generator.integers(0, 2, size=shape, dtype=np.int8) * 2 - 1
