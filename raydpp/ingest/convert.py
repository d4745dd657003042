"""Raw rows -> conversations that can be used, and rejects with a reason for the rest."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa

from raydpp.errors import RowError, UserError
from raydpp.ingest.conversation import conversation_id, validated
from raydpp.ingest.files import RawFile, read_rows
from raydpp.ingest.rows import RawRow
from raydpp.ingest.schemas import ColumnNames, Schema, detect_schema
from raydpp.storage import Folder
from raydpp.tables import corpus_schema

_PEEK = 20  # rows that decide a file's schema


@dataclass(frozen=True)
class SniffedFile:
    """What a look at a file's first rows found.

    Attributes:
        file: The file.
        source: Its name without suffixes.
        columns: Of the first rows, in order of appearance.
        format_name: The schema they are of; None where no row can be read.
        numbers: Carried columns that hold numbers.
        texts: Carried columns that hold anything else.
        error: Why the schema is not known, in words.
    """

    file: RawFile
    source: str
    columns: tuple[str, ...]
    format_name: str | None
    numbers: frozenset[str] = frozenset()
    texts: frozenset[str] = frozenset()
    error: str | None = None


@dataclass(frozen=True)
class IngestJob:
    """How all files are read, the same for every task."""

    files: tuple[SniffedFile, ...]
    names: ColumnNames
    carried: dict[str, pa.DataType]
    strip_markers: bool
    out: Folder

    @property
    def schema(self) -> pa.Schema:
        """Of the conversations that are set aside: the corpus's columns and where they come from."""
        schema = corpus_schema(self.carried)
        for name, kind in (("file", pa.int64()), ("row", pa.int64()), ("bucket", pa.int64())):
            schema = schema.append(pa.field(name, kind))
        return schema


def sniff(file: RawFile, names: ColumnNames, carry: Sequence[str]) -> SniffedFile:
    """Recognise a file's schema by its first readable rows."""
    source = PurePosixPath(file.name).name.split(".")[0]
    readable = (raw.value for raw in islice(read_rows(file), 100 * _PEEK) if raw.value is not None)
    rows = list(islice(readable, _PEEK))
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    values = {column: [row[column] for row in rows if row.get(column) is not None] for column in carry}
    numbers = frozenset(column for column, held in values.items() if held and all(map(_is_number, held)))
    texts = frozenset(column for column, held in values.items() if held) - numbers
    try:
        name = detect_schema(columns, names).name if columns else None
    except UserError as error:
        return SniffedFile(file, source, columns, None, error=str(error))
    return SniffedFile(file, source, columns, name, numbers, texts)


def convert_row(
    raw: RawRow, form: Schema | None, item: SniffedFile, plan: IngestJob
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """One raw row -> its conversations that can be used, and rejects for what cannot."""
    examples: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []

    def reject(reason: str) -> None:
        rejects.append({"file": item.file.url, "row": raw.row, "id": None, "reason": reason})

    if raw.value is None or form is None:
        reject(raw.reason or "the file has no readable columns")
        return examples, rejects
    try:
        conversations = form.read(raw.value)
        carried = {name: _carried(raw.value.get(name), name, kind) for name, kind in plan.carried.items()}
    except RowError as error:
        reject(str(error))
        return examples, rejects
    for conversation in conversations:
        try:
            messages = validated(conversation, plan.strip_markers)
        except RowError as error:
            reject(str(error))
            continue
        examples.append(
            {
                "id": conversation_id(messages),
                "source": item.source,
                "messages": messages,
                "row": raw.row,
                "marker": messages != conversation,
                **carried,
            }
        )
    return examples, rejects


def _carried(value: Any, name: str, kind: pa.DataType) -> Any:
    if value is None:
        return None
    if pa.types.is_floating(kind):
        if not _is_number(value):
            raise RowError(f"the column {name!r} holds {value!r}, but numbers in the first rows")
        return float(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
