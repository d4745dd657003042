"""What a shortlist by a cheap representation keeps: ``python tests/benchmarks/cascade.py FULL NAME=TABLE ...``.

FULL is the table of gradients of a corpus (the output folder of ``raydpp extract``, or Parquet files), each TABLE
another representation of the same examples: embeddings, hidden states, few layers. For each, --size examples are
selected from a shortlist of --times as many, itself selected by the cheap table: log det by the full table's kernel,
as the share kept of what selecting from the full table gains over random subsets. Shortlists drawn at random stand
beside them, and the picks that the cheap table alone would make (times 1).
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import numpy as np
from printed import machine, table
from tqdm import tqdm

from raydpp import greedy_map
from raydpp.dpp.features import UnitRows
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.log_det import ordered_log_gains
from raydpp.dpp.scale import median_gamma
from raydpp.tables import open_table, vectors

DRAWS = 5


def by_id(url: str, column: str) -> dict[str, np.ndarray]:
    """The (D,) features of a table's examples."""
    opened = open_table(url, column)
    rows = opened.read(opened.parts)
    return dict(zip(rows["id"].to_pylist(), vectors(rows[opened.column]), strict=True))


def kept(
    full: np.ndarray, views: Mapping[str, np.ndarray], size: int, times: Sequence[int], gamma: float
) -> tuple[float, dict[str, list[float]]]:
    """Greedy's gain over random subsets, in nats per pick, and for each view the shares kept, one for each of times."""
    rows, kernel, count = UnitRows(full), Kernel(gamma=gamma), len(full)

    def log_det(picks: Sequence[int]) -> float:
        return float(np.sum(ordered_log_gains(rows, picks, kernel)))

    def refined(shortlist: np.ndarray) -> float:
        if len(shortlist) == size:
            return log_det(shortlist.tolist())
        return greedy_map(full[shortlist], size, gamma=gamma).log_det

    draws = [np.random.default_rng(seed).permutation(count) for seed in range(DRAWS)]
    chance = float(np.mean([log_det(draw[:size].tolist()) for draw in draws]))
    gain = greedy_map(full, size, gamma=gamma).log_det - chance
    found = {
        "at random": [float(np.mean([refined(draw[: n * size]) for draw in draws]) - chance) / gain for n in times]
    }
    for name, features in tqdm(views.items(), unit="table"):
        # A selection is nested: the largest shortlist holds all of them.
        order = greedy_map(features, min(count, max(times) * size), gamma=median_gamma(features) / 2).indices
        found[name] = [(refined(order[: n * size]) - chance) / gain for n in times]
    return gain / size, found


def main(arguments: Sequence[str] | None = None) -> None:
    """Print a row for every table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", help="the table of gradients")
    parser.add_argument("views", nargs="+", metavar="NAME=TABLE", help="cheap tables of the same examples")
    parser.add_argument("--size", type=int, default=200, help="how many examples are selected in the end")
    parser.add_argument("--times", type=int, nargs="+", default=[1, 2, 5, 10], help="shortlists, in sizes")
    parser.add_argument("--gamma", type=float, nargs="+", default=[1.0, 0.25], help="of the rbf kernel")
    parser.add_argument("--feature-column", default="gradient", help="of Parquet files")
    options = parser.parse_args(arguments)
    tables = dict(view.split("=", 1) for view in options.views)
    full = by_id(options.full, options.feature_column)
    views = {name: by_id(url, options.feature_column) for name, url in tables.items()}
    ids = sorted(set(full).intersection(*views.values()))
    print(f"{machine('torch')}\n\n{len(ids):,} examples, {options.size} are selected\n")
    for gamma in options.gamma:
        arrays = {name: np.stack([view[one] for one in ids]) for name, view in views.items()}
        gain, found = kept(np.stack([full[one] for one in ids]), arrays, options.size, options.times, gamma)
        print(f"gamma {gamma:g}: greedy gains {gain:.3f} nats per pick over random subsets; kept of it")
        rows = [[name, *(f"{share:.0%}" for share in shares)] for name, shares in found.items()]
        table(["shortlist", *(f"{n} x" if n > 1 else "no gradients" for n in options.times)], rows)


if __name__ == "__main__":
    main()
