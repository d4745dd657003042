"""What select and measure read: a gradient table, by the folder of the run that wrote it or as plain Parquet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from raydpp import store
from raydpp.errors import UserError
from raydpp.filesystem import resolve, split_options
from raydpp.stages import run as runs
from raydpp.stages.fingerprint import first_difference
from raydpp.store import Part

GRADIENTS = "gradients"


@dataclass(frozen=True)
class GradientTable:
    """A table of features, unread.

    Attributes:
        name: For people: the last part of its URL.
        parts: Its files, with the number of rows in each that belong to it.
        column: The column with the features.
        dimension: D.
        fingerprint: What its numbers depend on; None for a plain Parquet file.
        corpus: The corpus it was made from; None if unknown.
        identity: Strict JSON that changes when the table does.
        source: Where set, only rows of this source belong to the table.
        scores: A reference to a table of id and more columns, which rows are joined with as they are read.
        scored: The names of these columns.
    """

    name: str
    parts: tuple[Part, ...]
    column: str
    dimension: int
    fingerprint: dict[str, Any] | None
    corpus: str | None
    identity: Any
    source: str | None = None
    scores: Any = None
    scored: tuple[str, ...] = ()

    @property
    def rows(self) -> int:
        """Its number of rows."""
        return sum(part.rows for part in self.parts)

    def has(self, column: str) -> bool:
        """Whether its files, or what they are joined with, have a column."""
        return column in self.scored or column in _columns(self.parts[0].url)

    def read(self, parts: Sequence[Part], more: Sequence[str] = ()) -> pa.Table:
        """The rows of some of its files, in the order of their ids: a gradient table's columns and ``more``."""
        columns = [name for name in _columns(parts[0].url) if name in _KEPT or name == self.column]
        table = self.read_columns(parts, [*columns, *(name for name in more if name not in columns)])
        if self.source is not None:
            table = table.filter(pc.equal(table["source"], self.source))
        return table.sort_by("id")

    def read_columns(self, parts: Sequence[Part], columns: Sequence[str]) -> pa.Table:
        """Some columns of some of its files; where scores are among them, without the rows that have none."""
        import ray

        columns = list(dict.fromkeys(columns))
        joined = [name for name in columns if name in self.scored]
        if not joined:
            return store.read_columns(parts, columns)
        table = store.read_columns(parts, list(dict.fromkeys(["id", *(c for c in columns if c not in joined)])))
        scores = ray.get(self.scores)
        ids = table["id"].cast(pa.string())
        scores = scores.filter(pc.is_in(scores["id"], ids))  # the ids here are few: only they are hashed
        places = pc.index_in(ids, scores["id"])
        table, scores = table.filter(pc.is_valid(places)), scores.take(places.drop_null())
        for name in joined:
            table = table.append_column(name, scores[name])
        return table.select(columns)


_KEPT = frozenset(store.gradient_schema(1).names)


def open_table(url: str, column: str) -> GradientTable:
    """Find a table's files and check what can be checked without reading it.

    Args:
        url: The output folder of raydpp extract, select or cut, or a Parquet file with the columns id and ``column``.
        column: The column with the features, a fixed-size list of numbers with unit norm.
    """
    name = split_options(url)[0].rstrip("/").rsplit("/", 1)[-1]
    if url.endswith(".parquet"):
        parts = store.parquet_parts(url)
        fingerprint, corpus = None, None
        identity: Any = [[part.url, part.rows] for part in parts]
    else:
        record = runs.require(("extract", "select", "cut"), url)
        parts = store.parquet_parts(store.join(url, GRADIENTS))
        fingerprint, corpus, identity = record["fingerprint"], record["corpus"], runs.identity(record)
        column = record.get("feature_column", column)
    system, path = resolve(parts[0].url)
    schema = pq.read_schema(path, filesystem=system)
    for needed in ("id", column):
        if needed not in schema.names:
            raise UserError(
                f"{url} has no column {needed!r}; it has {', '.join(schema.names)}."
                " --feature-column names the column with the features"
            )
    kind = schema.field(column).type
    if not pa.types.is_fixed_size_list(kind):
        raise UserError(f"the column {column!r} of {url} is {kind}, not a fixed-size list of numbers")
    return GradientTable(name, tuple(parts), column, kind.list_size, fingerprint, corpus, identity)


def by_source(table: GradientTable) -> list[GradientTable]:
    """One table for every source of this one, made of the files it occurs in."""
    found: dict[str, list[Part]] = {}
    for part in table.parts:  # one short column, a file at a time
        for entry in store.read_columns([part], ["source"])["source"].value_counts().to_pylist():
            found.setdefault(entry["values"], []).append(Part(part.url, entry["counts"]))
    return [replace(table, name=name, source=name, parts=tuple(found[name])) for name in sorted(found)]


def same_fingerprint(tables: Sequence[GradientTable]) -> None:
    """Refuse to compare tables whose numbers were made differently; the message names the field."""
    first = tables[0]
    for other in tables[1:]:
        if first.dimension != other.dimension:
            raise UserError(
                f"{first.name} has {first.dimension} dimensions and {other.name} {other.dimension}:"
                " distances compare only within one dimension"
            )
        if first.fingerprint is None or other.fingerprint is None:
            continue
        if difference := first_difference(first.fingerprint, other.fingerprint):
            field, one, two = difference
            raise UserError(
                f"{first.name} and {other.name} cannot be compared: their {field} differs ({one} and {two})."
                " Extract both with the same options"
            )


def _columns(url: str) -> list[str]:
    system, path = resolve(url)
    return list(pq.read_schema(path, filesystem=system).names)
