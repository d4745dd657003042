"""Picks of partitions that stay valid: of the same files, by the same options, for a budget that is no larger."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from raydpp.dpp.lazy_greedy import Selection
from raydpp.select.request import Request
from raydpp.storage import Folder
from raydpp.tables import Part, write_table

_GAIN = "_log_gain"
_FACTS = b"raydpp"


@dataclass(frozen=True)
class PartitionCache:
    """A folder with a Parquet file for each partition that was searched; ``depends`` is what picks depend on beside
    the request, as strict JSON."""

    folder: Folder
    depends: Any

    @classmethod
    def at(cls, url: str, excluded: Iterable[str], beside: Any) -> PartitionCache:
        """For picks that depend on ids that are owned or excluded, and on scores and targets."""
        return cls(Folder.at(url), [hashlib.blake2b("\n".join(excluded).encode()).hexdigest(), beside])

    def file_for(self, parts: Sequence[Part], request: Request) -> Part:
        """Where the picks of some files are kept. Of one partition there is one, whatever the size of its budget:
        greedy is nested, so that the first picks of a larger one are those of a smaller."""
        infos = [part.folder.system.get_file_info(part.name) for part in parts]
        files = [[str(part), info.size, info.mtime_ns] for part, info in zip(parts, infos, strict=True)]
        if _nested(request):
            request = replace(request, budget=replace(request.budget, size=None))
        text = json.dumps([files, repr(request), self.depends])
        return Part(self.folder, hashlib.blake2b(text.encode(), digest_size=16).hexdigest() + ".parquet")

    def keep_only(self, files: Iterable[str]) -> None:
        """Delete all but these."""
        for name in set(self.folder.names() or ()).difference(files):
            self.folder.delete(name)


def kept_picks(file: Part, request: Request) -> tuple[pa.Table, Selection] | None:
    """The picks of a partition for this budget; None where there are none, or too few."""
    if not file.folder.has(file.name):
        return None
    table = pq.read_table(file.name, filesystem=file.folder.system)
    facts: dict[str, Any] = json.loads(table.schema.metadata[_FACTS])
    size, asked = request.budget.size, facts["asked"]
    if asked is not None and (size is None or size > asked):
        return None
    count = len(table) if size is None else int(min(size, len(table)))
    table = table.replace_schema_metadata().slice(0, count)
    stopped = facts["stopped"] if count == facts["rows"] else None
    gains = table[_GAIN].to_pylist()
    return table.drop_columns(_GAIN), Selection.of(range(count), gains, stopped, facts["oracle"])


def keep_picks(file: Part, request: Request, rows: pa.Table, selection: Selection) -> None:
    """Keep them, but not those of a search that Ctrl-C ended."""
    if "interrupted" in (selection.stopped or ""):
        return
    facts = {
        "asked": request.budget.size,
        "rows": len(rows),
        "stopped": selection.stopped,
        "oracle": selection.oracle,
    }
    table = rows.append_column(_GAIN, pa.array(selection.log_gains, pa.float64()))
    write_table(file.folder, file.name, table.replace_schema_metadata({_FACTS: json.dumps(facts)}))


def _nested(request: Request) -> bool:
    return not request.budget.minimum and request.budget.tokens is None
