"""Measures of diversity beside the log-det distance, in one pass over features that come in blocks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import entropy
from torch import Tensor

from raydpp.diversity.redundancy import COPY
from raydpp.diversity.vendi import Spectrum, vendi_score
from raydpp.dpp.features import Features, UnitRows, unit_rows
from raydpp.errors import UserError, checked_seed

SAMPLE = 5_000
"""The most rows of which pairs are looked at."""

NEIGHBOURS = 10
"""The k of the neighbour further away, and of NovelSum's density."""

_BLOCK = 2_048  # rows looked at together
_PAIRS = 512  # rows whose cosines with the whole sample are looked at together


@dataclass(frozen=True)
class Measures:
    """How diverse n rows are. What needs pairs is of a sample: it, too, depends on the number of rows there.

    Attributes:
        rows: n.
        vendi_1: Vendi score of order 1, in rows, from 1 to min(n, D); of gradients G-Vendi (``vendi_score``).
        vendi_2: Of order 2.
        vendi_inf: Of order infinity.
        cosine_distance: Mean of 1 - cosine over all pairs of two rows, from 0 to 2 (DistSum with cosines in Yang et al.
            2025, arXiv 2502.17184). None of one row.
        sampled: The number of rows in the sample, of which the rest is.
        nearest_cosine: Mean cosine of a row and the nearest other one; 1 less it is the KNN distance of Yang et al. The
            larger, the more redundant. None of one row.
        tenth_cosine: Mean cosine of a row and its ``NEIGHBOURS``-th nearest other one; None of fewer rows.
        near_duplicates: Share, 0 to 1, of the rows that have another at a cosine of the threshold or more, as in
            SemDeDup (Abbas et al. 2023, arXiv 2303.09540). None of one row.
        novel_sum: NovelSum (Yang et al., section 3), a weighted mean of distances; the larger, the more diverse. The
            novelty of a row i is sum_j w_ij s_j^beta d_ij / sum_j w_ij over the other rows j, with d = 1 - cosine,
            w_ij = 1 / rank of j among them by d_ij (alpha = 1), and the density s_j = 1 / mean distance of j to its
            ``NEIGHBOURS`` nearest rows in a reference, copies aside. NovelSum is the mean over i. beta = 0.5 with a
            reference; 0 without, as the authors advise where none is at hand: density is then left out, and values
            with and without do not compare. None of one row.
        cluster_entropy: Entropy of the sizes of isqrt(s) clusters (k-means) of the s rows in the sample, over that of
            clusters of one size, from 0 to 1 (semantic entropy, Han et al. 2022, arXiv 2210.05725; Partition Entropy in
            Yang et al.). None of fewer than four rows.
    """

    rows: int
    vendi_1: float
    vendi_2: float
    vendi_inf: float
    cosine_distance: float | None
    sampled: int
    nearest_cosine: float | None
    tenth_cosine: float | None
    near_duplicates: float | None
    novel_sum: float | None
    cluster_entropy: float | None


