"""Measure selection beyond one machine, in one run: ``python tests/benchmarks/distributed.py --help``.

Parts: ``loss``, what partition-and-merge loses against exact greedy, by partitions and oversample; ``million``, both
modes over a large table of planted clusters and copies, with memory; ``scaling``, from one worker to two.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
from printed import machine, table
from selection import FEATURES, load

from raydpp.dpp.budget import Budget
from raydpp.dpp.kernels import Kernel
from raydpp.dpp.objective import Objective
from raydpp.select.plan import merge_levels
from raydpp.select.request import Request, select_rows
from raydpp.storage import Folder
from raydpp.tables import write_table

PARTS = ("loss", "million", "scaling")
KERNELS = {"rbf, gamma 1": Kernel("rbf", 1.0), "rbf, gamma 0.2": Kernel("rbf", 0.2), "cosine + 0.1": Kernel("cosine")}
FILES = 64


def rows_of(x: np.ndarray, seed: int = 0) -> pa.Table:
    """A gradient table of (N, D) features under ids that are a random order."""
    ids = np.random.default_rng(seed).permutation(len(x))
    features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), x.shape[1])
    return pa.table({"id": [f"{i:08x}" for i in ids], "gradient": features}).sort_by("id")


def loss(options: argparse.Namespace) -> Any:
    """Nats per pick that partition-and-merge loses."""
    rows = rows_of(load(options.features, options.column).astype(np.float16))
    found = []
    for name, kernel in KERNELS.items():
        request = Request(Budget(options.loss_size), Objective(kernel))
        exact = select_rows(rows, request)[1].log_det
        lines = []
        for count in options.partitions:
            parts = np.array_split(np.arange(len(rows)), count)
            cells = []
            for oversample in options.oversamples:
                plan = merge_levels(request, [len(part) for part in parts], oversample, 2**62)
                union = [select_rows(rows.slice(part[0], len(part)), plan[0].request)[0] for part in parts]
                got = select_rows(pa.concat_tables(union), request)[1]
                short = options.loss_size - len(got.indices)
                lost = (exact - got.log_det) / options.loss_size
                cells.append(f"{short} short" if short else f"{lost:.4f}")
                found.append({"kernel": name, "P": count, "oversample": oversample, "lost": lost, "short": short})
            lines.append((name, str(count), *cells))
        table(("kernel", "P", *(f"oversample {o:g}" for o in options.oversamples)), lines)
    return found


def planted(folder: Path, rows: int, dimension: int, files: int = FILES, seed: int = 0) -> str:
    """Write a table of unit rows in clusters of falling size, with one row in twenty a copy; float16."""
    centers = np.random.default_rng(seed).standard_normal((2_000, dimension)).astype(np.float32)
    schema = pa.schema([("id", pa.string()), ("gradient", pa.list_(pa.float16(), dimension))])
    for number, start in enumerate(range(0, rows, -(-rows // files))):
        random = np.random.default_rng((seed, number))
        count = min(-(-rows // files), rows - start)
        cluster = np.minimum(random.zipf(1.3, count), len(centers)) - 1
        spread = random.uniform(0.3, 1.5, (count, 1)).astype(np.float32)
        x = centers[cluster] + spread * random.standard_normal((count, dimension), dtype=np.float32)
        copies = random.integers(0, count, count // 20)
        x[random.integers(0, count, count // 20)] = x[copies]
        x = (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(np.float16)
        features = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), dimension)
        ids = [f"{number:04x}{i:08x}" for i in range(count)]
        write_table(Folder.at(folder), f"part-{number:05d}.parquet", pa.table([ids, features], schema=schema))
    return str(folder)


class Memory:
    """Samples the memory of this process's children, by name, and of Ray's object store, while a block runs."""

    def __init__(self) -> None:
        self.largest: dict[str, float] = {}
        self.store = 0.0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _sample(self) -> None:
        import ray

        me = psutil.Process()
        while not self._ended.wait(0.5):
            for process in (me, *me.children(recursive=True)):
                try:
                    line = process.cmdline()
                    name = "driver" if process == me else line[0] if line and line[0].startswith("ray::") else ""
                    if name:
                        size = process.memory_info().rss - process.memory_info().shared
                        self.largest[name] = max(self.largest.get(name, 0.0), size)
                except psutil.Error:
                    continue
            if ray.is_initialized():
                total = ray.cluster_resources().get("object_store_memory", 0.0)
                self.store = max(self.store, total - ray.available_resources().get("object_store_memory", total))

    def __str__(self) -> str:
        processes = sorted(((size, name) for name, size in self.largest.items()), reverse=True)[:4]
        each = ", ".join(f"{name.removeprefix('ray::')} {size / 1e9:.2f} GB" for size, name in processes)
        return f"{each}; object store {self.store / 1e9:.2f} GB"


def run(source: str, size: int, cpus: int, partitions: int, exact: bool) -> dict[str, Any]:
    """One selection through Ray on so many CPUs: seconds, memory and its record."""
    import ray

    from raydpp.select.stage import select

    ray.init(num_cpus=cpus, include_dashboard=False, log_to_driver=False, object_store_memory=3 * 2**30)
    out = tempfile.mkdtemp()
    try:
        with Memory() as memory:
            start = time.perf_counter()
            outcome = select(source, out, size, kernel="cosine", partitions=partitions, exact=exact)
            seconds = time.perf_counter() - start
        picks = pq.read_table(f"{out}/selection")["id"].to_pylist()
    finally:
        ray.shutdown()
        shutil.rmtree(out, ignore_errors=True)
    record = outcome.record
    return {
        "seconds": seconds,
        "log_det": record["log_det"],
        "rounds": record["rounds"],
        "certificate": record["certificate"],
        "parts": record["seconds"],
        "memory": dict(memory.largest),
        "store": memory.store,
        "words": str(memory),
        "picks": picks,
    }


def million(options: argparse.Namespace) -> Any:
    """Both modes over a large table."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        start = time.perf_counter()
        source = planted(Path(folder) / "rows.parquet", options.rows, options.dimension)
        print(f"{options.rows:,} x {options.dimension} float16 written in {time.perf_counter() - start:.0f} s\n")
        lines = []
        for name, exact in (("partition-and-merge", False), ("exact rounds", True)):
            one = found[name] = run(source, options.size, options.cpus, options.shards[exact], exact)
            took, rounds, log_det = f"{one['seconds']:.0f} s", str(one["rounds"] or ""), f"{one['log_det']:,.1f}"
            each = ", ".join(f"{part} {seconds:.0f} s" for part, seconds in one["parts"].items())
            lines.append((name, took, each, rounds, log_det, one["words"]))
        table(("mode", "time", "of it", "rounds", "log det", "peak memory beside what is shared"), lines)
        one, other = (found[name].pop("picks") for name in found)
        print(f"{len(set(one) & set(other)):,} of {options.size:,} picks are the same\n")
    return found


