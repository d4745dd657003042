"""The dense projection by random signs: too slow to use, and what the product's is tested against."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from raydpp.gradients.projection import derived_generator

BLOCK = 4096  # entries whose signs exist at one time: at D = 1,024, 16 MiB of float32


class RademacherProjection:
    """``p(G)_d = sum_e sign(d, e) G_e / sqrt(D)``: inner products in expectation, with variance about 1/D.

    Takes what Projection takes, and stands in for it.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        dimension: int,
        rows: int = 0,
        seed: int = 0,
        device: torch.device | str | Mapping[str, torch.device] = "cpu",
        dtype: torch.dtype = torch.float32,
        init: str = "signs",
        scales: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.dimension = dimension
        self._scales = scales or {}
        self._seed = seed

    def reduce_inputs(self, name: str, inputs: Tensor) -> Tensor:
        """All of them."""
        return inputs

    def add_layer(self, total: Tensor, name: str, reduced: Tensor, output_gradients: Tensor) -> None:
        """Forms the (n, outputs, inputs) gradients of the layer."""
        whole = output_gradients.transpose(1, 2) @ reduced * self._scales.get(name, 1)
        full = whole.flatten(1).to(total.dtype)  # (n, outputs * inputs)
        for start in range(0, full.shape[1], BLOCK):
            block = full[:, start : start + BLOCK]  # (n, entries)
            draw = derived_generator(self._seed, name, f"dense {start}")
            bits = draw.integers(0, 2, size=(block.shape[1], self.dimension), dtype=np.int8)
            signs = torch.from_numpy(bits * 2 - 1).to(total)  # (entries, D)
            total.add_(block @ signs, alpha=1 / math.sqrt(self.dimension))
