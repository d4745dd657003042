"""Which gamma: ``python tests/benchmarks/gamma.py TABLE ...``, each a table of features (a run's folder, or Parquet).

For each table, at several gammas around ``median_gamma``'s: the log gains of greedy's picks along the budget; what is
left of the log det of greedy by each gamma where another gamma's kernel judges (the largest loss over the gammas, as a
share); the share of picks that two selections by the halves of the coordinates have in common, which are independent
projections of gradients. Beside them, the gammas that other rules choose. Then what quality weights do at each gamma:
the mean quality and the share kept of greedy's gain in log det over random subsets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import numpy as np
from printed import machine, table
from scipy.optimize import brentq

from raydpp import greedy_map
from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.dpp.objective import standardise
from raydpp.dpp.scale import median_gamma, residual_spread
from raydpp.tables import open_table, vectors

TIMES = (1 / 8, 1 / 4, 1 / 2, 1, 2)
WEIGHTS = (0.1, 0.3, 0.5, 0.7, 0.9)
DRAWS = 3


def log_det(rows: UnitRows, picks: Sequence[int] | np.ndarray, gamma: float) -> float:
    return float(np.sum(ordered_log_gains(rows, list(picks), Kernel(gamma=gamma))))


def last_gain_rule(features: np.ndarray, size: int, target: float) -> float:
    """The gamma at which the last pick's log gain is ``target`` (the paper's authors: where it falls below -7)."""

    def excess(log_gamma: float) -> float:
        found = greedy_map(features, size, gamma=math.exp(log_gamma))
        return (found.log_gains[-1] if len(found.log_gains) == size else -25.0) - target

    return math.exp(brentq(excess, math.log(1e-5), math.log(10.0), xtol=0.05))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print three tables for each table of features."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", help="folders of raydpp extract, or Parquet files")
    parser.add_argument("--rows", type=int, default=3_000, help="of a table, drawn at random (3,000)")
    parser.add_argument("--size", type=int, default=200, help="how many are picked (200)")
    parser.add_argument("--feature-column", default="gradient", help="of Parquet files")
    options = parser.parse_args(arguments)
    print(f"{machine('torch')}\n")
    for url in options.tables:
        opened = open_table(url, options.feature_column)
        one_of = opened.read(opened.parts, [name for name in ["response_tokens"] if opened.has(name)])
        random = np.random.default_rng(0)
        kept = np.sort(random.permutation(len(one_of))[: options.rows])
        features = vectors(one_of[opened.column])[kept]  # (n, D)
        lengths = one_of["response_tokens"].to_numpy()[kept] if opened.has("response_tokens") else None
        rows, size = UnitRows(features), options.size
        auto = median_gamma(features[random.permutation(len(features))])
        gammas = [float(f"{auto * times:.2g}") for times in TIMES]
        print(f"{url}: {len(features):,} x {features.shape[1]:,}, {size} picks; auto is {auto:g}\n")
        found = {gamma: greedy_map(features, size, gamma=gamma) for gamma in gammas}
        best = {gamma: one.log_det for gamma, one in found.items()}
        places = [10, size // 4, size // 2, size]
        halves = [half / np.linalg.norm(half, axis=1, keepdims=True) for half in np.split(rows.take().numpy(), 2, 1)]
        lines = []
        for gamma, one in found.items():
            losses = [(best[other] - log_det(rows, one.indices, other)) / abs(best[other]) for other in gammas]
            picks = [set(greedy_map(half, size, gamma=gamma).indices.tolist()) for half in halves]
            gains = [f"{one.log_gains[place - 1]:.4f}" for place in places]
            shared = f"{len(picks[0] & picks[1]) / size:.0%}"
            lines.append([f"{gamma:g}{' (auto)' * (gamma == auto)}", *gains, f"{max(losses):.2%}", shared])
        table(["gamma", *(f"log gain {place}" for place in places), "largest loss", "halves share"], lines)
        rules = {f"last log gain {target:g}": last_gain_rule(features, size, target) for target in (-7.0, -1.0, -0.2)}
        print("other rules: " + ", ".join(f"{name} gives {gamma:.3g}" for name, gamma in rules.items()) + "\n")
        if lengths is None:
            continue
        quality = standardise(lengths)
        top = np.sort(quality)[-size:].mean()
        lines = []
        for gamma in gammas:
            chance = np.mean([log_det(rows, random.permutation(len(features))[:size], gamma) for _ in range(DRAWS)])
            for scale, said in ((residual_spread(features, size, Kernel(gamma=gamma)), "spread"), (1.0, "1 nat")):
                cells = []
                for weight in WEIGHTS:
                    one = greedy_map(features, size, gamma=gamma, quality=quality * scale, quality_weight=weight)
                    kept_gain = (one.log_det - chance) / (best[gamma] - chance)
                    cells.append(f"{quality[one.indices].mean() / top:.0%}, {kept_gain:.0%}")
                lines.append([f"{gamma:g}", said, *cells])
        table(["gamma", "a score of 1 is", *(f"w = {weight:g}" for weight in WEIGHTS)], lines)


if __name__ == "__main__":
    main()
