"""Units of work of extract: what is still to do is what the output folder does not hold.

No log of progress is kept that could disagree with the data. A unit is some rows of one corpus file; when it is done
its Parquet file (and before that its rejects) appear whole under a name of their own, so that ``ls`` shows how far a
run has come, and the ids in those files are what a next start need not do again. Ray Data's own checkpointing keeps
such a log beside the data, but silently loses or doubles rows where the two part (another D, a folder emptied, rows
dropped between read and write), and forgets it all after success: a corpus that grew would be paid for again.
"""

from __future__ import annotations

import json
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydpp.errors import UserError
from raydpp.extract.sample import Sample
from raydpp.storage import UNFINISHED, Folder
from raydpp.tables import GRADIENTS, Part, read_columns

REJECTS = "rejects"
_COUNTED = ("prompt_tokens", "response_tokens", "truncated")


def unit_rows(rows: int, budget: int, actors: int = 1) -> int:
    """How many of so many rows make a unit by default, 16 to 4096.

    A sixty-fourth, or more: batches of similar lengths need several batches to sort within one unit. But at most a
    quarter of an actor's share, so that all actors have work to their end.

    Args:
        rows: Rows of the whole job.
        budget: Token positions of one batch.
        actors: Actors that share the job.
    """
    wanted = min(max(rows / 64, budget / 16), rows / (4 * actors))
    return min(max(math.ceil(wanted), budget // 64, 16), 4096)


@dataclass(frozen=True, eq=False)
class Unit:
    """Some rows of one corpus file, worked on together.

    Attributes:
        name: Of the files it writes, without their endings.
        part: The corpus file.
        rows: (n,) row numbers in that file, ascending.
    """

    name: str
    part: Part
    rows: np.ndarray

    def read(self, columns: list[str]) -> pa.Table:
        """Its rows; reads only the row groups that hold some of them."""
        with self.part.folder.system.open_input_file(self.part.name) as stream:
            file = pq.ParquetFile(stream)
            sizes = [file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)]
            ends = np.cumsum(sizes)
            groups = np.unique(np.searchsorted(ends, self.rows, side="right"))
            starts = np.concatenate([[0], ends])[groups]  # of those groups, in the file
            table = file.read_row_groups(groups.tolist(), columns=columns)
            before = np.concatenate([[0], np.cumsum([sizes[g] for g in groups])])[:-1]  # in what was read
            place = np.searchsorted(starts, self.rows, side="right") - 1
            return table.take(pa.array(self.rows - starts[place] + before[place]))


@dataclass(frozen=True, eq=False)
class Done:
    """What an output folder holds.

    Attributes:
        ids: (n,) bytes, the ids of the table and of the rejects, ascending.
        counts: rows and rejects, and of the rows tokens, response_tokens and truncated.
    """

    ids: np.ndarray
    counts: dict[str, int]


def look(out: Folder) -> Done:
    """Read the ids of everything that is done.

    Raises:
        UserError: An id is there twice; the message says what to delete.
    """
    tables = [Part(out.below(GRADIENTS), name) for name in out.below(GRADIENTS).files(".parquet")]
    rejects = [Part(out.below(REJECTS), name) for name in out.below(REJECTS).files(".jsonl")]
    with ThreadPoolExecutor(16) as pool:  # waiting, not computing
        read = [*pool.map(_ids_of_table, tables), *pool.map(_ids_of_rejects, rejects)]
    files = [*tables, *rejects]
    ids = np.concatenate([ids for ids, _ in read]) if read else np.zeros(0, "S1")
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if len(twice := np.flatnonzero(ids[1:] == ids[:-1])):
        file = np.repeat(np.arange(len(read)), [len(found) for found, _ in read])[order]
        raise UserError(
            f"{len(twice)} examples are in {out} twice, such as {ids[twice[0]].decode()} in {files[file[twice[0]]]} and"
            f" {files[file[twice[0] + 1]]}: delete one of the two files, and run the same command again"
        )
    counts = {"rows": sum(len(ids) for ids, _ in read[: len(tables)])}
    counts["rejects"] = len(ids) - counts["rows"]
    for name in ("tokens", "response_tokens", "truncated"):
        counts[name] = sum(found.get(name, 0) for _, found in read)
    return Done(ids, counts)


def plan_units(chosen: Sample, done: Done, size: int, attempt: int) -> list[Unit]:
    """What is still to do, in units of at most ``size`` rows, in the order of the corpus.

    Args:
        chosen: The conversations that take part.
        done: What need not be done again.
        size: Rows of a unit.
        attempt: Part of the units' names: what a later start writes never takes an earlier one's name.

    Raises:
        UserError: Something done is not among the conversations that take part.
    """
    units, matched = [], 0
    for part in chosen.parts:
        table = read_columns([part], ["id", "source"])
        table = table.append_column("row", pa.array(np.arange(len(table))))
        table = chosen.filter(table)
        ids = _as_bytes(table["id"])
        place = np.minimum(np.searchsorted(done.ids, ids), max(len(done.ids) - 1, 0))
        known = done.ids[place] == ids if len(done.ids) else np.zeros(len(ids), bool)
        matched += int(known.sum())
        rows, names = table["row"].to_numpy()[~known], ids[~known]
        for start in range(0, len(rows), size):
            name = f"part-{attempt:03d}-{names[start].decode()}"
            units.append(Unit(name, part, rows[start : start + size]))
    if matched != len(done.ids):
        raise UserError(
            f"{len(done.ids) - matched} of the examples that are done are not among the conversations this run is"
            " about: its corpus has changed other than by growing, or --limit or --per-source now means other"
            " conversations. Name another folder"
        )
    return units


def sweep(out: Folder) -> None:
    """Delete what a killed writer left half-written."""
    for folder in (out.below(GRADIENTS), out.below(REJECTS)):
        for name in folder.files(UNFINISHED):
            folder.delete(name)


def _as_bytes(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([value.encode() for value in column.to_pylist()], dtype="S") if len(column) else np.zeros(0, "S1")


def _ids_of_table(part: Part) -> tuple[np.ndarray, dict[str, int]]:
    table = part.read(["id", *_COUNTED])
    prompt, response, truncated = (int(np.sum(table[name].to_numpy())) for name in _COUNTED)
    return _as_bytes(table["id"]), {
        "tokens": prompt + response,
        "response_tokens": response,
        "truncated": truncated,
    }


def _ids_of_rejects(part: Part) -> tuple[np.ndarray, dict[str, int]]:
    lines = filter(None, (part.folder.read_text(part.name) or "").split("\n"))
    return np.array([json.loads(line)["id"].encode() for line in lines], dtype="S"), {}
