"""The versions of a selection: which is the latest, which stay, and what must not be in any of them any more."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.errors import UserError
from raydpp.select.outputs import EXAMPLES, Distances, write_dataset
from raydpp.storage import Folder
from raydpp.tables import GRADIENTS, Part, is_parquet, parquet_parts, read_columns, write_table

VERSIONS = "versions"
CHANGES = "changes"
LATEST = "latest"

_ID_COLUMNS = ("id", "nearest")
_KEPT_CONFIG = ("table", "out", "size", "kernel", "corpus")
_DROPPED_FACTS = ("tables", "card", "comparison", "left_out", "summary", "next", "paths", "sources")


@dataclass(frozen=True)
class Versions:
    """OUT/versions, each the output folder of raydpp select, and OUT/changes, what each changed; OUT/latest names the
    latest that is whole."""

    out: Folder

    @property
    def latest(self) -> str | None:
        """The name of the latest version; UserError where it is not there."""
        text = (self.out.read_text(LATEST) or "").strip()
        if text and not self.folder(text).has(runs.SUCCESS):
            raise UserError(
                f"{self.out.url_of(LATEST)} names the version {text}, which is not there: let it name one of"
                f" {', '.join(self.names) or 'those that are'}, or delete it"
            )
        return text or None

    @property
    def names(self) -> list[str]:
        """All versions, whole or not, the oldest first."""
        return self.out.below(VERSIONS).names() or []

    def folder(self, name: str) -> Folder:
        return self.out.below(f"{VERSIONS}/{name}")

    def changes(self, name: str) -> Folder:
        return self.out.below(f"{CHANGES}/{name}")

    def next(self) -> str:
        """The name of the next version, in whose place nothing is: what a killed refresh left is deleted."""
        latest = self.latest or ""
        for name in self.names:
            if name > latest:
                self.delete(name)
        return f"{int(latest or 0) + 1:06d}"

    def publish(self, name: str) -> None:
        """Let ``latest`` name a version: one small file, which appears whole."""
        self.out.write_text(LATEST, name + "\n")

    def retain(self, count: int) -> list[str]:
        """Delete all but the last so many; their names."""
        gone = self.names[:-count]
        for name in gone:
            self.delete(name)
        return gone

    def delete(self, name: str) -> None:
        # What says that it is whole goes first: a half deleted version must not look like one.
        self.folder(name).delete(runs.SUCCESS)
        self.out.delete(f"{VERSIONS}/{name}")
        self.out.delete(f"{CHANGES}/{name}")

    def erase(self, living: pa.Array, sources: Collection[str]) -> int:
        """Take out of all versions but the latest what is not in the corpus any more; how many picks that was."""
        total = 0
        for name in self.names:
            if name == self.latest or (gone := erase(self.folder(name), living, sources)) is None:
                continue
            total += gone
            self.out.delete(f"{CHANGES}/{name}")
            if not parquet_parts(self.folder(name).below("selection"))[0].rows:
                self.delete(name)
        return total


def erase(version: Folder, living: pa.Array, sources: Collection[str]) -> int | None:
    """Reduce a version in which there is something of a conversation or a source that is gone; how many picks went.

    What stays are the picks, their gradients and examples, and a card that is written anew; reports, plots and maps,
    which show texts and names, are deleted. None where there is nothing of the kind.
    """
    record = json.loads(version.read_text(runs.RECORD) or "{}")
    files = {name: _ids_gone(Part(version, name), living) for name in version.files() if is_parquet(name)}
    if not any(files.values()) and set(record.get("sources", ())) <= set(sources):
        return None
    picks = read_columns(parquet_parts(version.below("selection")), ["id", "log_det"])
    left = picks.filter(pc.is_in(picks["id"], living))
    gone, kept = len(picks) - len(left), set(left["id"].to_pylist())
    rows = [json.loads(line) for line in (version.read_text(EXAMPLES) or "").split("\n") if line]
    rows = [row for row in rows if row["id"] in kept]
    for name in version.files():
        if not name.startswith(("selection/", f"{GRADIENTS}/")) and name not in (EXAMPLES, runs.RECORD, runs.SUCCESS):
            version.delete(name)
    if rows:
        mix = Counter(row["source"] for row in rows)
        shares = {source: number / mix.total() for source, number in mix.most_common()}
        facts = {"reduced": f"{gone:,} of its picks are not in the corpus any more"}
        write_dataset(version, rows, facts, left["log_det"][-1].as_py(), shares, Distances("", {}))
    _write_record(version, record, len(kept), gone)
    for folder in (GRADIENTS, "selection"):  # the picks last: until then what is gone is found again after a crash
        for part in parquet_parts(version.below(folder)):
            table = part.read(part.columns)
            write_table(part.folder, part.name, table.filter(pc.is_in(table["id"], living)))
    return gone


def _ids_gone(part: Part, living: pa.Array) -> int:
    columns = [name for name in _ID_COLUMNS if name in part.columns]
    table = part.read(columns) if columns else None
    return sum(pc.sum(pc.invert(pc.is_in(table[name], living))).as_py() or 0 for name in columns) if table else 0


def _write_record(version: Folder, record: Mapping[str, Any], rows: int, gone: int) -> None:
    facts = {name: value for name, value in record.items() if name not in _DROPPED_FACTS}
    facts["config"] = {name: record["config"].get(name) for name in _KEPT_CONFIG}
    facts["counts"] = {**record["counts"], "rows": rows}
    facts["table_files"] = {}  # their names hold ids; without them all of the table counts as new since
    facts["erased"] = record.get("erased", 0) + (gone if rows < record["counts"]["rows"] else 0)  # once
    facts["files"] = runs.data_files(version)
    version.write_json(runs.RECORD, facts)