def measures(
    blocks: Iterable[Features],
    *,
    sample: int = SAMPLE,
    near: float = 0.95,
    reference: Features | None = None,
    seed: int = 0,
) -> Measures:
    """All measures of features that come in blocks, such as the files of a table, read once.

    Vendi scores and the mean distance are of all rows. The rest is of a sample without replacement: all rows where
    there are no more, else one that depends on the seed and the order of rows, and not on the blocks. Memory: a block,
    3 D^2 numbers of float64 and twice the sample. Time: 2 n D^2 operations, and those of an eigendecomposition of order
    min(n, D).

    Args:
        blocks: (b, D) each, together (n, D): rows of unit norm, of float16, float32 or float64; or of int8 and any
            norm.
        sample: The most rows of which pairs are looked at.
        near: The cosine from which on two rows are near duplicates.
        reference: (r, D) rows, more than ``NEIGHBOURS`` distinct ones, by which NovelSum tells density: those of a
            large pool that stands for what there is to know.
        seed: Of the sample and the clusters.

    Raises:
        UserError: No rows, rows that are not finite and of unit norm, blocks of different dimensions, or a number out
            of range.
    """
    if sample < 2:
        raise UserError(f"a sample of {sample} rows has no pairs: give at least 2")
    random = np.random.default_rng(checked_seed("the seed", seed))
    spectrum, total = Spectrum(), torch.zeros(1, dtype=torch.float64)
    drawn, keys = torch.empty(0), np.empty(0)  # (s, D) the rows of the smallest keys, (s,)
    for features in blocks:
        block = UnitRows(features)
        if spectrum.rows and block.dimension != drawn.shape[1]:
            raise UserError(f"features have {drawn.shape[1]} and {block.dimension} dimensions: give those of one kind")
        for start in range(0, len(block), _BLOCK):
            rows = block.take(slice(start, start + _BLOCK), torch.float32)  # (b, D)
            spectrum.add(rows)
            total = total + rows.sum(0, dtype=torch.float64)  # (D,)
            keys = np.concatenate([keys, random.random(len(rows))])
            kept = np.sort(np.argsort(keys)[:sample])
            drawn, keys = torch.cat([drawn.reshape(-1, block.dimension), rows])[torch.from_numpy(kept)], keys[kept]
    if not (n := spectrum.rows):
        raise UserError("there are no rows to measure: give at least one")
    eigenvalues = spectrum.eigenvalues
    nearest, tenth, duplicates, novelty = _pairs(drawn, near, reference)
    return Measures(
        rows=n,
        vendi_1=vendi_score(eigenvalues),
        vendi_2=vendi_score(eigenvalues, 2.0),
        vendi_inf=vendi_score(eigenvalues, math.inf),
        cosine_distance=1.0 - (float(total @ total) - n) / (n * (n - 1)) if n > 1 else None,
        sampled=len(drawn),
        nearest_cosine=nearest,
        tenth_cosine=tenth,
        near_duplicates=duplicates,
        novel_sum=novelty,
        cluster_entropy=_cluster_entropy(drawn, seed),
    )


def _pairs(rows: Tensor, near: float, reference: Features | None) -> tuple[float | None, ...]:
    """Of (s, D) rows: the nearest's cosine, the tenth's, the share with a near duplicate, NovelSum."""
    count = len(rows)
    if count < 2:
        return None, None, None, None
    density = _density(rows, reference)  # (s,)
    weights = 1.0 / torch.arange(1, count, dtype=torch.float64)  # (s - 1,), of the nearest first
    neighbours, novelty = [], 0.0
    for start in range(0, count, _PAIRS):
        cosines = (rows[start : start + _PAIRS] @ rows.T).clamp_(max=1.0)  # (b, s)
        cosines.diagonal(start).fill_(-math.inf)  # a row is no neighbour of its own
        ordered, others = (found[:, :-1] for found in cosines.sort(1, descending=True))  # (b, s - 1)
        neighbours.append(ordered[:, :NEIGHBOURS])
        novelty += float(((1.0 - ordered) * density[others] @ weights).sum())
    nearest = torch.cat(neighbours).double()  # (s, 10), or as many as there are
    return (
        float(nearest[:, 0].mean()),
        float(nearest[:, -1].mean()) if count > NEIGHBOURS else None,
        float((nearest[:, 0] >= near).double().mean()),
        novelty / count / float(weights.sum()),
    )


def _density(rows: Tensor, reference: Features | None) -> Tensor:
    """NovelSum's sigma^beta: (s, D) -> (s,) float64."""
    if reference is None:
        return torch.ones(len(rows), dtype=torch.float64)
    others = unit_rows(np.unique(np.asarray(reference), axis=0)).float()  # (r, D)
    if others.shape[1] != rows.shape[1] or len(others) <= NEIGHBOURS:
        raise UserError(
            f"the reference has {len(others)} distinct rows of {others.shape[1]} dimensions: give more than"
            f" {NEIGHBOURS} of {rows.shape[1]}"
        )
    distances = []
    for block in rows.split(_PAIRS):
        cosines = block @ others.T  # (b, r)
        distances.append(1.0 - cosines.masked_fill_(cosines > COPY, -math.inf).topk(NEIGHBOURS).values.mean(1))
    return torch.cat(distances).double().rsqrt_()


def _cluster_entropy(rows: Tensor, seed: int) -> float | None:
    from sklearn.cluster import MiniBatchKMeans
    from sklearn.exceptions import ConvergenceWarning

    if (clusters := math.isqrt(len(rows))) < 2:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct rows than clusters
        labels = MiniBatchKMeans(clusters, random_state=seed, n_init=3).fit_predict(rows.numpy(force=True))  # (s,)
    return float(entropy(np.bincount(labels)) / math.log(clusters))
