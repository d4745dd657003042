"""A made-up gradient table in many files, and what a search over the whole of it picks."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.dpp.lazy_greedy import Selection
from raydpp.select.request import Request, select_rows
from raydpp.storage import Folder
from raydpp.tables import gradient_schema, open_table, vector_array, write_table

DIMENSION = 32


def make_table(folder: Path, rows: int = 1000, files: int = 16, seed: int = 0) -> str:
    """Random features with copies of some in other files, ids in no order: a folder of plain Parquet files."""
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, DIMENSION))
    features[rows // 2 : rows // 2 + 20] = features[:20]
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    schema = gradient_schema(DIMENSION)
    table = pa.table(
        {
            "id": [f"id-{seed}-{n:05d}" for n in random.permutation(rows)],
            "source": random.choice(["first", "second", "third"], rows, p=[0.2, 0.3, 0.5]),
            "gradient": vector_array(features, pa.float16()),
            "gradient_norm": np.ones(rows, np.float32),
            "loss": random.random(rows).astype(np.float32),
            "prompt_tokens": pa.array(random.integers(1, 30, rows), pa.int32()),
            "response_tokens": pa.array(random.integers(1, 60, rows), pa.int32()),
            "truncated": np.zeros(rows, bool),
        },
        schema=schema,
    )
    cuts = np.linspace(0, rows, files + 1).astype(int)
    for n, (start, end) in enumerate(pairwise(cuts.tolist())):
        write_table(Folder.at(folder / "table.parquet"), f"part-{n:05d}.parquet", table.slice(start, end - start))
    return str(folder / "table.parquet")


def whole(
    table: str, request: Request, owned: Any = None, exclude: pa.Array | None = None
) -> tuple[pa.Table, Selection]:
    """The rows that ``greedy_map`` picks of the whole table, and its selection."""
    opened = open_table(table, request.column)
    return select_rows(opened.read(opened.parts, request.columns), request, None, owned, exclude)
