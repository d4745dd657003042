"""Time the commands from the shell on a demo's inputs, and say where the time goes.

``python tests/benchmarks/startup.py --help``. What a command imports is what ``python -X importtime`` counts, Ray what
starting and stopping a cluster on this machine takes in a process that does nothing else (0 where a command starts
none), and work the rest.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from printed import machine, table

from raydpp.demo import write_corpus
from raydpp.errors import UserError

COMMAND = [sys.executable, "-X", "importtime", "-m", "raydpp.cli"]
RAY = "from raydpp.cluster import connect; connect()"


def seconds_of(command: list[str]) -> tuple[float, float, bool, int]:
    """The wall seconds of a command, how many of them are imports, whether it imports Ray, and its exit code."""
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wall = time.perf_counter() - start
    imports = sum(map(int, re.findall(r"^import time: +(\d+) \|", done.stderr, re.MULTILINE))) / 1e6
    if done.returncode not in (0, 2):
        sys.exit(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr[-2000:]}")
    return wall, imports, bool(re.search(r"\| +ray$", done.stderr, re.MULTILINE)), done.returncode


def write_inputs(folder: Path) -> tuple[str, str]:
    """Raw conversations, and a table of 160 random points of norm 1 in 1,024 dimensions, as float16."""
    try:
        raw = write_corpus(folder / "raw")
    except UserError:  # the package is missing: as many conversations, as short
        raw = str(folder / "raw.jsonl")
        lines = [f'{{"prompt": "What is {n} plus {n}?", "completion": "It is {2 * n}."}}\n' for n in range(2_026)]
        Path(raw).write_text("".join(lines))
    points = np.random.default_rng(0).standard_normal((160, 1_024))  # (N, D)
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    gradients = pa.FixedSizeListArray.from_arrays(pa.array(points.astype(np.float16).ravel()), 1_024)
    found = str(folder / "table.parquet")
    pq.write_table(pa.table({"id": [f"{n:03d}" for n in range(160)], "gradient": gradients}), found)
    return raw, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each command; medians are printed")
    parser.add_argument("--demo", action="store_true", help="also raydpp demo, once: it takes minutes")
    options = parser.parse_args()
    rows: list[list[str]] = []

    def measure(name: str, arguments: list[list[str]], code: int = 0) -> None:
        found = [seconds_of([*COMMAND, *more]) for more in arguments]
        if wrong := [more for more, (*_, ended) in zip(arguments, found, strict=True) if ended != code]:
            sys.exit(f"raydpp {' '.join(wrong[0])} did not end with {code}")
        wall, imports = (statistics.median(values) for values in list(zip(*found, strict=True))[:2])
        start = ray if found[0][2] else 0.0
        work = max(0.0, wall - imports - start)
        rows.append([name, *(f"{seconds:.2f}" for seconds in (wall, imports, start, work))])

    with tempfile.TemporaryDirectory(prefix="raydpp-") as name:
        folder, runs = Path(name), range(options.repeats)
        raw, points = write_inputs(folder)
        alone = [seconds_of([sys.executable, "-X", "importtime", "-c", RAY]) for _ in runs]
        ray = statistics.median(wall - imports for wall, imports, *_ in alone)
        selects = [["select", points, "--out", f"{folder}/select-{n}", "--size", "16"] for n in runs]
        measure("--help", [["--help"] for _ in runs])
        measure("select --help", [["select", "--help"] for _ in runs])
        measure("select --no-such-option", [["select", points, "--no-such-option"] for _ in runs], code=2)
        measure("select with no such table", [["select", "no", "--out", "o", "--size", "1"] for _ in runs], code=2)
        measure("ingest", [["ingest", raw, "--out", f"{folder}/ingest-{n}"] for n in runs])
        measure("select --size 16", selects)
        measure("the same select again", selects)
        measure("measure", [["measure", points, "--out", f"{folder}/measure-{n}"] for n in runs])
        if options.demo:
            measure("demo", [["demo", "--out", f"{folder}/demo"]])
            measure("the same demo again", [["demo", "--out", f"{folder}/demo"]])
    print(f"{machine('ray', 'torch')}; medians of {options.repeats}\n")
    table(["raydpp", "seconds", "imports", "Ray", "work"], rows)


if __name__ == "__main__":
    main()
