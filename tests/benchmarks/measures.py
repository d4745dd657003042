"""What measures cost: ``python tests/benchmarks/measures.py``: a million rows of 512 numbers, from disk.

Files of random rows around centres are written to a temporary folder, as raydpp writes tables; then a process of its
own measures them file by file. Printed are its seconds, its largest memory (of the process, with Python and torch; and
more than they take), and what it found. With ``--whole`` all of ``raydpp measure`` follows, through Ray: the distances
of the thousand most diverse and of draws, their errors, measures, map and report.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from distributed import Memory
from printed import machine, table

from raydpp.diversity.measures import Measures, measures
from raydpp.measure.stage import measure
from raydpp.storage import Folder
from raydpp.tables import open_table, vector_array, vectors, write_table

CENTRES = 1_000


def write_file(folder: Folder, number: int, rows: int, dimension: int, kind: str) -> None:
    """Rows around ``CENTRES`` centres, a hundredth of them copies."""
    centres = np.random.default_rng(0).standard_normal((CENTRES, dimension), dtype=np.float32)
    random = np.random.default_rng([1, number])
    points = random.standard_normal((rows, dimension), dtype=np.float32) + centres[random.integers(CENTRES, size=rows)]
    points[: rows // 100] = points[-(rows // 100) :]
    points /= np.linalg.norm(points, axis=1, keepdims=True)
    ids = pa.array([f"{number:04}-{row:08}" for row in range(rows)])
    columns = {"id": ids, "gradient": vector_array(points, pa.type_for_alias(kind))}
    write_table(folder, f"{number:04}.parquet", pa.table(columns))


def measured(url: str) -> tuple[Measures, float, float, float]:
    """The measures of a table, seconds, and gigabytes of memory: at the most, and before."""
    measures([np.eye(20)])  # loads libraries
    opened = open_table(url, "gradient")
    before, began = peak(), time.perf_counter()
    found = measures(vectors(opened.read([part])[opened.column]) for part in opened.parts)
    return found, time.perf_counter() - began, peak(), before


def peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="(1,000,000)")
    parser.add_argument("--dimension", type=int, default=512, help="(512)")
    parser.add_argument("--files", type=int, default=20, help="(20)")
    parser.add_argument("--whole", action="store_true", help="then the whole command, too")
    parser.add_argument("--type", default="float16", help="int8, float16 or float32 (float16)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.files):
            write_file(Folder.at(folder), number, options.rows // options.files, options.dimension, options.type)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e9
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            found, seconds, most, before = pool.apply(measured, (folder,))
        if options.whole:
            began = time.perf_counter()
            with Memory() as memory, tempfile.TemporaryDirectory() as out:
                run = measure([folder], out)
            whole = f"{run.summary}\nraydpp measure: {time.perf_counter() - began:.0f} s; memory: {memory}\n"
    headings = ["rows", "D", "files", "GB on disk", "seconds", "peak memory, GB", "before, GB"]
    counts = [f"{options.rows:,}", f"{options.dimension:,}", str(options.files)]
    table(headings, [[*counts, f"{size:.2f}", f"{seconds:.1f}", f"{most:.2f}", f"{before:.2f}"]])
    print(f"{found}\n\n{whole if options.whole else ''}{machine('torch', 'pyarrow', 'scikit-learn')}")


if __name__ == "__main__":
    main()
