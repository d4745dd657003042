"""The training sets of the study: what each method takes of a pool, at a budget of examples or of response tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from raydpp import greedy_map
from raydpp.dpp import BaselineName
from raydpp.dpp.baselines import baseline
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import standardise
from raydpp.dpp.scale import median_gamma, residual_spread

from .data import Study

Picks = np.ndarray
"""Indices into a pool, in the order of picking: (m,)."""

SIZE = 180
"""Examples of a training set; a budget of tokens is what as many random ones have on average."""

DRAWS = 6
"""Random training sets of each pool and budget."""

_MOST = 600  # picks of which the first that a budget of tokens allows are taken


def selections(study: Study, pool: list[str], tokens: bool) -> dict[str, list[str]]:
    """By method (``random 0``, ...), the ids that it takes of the pool, in its order."""
    rows = study.rows.loc[pool]
    lengths = rows.response_tokens.to_numpy().astype(np.float64)  # (n,)
    norms = study.scores.gradient_norm.loc[pool].to_numpy().astype(np.float64)
    features = {space: study.vectors(space, pool) for space in study.features}  # (n, D) each
    gamma = {space: median_gamma(found) for space, found in features.items()}
    targets = [study.vectors("gradient", study.ids("target", source)) for source in study.sources]  # (t, D) each
    aims = np.stack([rows.mean(axis=0) / np.linalg.norm(rows.mean(axis=0)) for rows in targets])  # (sources, D)
    near = (features["gradient"] @ aims.T).max(axis=1)  # (n,) as --target scores
    sources, shares = rows.source.to_numpy(), rows.source.value_counts() / len(rows)
    most = float(round(SIZE * lengths.mean()))
    budget: Any = {"tokens": most, "costs": lengths} if tokens else {"size": SIZE}

    def dpp(space: str = "gradient", gamma_: float | None = None, **more: Any) -> Picks:
        own = {"gamma": gamma_ or gamma[space], "ids": pool, **more}
        if not tokens:
            return greedy_map(features[space], SIZE, **own).indices
        # what a pick costs counts against the budget alone, not in the choice
        found = greedy_map(features[space], _MOST, **own).indices
        return found[np.cumsum(lengths[found]) <= most]

    def other(method: BaselineName, space: str = "gradient", **more: Any) -> Picks:
        return baseline(method, features[space], gamma=gamma[space], ids=pool, **budget, **more).indices

    def good(scores: np.ndarray, weight: float) -> Picks:
        unit = residual_spread(features["gradient"], SIZE, Kernel(gamma=gamma["gradient"]))
        return dpp(quality=standardise(scores), quality_weight=weight, quality_unit=unit)

    def per_source(share_of: float) -> Picks:
        least = {source: int(share_of * SIZE * share) for source, share in shares.items()}
        return dpp(sources=sources, minimum=least)

    methods: dict[str, Callable[[], Picks]] = {
        **{f"random {draw}": partial(other, "random", seed=draw) for draw in range(DRAWS)},
        "DPP": dpp,
        "DPP, gamma 0.25": partial(dpp, gamma_=0.25),
        "DPP, length": lambda: good(lengths, 0.5),
        "DPP, aimed": lambda: good(near, 0.5),
        "aimed alone (LESS)": partial(other, "quality", quality=near),
        "round-robin (RDS+)": partial(other, "round-robin", targets=targets),
        "DPP, embeddings": partial(dpp, "embedding"),
        "length": partial(other, "length", lengths=lengths),
        "low gradient norm": partial(other, "quality", quality=-norms),
        "k-center": partial(other, "k-center"),
        "facility location": partial(other, "facility-location"),
        "de-duplication": partial(other, "dedup", "embedding", threshold=_half_left(features["embedding"])),
    }
    if tokens:
        methods["DPP per token"] = lambda: (
            greedy_map(features["gradient"], gamma=gamma["gradient"], ids=pool, **budget).indices
        )
    else:  # every source has at least half of its share in the pool, or all of it
        methods |= {"DPP, half shares": partial(per_source, 0.5), "DPP, shares": partial(per_source, 1.0)}
    return {name: [pool[n] for n in pick()] for name, pick in methods.items()}


def _half_left(features: np.ndarray) -> float:
    """The threshold at which semantic de-duplication leaves about half of the rows."""
    low, high = 0.0, 1.0
    while high - low > 0.01:
        middle = (low + high) / 2
        left = len(baseline("dedup", features, len(features), threshold=middle).indices)
        low, high = (middle, high) if left < len(features) / 2 else (low, middle)
    return high
