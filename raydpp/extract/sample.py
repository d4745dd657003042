"""Which conversations of a corpus table a run works on.

The corpus is in the order of its ids, which are hashes: the smallest ids are a uniform sample, always the same one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.errors import UserError
from raydpp.storage import Folder
from raydpp.tables import Part, parquet_parts, read_columns


@dataclass(frozen=True)
class Sample:
    """Some rows of a corpus table, unread.

    Attributes:
        parts: The files that hold them.
        rows: How many they are.
        last_ids: For every source that takes part the largest id that does (None: all of them); None: every row.
        only: Where given, no other ids take part.
    """

    parts: tuple[Part, ...]
    rows: int
    last_ids: Mapping[str, str | None] | None = None
    only: pa.Array | None = None

    def filter(self, table: pa.Table) -> pa.Table:
        """The rows of a part of the corpus (columns id and source among them) that belong to the sample."""
        if self.only is not None:
            table = table.filter(pc.is_in(table["id"], self.only))
        if self.last_ids is None:
            return table
        wanted = []
        for source, last in self.last_ids.items():
            of_source = pc.equal(table["source"], source)
            wanted.append(of_source if last is None else pc.and_(of_source, pc.less_equal(table["id"], last)))
        return table.filter(functools.reduce(pc.or_, wanted))


def identity(corpus_record: Mapping[str, Any], only: Sequence[str] | None) -> dict[str, Any]:
    """What tells a sample's corpus, and its shortlist where there is one, from others: strict JSON."""
    found = {"corpus": runs.identity(corpus_record)}
    if only is not None:
        found["only"] = hashlib.blake2b("\n".join(only).encode(), digest_size=16).hexdigest()
    return found


def choose(
    corpus: Folder,
    counts: Mapping[str, int],
    sources: Sequence[str] | None = None,
    limit: int | None = None,
    per_source: int | None = None,
    only: Sequence[str] | None = None,
) -> Sample:
    """The sample that the options of extract mean: the smallest ids, first of each source and then of all.

    Reads ids and sources of no more files than it needs; ``counts`` are the rows of every source of the corpus. Where
    ``only`` is given, other ids do not take part; those of them that the corpus does not have are ignored.

    Raises:
        UserError: A source that the corpus does not have, a limit below 1, ids of which the corpus has none, or files
            with more or fewer rows than ``counts`` says.
    """
    if unknown := sorted(set(sources or ()) - counts.keys()):
        raise UserError(f"there is no source {unknown[0]!r} in {corpus}; it has {', '.join(sorted(counts))}")
    for name, value in (("limit", limit), ("per-source", per_source)):
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least one conversation is needed")
    parts = tuple(parquet_parts(corpus.below("corpus")))
    runs.check_rows("ingest", corpus, sum(counts.values()), sum(part.rows for part in parts))
    listed, held = None, dict[Part, pa.Table]()  # by part, the ids and sources of those listed
    if only is not None:
        listed = pa.array(sorted(set(only)), pa.string())
        for part in parts:
            table = read_columns([part], ["id", "source"])
            if len(rows := table.filter(pc.is_in(table["id"], listed))):
                held[part] = rows
        if not held:
            raise UserError(f"none of the {len(listed):,} ids of --only is in {corpus}: name ids of this corpus")
        parts, counts = tuple(held), Counter(itertools.chain(*(rows["source"].to_pylist() for rows in held.values())))
    wanted = {source: min(counts[source], per_source or counts[source]) for source in sources or sorted(counts)}
    total = sum(wanted.values())
    if only is not None and not total:
        raise UserError(f"the ids of --only are of other sources: {', '.join(sorted(counts))}")
    most = min(total, limit or total)
    if most == sum(counts[source] for source in wanted):
        return Sample(parts, total, None if sources is None else dict.fromkeys(wanted), listed)

    taken: dict[str, list[str]] = {source: [] for source in wanted}
    used: list[Part] = []
    for part in parts:  # in the order of ids
        used.append(part)
        rows = (held[part] if held else read_columns([part], ["id", "source"])).sort_by("id")
        for identity, source in zip(rows["id"].to_pylist(), rows["source"].to_pylist(), strict=True):
            if source in taken and len(taken[source]) < wanted[source]:
                taken[source].append(identity)
        if sum(map(len, taken.values())) >= most:
            break
    ordered = sorted((identity, source) for source, ids in taken.items() for identity in ids)[:most]
    return Sample(tuple(used), most, {source: identity for identity, source in ordered}, listed)  # the last one stays
