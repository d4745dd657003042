"""The Vendi score: how many rows that have nothing in common a dataset is worth, by the spectrum of its kernel."""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.stats import entropy
from torch import Tensor


class Spectrum:
    """The eigenvalues of X X^T / n for n unit rows that come in blocks, with the memory of D^2 numbers.

    Up to D rows are held. Of more only their second moments are, X^T X (D, D), which have the same eigenvalues but for
    zeros: products of a block in float32, their sum in float64.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._held: list[Tensor] = []  # (b, D) each
        self._moments: Tensor | None = None  # (D, D) float64

    def add(self, rows: Tensor) -> None:
        """Some more rows: (b, D) float32."""
        self.rows += len(rows)
        self._held.append(rows)
        if self.rows > rows.shape[1]:  # the dual is the smaller matrix from here on
            for block in self._held:
                product = block.T @ block
                self._moments = product.double() if self._moments is None else self._moments.add_(product)
            self._held = []

    @property
    def eigenvalues(self) -> np.ndarray:
        """(min(n, D),) float64, ascending, none below 0, of sum 1: D = 8,192 takes up to 2 minutes on two cores."""
        if self._moments is None:
            rows = torch.cat(self._held)  # (n, D)
            matrix = (rows @ rows.T).double()  # (n, n)
        else:
            matrix = self._moments
        values = torch.linalg.eigvalsh(matrix).clamp_(min=0)
        return (values / values.sum()).numpy(force=True)


def vendi_score(eigenvalues: np.ndarray, order: float = 1.0) -> float:
    """The exponential of the Renyi entropy of some order q >= 0 of eigenvalues of sum 1.

    Of the eigenvalues of K / n, K (n, n) with ones on its diagonal, this is the Vendi score: of order 1, with Shannon's
    entropy, by Friedman & Dieng 2022, "The Vendi Score" (arXiv 2210.02410), definition 3.1; of any order by Pasarkar &
    Dieng 2023, "Cousins of the Vendi Score" (arXiv 2310.12952). From 1 (all rows the same) to n (orthogonal rows); the
    larger, the more diverse. Small orders count rare kinds of rows more, large ones the frequent: infinity is one over
    the largest share. With the cosine kernel of gradients, order 1 is G-Vendi (Jung et al. 2025, "Prismatic Synthesis",
    arXiv 2505.20161).
    """
    found = eigenvalues[eigenvalues > 0]
    if order == 1:
        return math.exp(entropy(found))
    if math.isinf(order):
        return 1.0 / float(found.max())
    return float((found**order).sum() ** (1.0 / (1.0 - order)))
