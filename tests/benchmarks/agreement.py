"""How well the kernels of two gradient tables agree: ``python tests/benchmarks/agreement.py A B``.

A and B are output folders of ``raydpp extract`` over the same corpus; the examples that both have count. The selection
from B is judged by its log det under the kernel of A, beside those of the selection from A and of random subsets.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from printed import machine, table
from scipy.stats import pearsonr, spearmanr

import raydpp
from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.tables import open_table, vectors


def rows_of(folder: str, source: str | None) -> pa.Table:
    """A gradient table's rows, of one source or all, in the order of their ids."""
    found = open_table(folder, "gradient")
    rows = found.read(found.parts)
    return rows if source is None else rows.filter(pc.equal(rows["source"], source))


def cosines(rows: UnitRows) -> np.ndarray:
    """(N (N - 1) / 2,) cosine similarities of all pairs."""
    x = rows.take().numpy()  # (N, D)
    return (x @ x.T)[np.triu_indices(len(x), 1)]


def log_det(rows: UnitRows, picks: np.ndarray, kernel: Kernel) -> float:
    return sum(ordered_log_gains(rows, picks.tolist(), kernel))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("a", help="the table that B is judged by")
    parser.add_argument("b", help="the table that is judged")
    parser.add_argument("--source", help="only the examples of this source")
    parser.add_argument("--gamma", type=float, default=1.0, help="of the rbf kernel (1)")
    parser.add_argument(
        "--fractions", type=float, nargs="+", default=[0.1, 0.25], help="sizes of selections (0.1 0.25)"
    )
    parser.add_argument("--draws", type=int, default=20, help="random subsets of each size (20)")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args()
    kernel, random = Kernel("rbf", options.gamma), np.random.default_rng(0)

    tables = {"A": rows_of(options.a, options.source), "B": rows_of(options.b, options.source)}
    ids = np.intersect1d(*(rows["id"].to_numpy(zero_copy_only=False) for rows in tables.values()))
    both = {name: rows.filter(pc.is_in(rows["id"], pa.array(ids))) for name, rows in tables.items()}
    points = {name: UnitRows(vectors(rows["gradient"])) for name, rows in both.items()}
    pairs = {name: cosines(rows) for name, rows in points.items()}
    found: dict[str, Any] = {name: _facts(tables[name], both[name], pairs[name]) for name in tables}
    print(f"A = {options.a}, B = {options.b}: {len(ids):,} examples in both\n")
    facts = [(name, *(f"{value:,.4g}" for value in found[name].values())) for name in tables]
    table(("table", *found["A"]), facts)
    found["pearson"] = float(pearsonr(pairs["A"], pairs["B"]).statistic)
    found["spearman"] = float(spearmanr(pairs["A"], pairs["B"]).statistic)
    print(f"cosines of all pairs: Pearson {found['pearson']:.4f}, Spearman {found['spearman']:.4f}\n")

    rows = []
    found["selections"] = []
    for fraction in options.fractions:
        size = round(fraction * len(ids))
        a, b = (raydpp.greedy_map(vectors(both[name]["gradient"]), size, gamma=options.gamma).indices for name in "AB")
        draws = [log_det(points["A"], random.permutation(len(ids))[:size], kernel) for _ in range(options.draws)]
        own, other, chance = log_det(points["A"], a, kernel), log_det(points["A"], b, kernel), float(np.mean(draws))
        one = {
            "size": size,
            "overlap": len(np.intersect1d(a, b)) / size,
            "overlap of random sets": size / len(ids),
            "log det, A's": own,
            "B's": other,
            "random, best": max(draws),
            "random, mean": chance,
            "of A's gain over random": (other - chance) / (own - chance),
        }
        found["selections"].append(one)
        values = list(one.values())
        shares = f"{values[1]:.1%}", f"{values[2]:.1%}"
        rows.append((f"{size:,}", *shares, *(f"{value:.2f}" for value in values[3:7]), f"{values[7]:.1%}"))
    table(list(found["selections"][0]), rows)
    print(machine("torch", "numpy", "scipy"))
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


def _facts(whole: pa.Table, rows: pa.Table, pairs: np.ndarray) -> dict[str, float]:
    return {
        "examples": len(whole),
        "in both": len(rows),
        "median gradient norm": float(np.median(rows["gradient_norm"].to_numpy())),
        "median response tokens": float(np.median(rows["response_tokens"].to_numpy())),
        "mean cosine": float(pairs.mean()),
        "deviation of cosines": float(pairs.std()),
    }


if __name__ == "__main__":
    main()
