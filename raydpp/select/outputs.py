"""What a selection leaves behind: the selection table, the examples, their rows of the gradient table."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.cluster import Here
from raydpp.errors import UserError
from raydpp.select.request import Picked, Request
from raydpp.storage import Folder
from raydpp.tables import GRADIENTS, SELECTION_SCHEMA, Part, parquet_parts, partition_files, write_table


def write_selection(run: runs.Run, picked: Picked, request: Request) -> None:
    """OUT/selection and OUT/gradients, in the order of picking."""
    picks, gains = picked.rows, picked.selection.log_gains
    scores = request.scores(picks)
    columns = {
        "rank": np.arange(1, len(picks) + 1),
        "id": picks["id"],
        "source": picks["source"] if "source" in picks.column_names else pa.nulls(len(picks), pa.string()),
        "log_gain": gains,
        "log_det": np.cumsum(gains),
        "quality": pa.nulls(len(picks), pa.float64()) if scores is None else scores,
    }
    write_table(run.out, "selection/selection.parquet", pa.table(columns, schema=SELECTION_SCHEMA))
    write_table(run.out, f"{GRADIENTS}/part-00000.parquet", picks)


def write_examples(tasks: Here, out: Folder, corpus: Folder, ids: list[str]) -> None:
    """The selected conversations, in the order of picking; the corpus is filtered where it is read."""
    parts = parquet_parts(corpus.below("corpus"))
    wanted = tasks.put(pa.array(ids))
    groups = partition_files(parts, tasks.cpus) if tasks.on_ray else [parts]
    found = tasks.get([tasks.submit(_examples, group, wanted) for group in groups])
    rows = {row["id"]: row for table in found for row in table.to_pylist()}
    if missing := [identity for identity in ids if identity not in rows]:
        raise UserError(
            f"{len(missing)} of the selected examples are not in {corpus} (first: {missing[0]}): give the corpus that"
            " the gradient table was made of with --corpus"
        )
    out.write_json_lines(
        "examples.jsonl",
        ({"messages": rows[i]["messages"], **{k: v for k, v in rows[i].items() if k != "messages"}} for i in ids),
    )


def _examples(parts: Sequence[Part], ids: pa.Array) -> pa.Table:
    """The rows of these ids, one file in memory at a time."""
    return pa.concat_tables([(rows := part.read(part.columns)).filter(pc.is_in(rows["id"], ids)) for part in parts])
