"""A made-up gradient table in many files, and what a search over the whole of it picks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa

from raydpp.cluster import Here
from raydpp.dpp.lazy_greedy import Selection
from raydpp.dpp.oracles.choice import OracleName
from raydpp.select.inputs import Owned, SelectionJob
from raydpp.select.request import Request, select_rows
from raydpp.select.shard_actors import ShardActors, _Setup, _ShardActor
from raydpp.storage import Folder
from raydpp.tables import gradient_schema, open_table, partition_files, vector_array, write_table

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
            "gradient": vector_array(features, schema.field("gradient").type.value_type),
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


def job_of(
    table: str,
    count: int,
    request: Request,
    tasks: Here | None = None,
    owned: np.ndarray | None = None,
    exclude: pa.Array | None = None,
) -> SelectionJob:
    """A selection from a table in so many partitions; its tasks run in this process."""
    opened, tasks = open_table(table, request.column), tasks or Here()
    partitions = partition_files(opened.parts, count)
    assert len(partitions) == count
    given = Owned(
        None if owned is None else tasks.put(owned),
        0 if owned is None else len(owned),
        pa.array([], pa.string()) if exclude is None else exclude,
    )
    return SelectionJob(opened, partitions, request, given, "title", tasks)


class ShardsHere(ShardActors):
    """The same shards in this process."""

    def __init__(self, job: SelectionJob, oracle: OracleName, size: int, memory: int = 0) -> None:
        made = _Setup(job.table, job.partitions, job.request, oracle, size, job.given.excluded, 1)
        self._put, self._setup = Here().put, [made]
        self._actors = [_Called(_ShardActor(number)) for number in range(len(job.partitions))]

    def _collect(self, references: Mapping[int, Any]) -> dict[int, Any]:
        return dict(references)

    def close(self) -> None:
        pass


class _Called:
    """Answers ``actor.method.remote(...)`` at once."""

    def __init__(self, actor: _ShardActor) -> None:
        self._actor = actor

    def __getattr__(self, name: str) -> Any:
        return SimpleNamespace(remote=getattr(self._actor, name))


def whole(
    table: str, request: Request, owned: Any = None, exclude: pa.Array | None = None
) -> tuple[pa.Table, Selection]:
    """The rows that ``greedy_map`` picks of the whole table, and its selection."""
    opened = open_table(table, request.column)
    return select_rows(opened.read(opened.parts, request.columns), request, None, owned, exclude)
