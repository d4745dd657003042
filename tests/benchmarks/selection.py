"""Time greedy MAP against its peers, in one run: ``python tests/benchmarks/selection.py --help``.

Peers: the textbook form (Chen et al. 2018) in float32 NumPy, written below, and pyversity (``pip install pyversity``).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import platform
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from printed import table
from torch.utils._python_dispatch import TorchDispatchMode

import raydpp
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.oracles.choice import choose_oracle

FEATURES = Path(__file__).resolve().parents[3] / "shared/features/minilm_32k.parquet"
PARTS = ("speed", "dimensions", "agreement", "memory", "growth", "rate")


def load(path: Path, column: str) -> np.ndarray:
    """(N, D) float32 rows of unit norm: a Parquet file's, or as many of planted clusters where there is none."""
    if path.exists():
        stored = pq.read_table(path, columns=[column])[column].combine_chunks()
        x = stored.flatten().to_numpy(zero_copy_only=False).reshape(len(stored), -1).astype(np.float32)
    else:
        random = np.random.default_rng(0)
        x = random.standard_normal((300, 384))[random.integers(0, 300, 32_474)] + random.standard_normal((32_474, 384))
        x = x.astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def some_rows(x: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many rows; beyond their number copies with noise."""
    if count <= len(x):
        return x[random.permutation(len(x))[:count]]
    some = np.resize(x, (count, x.shape[1])).copy()
    some += 0.3 * random.standard_normal(some.shape, dtype=np.float32) / np.sqrt(x.shape[1])
    return some / np.linalg.norm(some, axis=1, keepdims=True)


def textbook(x: np.ndarray, size: int, kernel: str, gamma: float = 1.0, ridge: float = 0.1) -> list[int]:
    """Fast greedy MAP as it is published: one Cholesky row of all items a pick, in the features' type."""
    n = len(x)
    rows = np.zeros((size, n), dtype=x.dtype)
    diagonal = 1.0 if kernel == "rbf" else 1.0 + ridge
    residuals = np.full(n, diagonal, dtype=x.dtype)
    picks: list[int] = []
    for step in range(size):
        j = int(residuals.argmax())
        column = x @ x[j]
        if kernel == "rbf":
            column = np.exp(2.0 * gamma * (column - 1.0))
        column[j] = diagonal
        row = (column - rows[:step, j] @ rows[:step]) / np.sqrt(residuals[j])
        rows[step] = row
        residuals -= row * row
        residuals[j] = -np.inf
        picks.append(j)
    return picks


def seconds(run: Callable[..., Any], *arguments: Any, repeats: int = 1, **options: Any) -> float:
    """The best time of some runs."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(*arguments, **options)
        times.append(time.perf_counter() - start)
    return min(times)


def speed(x: np.ndarray, options: argparse.Namespace) -> Any:
    """Ratios to the peers."""
    rows, found = [], []
    cases = [("rbf", options.sizes[0]), ("rbf", options.sizes[1]), ("cosine", options.sizes[0])]
    for kernel, size in cases:
        peer = seconds(textbook, x, size, kernel)
        ours = seconds(raydpp.greedy_map, x, size, kernel=kernel, repeats=options.repeats)
        found.append({"kernel": kernel, "size": size, "textbook": peer, "raydpp": ours, "ratio": peer / ours})
        rows.append((kernel, f"{size:,}", f"{peer:.1f} s", f"{ours:.2f} s", f"{peer / ours:.1f}x"))
    table(("kernel", "M", "textbook, float32 NumPy", "raydpp", "ratio"), rows)
    small, large = options.sizes[0], 4 * options.sizes[0]
    times = [seconds(raydpp.greedy_map, x, m, kernel="cosine", repeats=options.repeats) for m in (small, large)]
    found.append({"kernel": "cosine", "sizes": [small, large], "raydpp": times})
    print(f"cosine, M = {large:,}: {times[1]:.2f} s, {times[1] / times[0]:.2f}x the time of M = {small:,}\n")
    if importlib.util.find_spec("pyversity") is None:
        print("pyversity is not installed: pip install pyversity\n")
        return found
    from pyversity import Strategy, diversify

    size = min(x.shape[1], len(x))

    def theirs() -> Any:
        scores = np.ones(len(x), dtype=np.float32)
        return diversify(embeddings=x, scores=scores, k=size, strategy=Strategy.DPP, diversity=1.0)

    peer = seconds(theirs)
    ours = seconds(raydpp.greedy_map, x, size, kernel="cosine", repeats=options.repeats)
    found.append({"kernel": "cosine", "size": size, "pyversity": peer, "raydpp": ours})
    print(
        f"pyversity {version('pyversity')}, cosine, k = D = {size} (its kernel has no more rank): {peer:.2f} s,"
        f" raydpp {ours:.2f} s, {peer / ours:.1f}x\n"
    )
    return found


def dimensions(x: np.ndarray, options: argparse.Namespace) -> Any:
    """Seconds at large D: the features' geometry in as many dimensions, with noise, as whole numbers."""
    random = np.random.default_rng(0)
    x, found, rows = some_rows(x, min(len(x), options.rows or 16_000), random), [], []
    for dimension in options.dimensions:
        y = x @ random.standard_normal((x.shape[1], dimension), dtype=np.float32)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        y = 0.6 * y + 0.8 * random.standard_normal(y.shape, dtype=np.float32) / np.sqrt(dimension)
        y /= np.linalg.norm(y, axis=1, keepdims=True)
        stored = np.rint(y * (2 * np.sqrt(dimension))).clip(-127, 127).astype(np.int8)
        for size in (options.sizes[0] // 4, options.sizes[0] // 2):
            one: dict[str, Any] = {"D": dimension, "M": size, "textbook": seconds(textbook, y, size, "rbf")}
            for kernel, oracle in (("rbf", "cholesky"), ("cosine", "cholesky"), ("cosine", "feature-space")):
                name = f"{kernel}, {oracle}"
                one[name] = seconds(raydpp.greedy_map, stored, size, kernel=kernel, oracle=oracle)
            one["auto"] = choose_oracle("auto", Kernel("cosine"), len(stored), dimension, size)
            found.append(one)
            timed = [value for value in one.values() if isinstance(value, float)]
            ratio = f"{timed[0] / timed[1]:.1f}x"
            rows.append((f"{dimension:,}", f"{size:,}", *(f"{value:.1f} s" for value in timed), ratio, one["auto"]))
    headings = ("D", "M", "textbook, rbf, float32", "rbf", "cosine, cholesky", "cosine, feature-space", "rbf: ratio")
    print(f"N = {len(x):,}; whole numbers in int8\n")
    table((*headings, "cosine: chosen"), rows)
    return found


def agreement(x: np.ndarray, options: argparse.Namespace) -> Any:
    """Whether all oracles make the same picks."""
    rows, found = [], []
    size = options.agreement_size
    cases: list[tuple[str, dict[str, Any]]] = [
        *((f"rbf, gamma {gamma:g}", {"gamma": gamma}) for gamma in (0.2, 1.0, 3.0)),
        ("cosine, ridge 0.1", {"kernel": "cosine"}),
    ]
    for name, arguments in cases:
        exact = raydpp.greedy_map(x, size, oracle="textbook", **arguments)
        for oracle in ("cholesky", "feature-space") if "kernel" in arguments else ("cholesky",):
            other = raydpp.greedy_map(x, size, oracle=oracle, **arguments)
            same = exact.indices == other.indices
            verdict = "identical" if same.all() else f"differ from pick {int(same.argmin()) + 1}"
            off = abs(other.log_det / exact.log_det - 1)
            found.append({"case": name, "oracle": oracle, "picks": verdict, "log_det_relative": off})
            rows.append((name, oracle, verdict, f"{exact.log_det:.6f}", f"{off:.1e}"))
    table(("kernel", "oracle", f"{size:,} picks, beside the textbook's in float64", "log det", "relative"), rows)
    return found


def memory(x: np.ndarray, options: argparse.Namespace) -> Any:
    """Peak memory, each case in a process of its own that has warmed up on a small problem."""
    rows, found = [], []
    context = multiprocessing.get_context("spawn")
    small, large = options.sizes
    for kernel, n, size in (
        ("rbf", len(x), small),
        ("rbf", len(x), large),
        ("cosine", len(x), 4 * small),
        ("cosine", options.growth_rows[-1], small),
    ):
        with context.Pool(1) as pool:
            grown = pool.apply(_peak, (str(options.features), options.column, kernel, size, n))
        features = n * x.shape[1] * 4
        if kernel == "rbf":
            unit, what = n * size * 4, "N x M float32"
        else:
            unit, what = features, "the features in float32"
        total = grown if kernel == "rbf" else grown + features
        found.append({"kernel": kernel, "rows": n, "size": size, "bytes": total, "ratio": total / unit})
        rows.append((kernel, f"{n:,}", f"{size:,}", f"{total / 2**20:,.0f} MiB", f"{total / unit:.2f} x {what}"))
    table(("kernel", "N", "M", "peak", "as a multiple"), rows)
    return found


def _peak(path: str, column: str, kernel: Any, size: int, rows: int) -> int:
    x = some_rows(load(Path(path), column), rows, np.random.default_rng(0))
    raydpp.greedy_map(x[:3000], 300, kernel=kernel, oracle="cholesky" if kernel == "rbf" else "feature-space")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again, from what is resident now
    before = _peak_resident()
    raydpp.greedy_map(x, size, kernel=kernel)
    return _peak_resident() - before


def _peak_resident() -> int:
    """Bytes; Linux. Unlike ru_maxrss it knows nothing of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def growth(x: np.ndarray, options: argparse.Namespace) -> Any:
    """Seconds against N and M; beyond the features' number by copies with noise."""
    found: dict[str, dict[str, float]] = {}
    random = np.random.default_rng(0)
    for kernel in ("rbf", "cosine"):
        rows = []
        for n in options.growth_rows:
            some = some_rows(x, n, random)
            cells = [f"{n:,}"]
            for size in options.growth_sizes:
                if size > n or n * size > options.most:
                    cells.append("-")
                    continue
                taken = seconds(raydpp.greedy_map, some, size, kernel=kernel)
                found.setdefault(kernel, {})[f"{n} {size}"] = taken
                cells.append(f"{taken:.1f}")
            rows.append(tuple(cells))
        table((f"{kernel}: N, seconds for M =", *(f"{m:,}" for m in options.growth_sizes)), rows)
    return found


def rate(x: np.ndarray, options: argparse.Namespace) -> Any:
    """How much of the machine's matrix-product rate the Cholesky oracle reaches."""
    rates = {}
    for dtype, n in ((torch.float32, 4096), (torch.float64, 2048)):
        a = torch.randn(n, n, dtype=dtype)
        rates[str(dtype)] = 2 * n**3 / seconds(torch.mm, a, a, repeats=5)
    rows, found = [], []
    for size in options.sizes:
        with _Products() as products:
            raydpp.greedy_map(x, size, oracle="cholesky")
        done = products.flop
        taken = seconds(raydpp.greedy_map, x, size, oracle="cholesky", repeats=options.repeats)
        share = done / taken / rates["torch.float32"]
        textbook_rate = len(x) * size**2 / taken
        found.append({"size": size, "flop": done, "seconds": taken, "share": share, "rates": rates})
        rows.append(
            (
                f"{size:,}",
                f"{done / 1e9:,.0f}",
                f"{done / taken / 1e9:.0f}",
                f"{share:.0%}",
                f"{textbook_rate / 1e9:.0f}",
            )
        )
    single, double = (value / 1e9 for value in rates.values())
    print(f"this machine's matrix products: {single:.0f} GFLOP/s in float32, {double:.0f} in float64")
    headings = ("M", "GFLOP in matrix products", "GFLOP/s", "of the float32 rate", "N M^2 / seconds, GFLOP/s")
    table(headings, rows)
    return found


class _Products(TorchDispatchMode):
    """Counts the floating-point operations of matrix products, those in place among them."""

    def __init__(self) -> None:
        super().__init__()
        self.flop = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        if name.startswith(("aten.mm.", "aten.addmm")):
            left, right = args[-2:]
            self.flop += 2 * left.shape[0] * left.shape[1] * right.shape[1]
        return function(*args, **(kwargs or {}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--features", type=Path, default=FEATURES, help="Parquet file with a column of features")
    parser.add_argument("--column", default="embedding", help="the column, a fixed-size list of numbers")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="what to measure")
    parser.add_argument("--repeats", type=int, default=2, help="runs of raydpp, of which the best counts")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--out", type=Path, help="JSON file for all numbers")
    options = parser.parse_args()
    options.rows, options.sizes, options.agreement_size = None, (4000, 8000), 2000
    options.dimensions = (1024, 4096, 8192)
    options.growth_rows, options.growth_sizes, options.most = (
        (8000, 16_000, 32_474, 250_000),
        (1000, 2000, 4000, 8000),
        6e8,
    )
    if options.quick:
        options.rows, options.sizes, options.agreement_size = 4000, (400, 800), 300
        options.dimensions = (1024, 2048)
        options.growth_rows, options.growth_sizes = (1000, 2000, 8000), (200, 400)
    x = load(options.features, options.column)[: options.rows]
    name = options.features.name if options.features.exists() else f"synthetic (there is no {options.features})"
    print(f"features: {name}, {x.shape[0]:,} x {x.shape[1]}\n")
    raydpp.greedy_map(x[:2000], 200, oracle="cholesky")  # warms up
    parts = {
        "speed": speed,
        "dimensions": dimensions,
        "agreement": agreement,
        "memory": memory,
        "growth": growth,
        "rate": rate,
    }
    found: dict[str, Any] = {}
    for name in options.parts:
        print(f"### {name}\n")
        found[name] = parts[name](x, options)
    names = ("raydpp", "torch", "numpy") + (("pyversity",) if importlib.util.find_spec("pyversity") else ())
    versions = ", ".join(f"{name} {raydpp.__version__ if name == 'raydpp' else version(name)}" for name in names)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads; {versions}")
    if options.out:
        options.out.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
