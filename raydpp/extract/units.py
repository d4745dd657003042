"""Units of work of extract: what is still to do is what the output folder does not hold.

No log of progress is kept that could disagree with the data. A unit is some rows of the corpus; when it is done its
Parquet file (and before that its rejects) appear whole under a name of their own, so that ``ls`` shows how far a run
has come, and the ids in those files are what a next start need not do again. Ray Data's own checkpointing keeps such a
log beside the data, but silently loses or duplicates rows where the two part (another D, a folder emptied, rows dropped
between read and write), and forgets it all after success: a corpus that grew would be paid for again.
"""

from __future__ import annotations

import json
import logging
import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpp.errors import UserError
from raydpp.extract.sample import Sample
from raydpp.storage import Folder
from raydpp.tables import GRADIENTS, Part, concatenated, is_parquet, read_columns, write_table

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
class Piece:
    """Some rows of one corpus file: (n,) row numbers in it, ascending."""

    part: Part
    rows: np.ndarray

    def read(self, columns: list[str]) -> pa.Table:
        """Reads only the row groups that hold some of the rows."""
        with self.part.folder.system.open_input_file(self.part.name) as stream:
            file = pq.ParquetFile(stream)
            starts = np.cumsum([0, *(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups))])
            groups = np.unique(np.searchsorted(starts, self.rows, side="right") - 1)
            present = np.concatenate(
                [np.arange(starts[g], starts[g + 1]) for g in groups]
            )  # row numbers of what is read
            return file.read_row_groups(groups.tolist(), columns=columns).take(np.searchsorted(present, self.rows))


@dataclass(frozen=True, eq=False)
class Unit:
    """Some rows of the corpus, worked on together; ``name`` is that of the files it writes, without their endings."""

    name: str
    pieces: tuple[Piece, ...]

    def read(self, columns: list[str]) -> pa.Table:
        """Its rows, in the order of the corpus."""
        return concatenated([piece.read(columns) for piece in self.pieces])


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
    tables, rejects = _tables_of(out), _rejects_of(out)
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
    first, pieces, room, units, matched = "", list[Piece](), size, list[Unit](), 0
    padded = np.append(completed.ids, b"")  # no id is empty: what a search beyond the last one finds is not it
    for part in chosen.parts:
        table = read_columns([part], ["id", "source"])
        table = chosen.filter(table.append_column("row", pa.array(np.arange(len(table)))))
        ids = _as_bytes(table["id"])
        known = padded[np.searchsorted(completed.ids, ids)] == ids
        matched += int(known.sum())
        rows, names = table["row"].to_numpy()[~known], ids[~known]
        while len(rows):  # of a corpus that grew a file may hold few: a unit goes on in the next one
            first = first or names[0].decode()
            pieces.append(Piece(part, rows[:room]))
            room, rows, names = room - len(pieces[-1].rows), rows[room:], names[room:]
            if not room:
                units.append(Unit(f"part-{first}-{owner}", tuple(pieces)))
                first, pieces, room = "", [], size
    if pieces:
        units.append(Unit(f"part-{first}-{owner}", tuple(pieces)))
    if matched != len(completed.ids):
        raise UserError(
            f"{len(completed.ids) - matched} of the examples that are done are not among the conversations this run is"
            " about: its corpus has changed other than by growing, or --limit or --per-source now means other"
            " conversations. Name another folder"
        )
    return units


def drop_absent(chosen: Sample, out: Folder) -> int:
    """Delete what is done of conversations that do not take part (any more); how many they were.

    The others get the source that the corpus has for them now. Each file is replaced whole.

    Raises:
        UserError: Nothing would be left: that is another corpus.
    """
    present = concatenated([chosen.filter(read_columns([part], ["id", "source"])) for part in chosen.parts])
    changes, kept, dropped = [], 0, 0
    parts = [*_tables_of(out), *_rejects_of(out)]
    for part in parts:
        table = _read_any(part, ["id", "source"])
        places = pc.index_in(table["id"], present["id"])
        rows, sources = pa.array(np.flatnonzero(places.is_valid())), present["source"].take(places.drop_null())
        kept, dropped = kept + len(rows), dropped + len(table) - len(rows)
        if sources != table["source"]:  # of another length, too
            changes.append((part, rows, sources))
    if parts and not kept:
        raise UserError(f"none of the examples of {out} is in this corpus: it was made of another. Name another folder")
    for part, rows, sources in changes:
        table = _read_any(part, part.columns if is_parquet(part.name) else []).take(rows)
        table = table.set_column(table.column_names.index("source"), "source", sources)
        if not len(table):
            part.folder.delete(part.name)
        elif is_parquet(part.name):
            write_table(part.folder, part.name, table)
        else:
            part.folder.write_json_lines(part.name, table.to_pylist())
    return dropped


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
        ids = [row["id"].encode() for row in _reject_rows(part)]
        return np.array(ids, dtype="S"), {"rejects": len(ids)}
    except (ValueError, KeyError, TypeError) as error:
        return error


def _reject_rows(part: Part) -> list[dict[str, str]]:
    return [json.loads(line) for line in (part.folder.read_text(part.name) or "").split("\n") if line]


def _read_any(part: Part, columns: list[str]) -> pa.Table:
    """Columns of a file of the table, or all rejects of one of those."""
    return part.read(columns) if is_parquet(part.name) else pa.Table.from_pylist(_reject_rows(part))


def _tables_of(out: Folder) -> list[Part]:
    return [Part(out.below(GRADIENTS), name) for name in out.below(GRADIENTS).files() if is_parquet(name)]


def _rejects_of(out: Folder) -> list[Part]:
    return [Part(out.below(REJECTS), name) for name in out.below(REJECTS).files(".jsonl")]