def scaling(options: argparse.Namespace) -> Any:
    """The same work on one worker and on two (strong); half the rows on one, all on two (weak)."""
    found, lines = [], []
    rows, size = options.scaling_rows, options.scaling_size
    with tempfile.TemporaryDirectory(dir=options.scratch) as folder:
        whole = planted(Path(folder) / "whole.parquet", rows, options.dimension)
        half = planted(Path(folder) / "half.parquet", rows // 2, options.dimension)
        for name, exact in (("partition-and-merge", False), ("exact rounds", True)):
            times = {
                case: run(source, size, cpus, shards, exact)["seconds"]
                for case, source, cpus, shards in (
                    ("half on one", half, 1, 1 if exact else 4),
                    ("all on one", whole, 1, 1 if exact else 8),
                    ("all on two", whole, 2, 2 if exact else 8),
                )
            }
            found.append({"mode": name, **times})
            strong, weak = times["all on one"] / times["all on two"], times["half on one"] / times["all on two"]
            lines.append((name, *(f"{t:.1f} s" for t in times.values()), f"{strong:.2f}x", f"{weak:.0%}"))
    table(("mode", "half on one", "all on one", "all on two", "strong", "weak efficiency"), lines)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--features", type=Path, default=FEATURES, help="Parquet file for the part loss")
    parser.add_argument("--column", default="embedding", help="its column with the features")
    parser.add_argument("--loss-size", type=int, default=1_000)
    parser.add_argument("--partitions", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--oversamples", type=float, nargs="+", default=[1, 1.5, 2, 3, 4, 8])
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument("--size", type=int, default=10_000)
    parser.add_argument("--shards", type=int, nargs=2, default=[16, 2], help="partitions of the two modes")
    parser.add_argument("--cpus", type=int, default=2)
    parser.add_argument("--scaling-rows", type=int, default=256_000)
    parser.add_argument("--scaling-size", type=int, default=2_000)
    parser.add_argument("--scratch", type=Path, help="a folder for the tables written; default the system's")
    parser.add_argument("--json", type=Path, help="a file for all that was measured")
    options = parser.parse_args()
    print(machine("torch", "ray", "numpy") + "\n")
    found = {part: globals()[part](options) for part in options.parts}
    if options.json:
        options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
