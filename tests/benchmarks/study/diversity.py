"""Whether measures of diversity order sets as they were made: sources mixed, rows copied, rows nearly copied."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import partial

import numpy as np
from scipy.stats import kendalltau

from raydpp.diversity.distance import distance_from_curves, log_det_curve, reference_curves
from raydpp.diversity.measures import measures
from raydpp.dpp.kernels import Kernel
from tests.benchmarks.printed import table

from .data import COPIES, SET, Study, mixed

_GROUPS = 8  # of the jackknife
_SEEDS = range(5)  # of the reference points


def sets(study: Study) -> dict[str, list[str]]:
    """By name, the ids of sets of ``SET`` rows each."""
    named = {source: study.ids("pool", source, SET) for source in study.sources}
    rows = mixed(study.rows)
    near = study.copies.sort_values("number").reset_index().set_index(["copy_of", "number"])["id"]
    found = {**named, "mixed": rows}
    for copies in COPIES:
        few = rows[: SET // (copies + 1)]
        found[f"exact copies x {copies}"] = few * (copies + 1)
        found[f"near copies x {copies}"] = few + [near[one, number + 1] for number in range(copies) for one in few]
    return found


def mixtures(study: Study) -> dict[frozenset[str], list[str]]:
    """By combination of sources, the ids of a set with as many rows of each."""
    return {
        frozenset(some): [one for source in some for one in study.ids("pool", source, -(-SET // count))][:SET]
        for count in range(1, len(study.sources) + 1)
        for some in itertools.combinations(study.sources, count)
    }


def distance(features: np.ndarray, references: np.ndarray, drop_below: float | None = None) -> float:
    """Log-det distance of all (n, D) rows at gamma 1, in nats per example; (seeds, n or more) reference curves."""
    curve = log_det_curve(features, Kernel())[None]
    return distance_from_curves(curve, references, subset="uniform", kernel=Kernel(), drop_below=drop_below).mean


def jackknife(measure: Callable[[np.ndarray], float], features: np.ndarray) -> float:
    """The standard error of a measure over groups of rows left out (Efron & Tibshirani 1993, section 11.5)."""
    group = np.arange(len(features)) % _GROUPS
    found = np.array([measure(features[group != one]) for one in range(_GROUPS)])
    return float(np.sqrt((_GROUPS - 1) * found.var()))


def report(study: Study) -> None:
    """Print, for each space: the distance of each set, and how measures order sets of known order."""
    named = sets(study)
    kinds = {
        f"{kind} copies": [named["mixed"], *(named[f"{kind} copies x {n}"] for n in COPIES)]
        for kind in ("exact", "near")
    }
    for space in study.features:
        references = reference_curves(SET, study.features[space].shape[1], Kernel(), list(_SEEDS))  # (seeds, SET)
        ldd = partial(distance, references=references)
        print(f"\n{space}: log-det distance of {SET} rows at gamma 1 (jackknife error), Vendi score\n")
        lines = []
        for name, ids in named.items():
            features = study.vectors(space, ids)
            cells = [f"{ldd(features):.4f} ± {jackknife(ldd, features):.4f}", f"{measures([features]).vendi_1:.1f}"]
            lines.append([name, *cells])
        table(["set", "distance", "Vendi"], lines)
        print(
            f"{space}: share of mixtures more diverse than what they mix (the mean over those without one of their"
            " sources); Kendall's tau of a measure with the share of copies taken away (1: all in order)\n"
        )
        lines = []
        for name, way in _measures(ldd).items():
            found = {some: way(study.vectors(space, ids)) for some, ids in mixtures(study).items()}
            more = [found[some] > np.mean([found[some - {one}] for one in some]) for some in found if len(some) > 1]
            taus = []
            for made in kinds.values():
                falling = [way(study.vectors(space, ids)) for ids in made]
                taus.append(f"{kendalltau(range(len(made), 0, -1), falling).statistic:.2f}")
            lines.append([name, f"{sum(more)} of {len(more)}", *taus])
        table(["measure", "mixtures", *kinds], lines)


def _measures(ldd: Callable[..., float]) -> dict[str, Callable[[np.ndarray], float]]:
    """By name, numbers that are the larger, the more diverse (n, D) rows are."""
    return {
        "log-det distance": lambda rows: -ldd(rows),
        "log-det distance, gains below -7 left out": lambda rows: -ldd(rows, drop_below=-7.0),
        "Vendi, q = 1": lambda rows: measures([rows]).vendi_1,
        "NovelSum": lambda rows: measures([rows]).novel_sum or 0.0,
        "cosine distance": lambda rows: measures([rows]).cosine_distance or 0.0,
        "cluster entropy": lambda rows: measures([rows]).cluster_entropy or 0.0,
    }
