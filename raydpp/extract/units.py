"""Units of work of extract: what is still to do is what the output folder does not hold.

No log of progress is kept that could disagree with the data. A unit is some rows of one corpus file; when it is done
its Parquet file (and before that its rejects) appear whole under a name of their own, so that ``ls`` shows how far a
run has come, and the ids in those files are what a next start need not do again. Ray Data's own checkpointing keeps
such a log beside the data, but silently loses or duplicates rows where the two part (another D, a folder emptied, rows
dropped between read and write), and forgets it all after success: a corpus that grew would be paid for again.
"""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from raydpp.errors import UserError
from raydpp.extract.sample import Sample
from raydpp.storage import UNFINISHED, Folder
from raydpp.tables import GRADIENTS, Part, is_parquet, read_columns

log = logging.getLogger(__name__)

REJECTS = "rejects"

TORN = ".torn"
"""The ending of a file that was set aside."""

_Found = tuple[np.ndarray, dict[str, int]]


def unit_rows(rows: int, budget: int, actors: int = 1) -> int:
    """How many rows make a unit by default, 16 to 4096, in a job of so many ``rows`` shared by ``actors``.

    A sixty-fourth, or more: batches (of ``budget`` token positions) of similar lengths need several batches to sort
    within one unit. But at most a quarter of an actor's share, so that all actors have work to their end.
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
            starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            groups = np.unique(np.searchsorted(starts, self.rows, side="right") - 1)
            present = np.concatenate(
                [np.arange(starts[g], starts[g + 1]) for g in groups]
            )  # row numbers of what is read
            return file.read_row_groups(groups.tolist(), columns=columns).take(np.searchsorted(present, self.rows))


@dataclass(frozen=True, eq=False)
class Completed:
    """What an output folder holds.

    Attributes:
        ids: (n,) bytes, the ids of the table and of the rejects, ascending.
        counts: rows and rejects, and of the rows tokens, response_tokens and truncated.
    """

    ids: np.ndarray
    counts: dict[str, int]


def scan_output(out: Folder) -> Completed:
    """Read what is completed from the files themselves: nothing else says it, so that nothing can disagree with them.

    A file that cannot be read, as a crash of the machine may leave one, is set aside under another name: what was in it
    is then not completed.

    Raises:
        UserError: An id is there twice; the message says what to delete.
    """
    tables = [Part(out.below(GRADIENTS), name) for name in out.below(GRADIENTS).files() if is_parquet(name)]
    rejects = [Part(out.below(REJECTS), name) for name in out.below(REJECTS).files(".jsonl")]
    with ThreadPoolExecutor(16) as pool:  # waiting, not computing
        attempts = [*pool.map(_read_table, tables), *pool.map(_read_rejects, rejects)]
    files, read = [], []
    for part, found in zip([*tables, *rejects], attempts, strict=True):
        if isinstance(found, Exception):
            log.warning("extract: %s was torn and is set aside, its rows are worked on again (%s)", part, found)
            part.folder.system.move(part.name, part.name + TORN)
        else:
            files.append(part)
            read.append(found)
    ids = np.concatenate([np.array([], "S"), *(ids for ids, _ in read)])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    if len(twice := np.flatnonzero(ids[1:] == ids[:-1])):
        file = np.repeat(np.arange(len(read)), [len(found) for found, _ in read])[order]
        raise UserError(
            f"{len(twice)} examples are in {out} twice, such as {ids[twice[0]].decode()} in {files[file[twice[0]]]} and"
            f" {files[file[twice[0] + 1]]}: delete one of the two files, and run the same command again"
        )
    names = ("rows", "rejects", "tokens", "response_tokens", "truncated")
    return Completed(ids, {name: sum(counts.get(name, 0) for _, counts in read) for name in names})


def plan_units(chosen: Sample, completed: Completed, size: int, owner: str = "") -> list[Unit]:
    """What is still to do, in units of at most ``size`` rows, in the order of the corpus.

    The owner is part of the units' names, so that no start writes a file of another's name.

    Raises:
        UserError: Something completed is not among the conversations that take part.
    """
    units, matched = [], 0
    padded = np.append(completed.ids, b"")  # no id is empty: what a search beyond the last one finds is not it
    for part in chosen.parts:
        table = read_columns([part], ["id", "source"])
        table = chosen.filter(table.append_column("row", pa.array(np.arange(len(table)))))
        ids = _as_bytes(table["id"])
        known = padded[np.searchsorted(completed.ids, ids)] == ids
        matched += int(known.sum())
        rows, names = table["row"].to_numpy()[~known], ids[~known]
        for start in range(0, len(rows), size):
            name = f"part-{names[start].decode()}-{owner}"
            units.append(Unit(name, part, rows[start : start + size]))
    if matched != len(completed.ids):
        raise UserError(
            f"{len(completed.ids) - matched} of the examples that are done are not among the conversations this run is"
            " about: its corpus has changed other than by growing, or --limit or --per-source now means other"
            " conversations. Name another folder"
        )
    return units


def remove_partial_files(out: Folder) -> None:
    """Delete what a killed writer left half-written."""
    for folder in (out.below(GRADIENTS), out.below(REJECTS)):
        for name in folder.files(UNFINISHED):
            folder.delete(name)


def _as_bytes(column: pa.ChunkedArray) -> np.ndarray:
    return np.array([value.encode() for value in column.to_pylist()], dtype="S")


def _read_table(part: Part) -> _Found | Exception:
    columns = ["prompt_tokens", "response_tokens", "truncated"]
    try:
        table = part.read(["id", *columns])
    except (pa.ArrowException, UserError) as error:
        return error
    prompt, response, truncated = (int(np.sum(table[name].to_numpy())) for name in columns)
    counts = {"rows": len(table), "tokens": prompt + response, "response_tokens": response, "truncated": truncated}
    return _as_bytes(table["id"]), counts


def _read_rejects(part: Part) -> _Found | Exception:
    try:
        lines = [line for line in (part.folder.read_text(part.name) or "").split("\n") if line]
        return np.array([json.loads(line)["id"].encode() for line in lines], dtype="S"), {"rejects": len(lines)}
    except (ValueError, KeyError, TypeError) as error:
        return error
