"""What the tasks of ingest do: sniff a file, stage its conversations, write a file of the corpus; no Ray."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpp.errors import RowError, UserError
from raydpp.ingest.conversation import Message, conversation_id, validated
from raydpp.ingest.files import RawFile, read_rows
from raydpp.ingest.rows import RawRow
from raydpp.ingest.schemas import ColumnNames, Schema, detect_schemas, is_missing, is_row, schema_of
from raydpp.storage import Folder
from raydpp.tables import corpus_schema, parquet_parts, read_columns, write_table

TABLE = "corpus"
STAGED = "_staged"
REJECTS = "rejects"
_WHOLE = "whole.json"  # beside what was staged of a file, once all of it was
_SNIFFED = 20  # readable rows that decide a file's schema
_CHUNK = 2_000  # rows of a raw file that are staged together


@dataclass(frozen=True)
class SniffedFile:
    """What the first rows of a file say; it has no schemas where none of them can be read."""

    file: RawFile
    source: str
    names: ColumnNames
    columns: tuple[str, ...]
    schemas: tuple[Schema, ...]
    numeric: dict[str, bool]  # of carried columns with values: whether all are numbers
    key: str = ""  # changes with the file and with what the user says of it
    staged: Mapping[str, Any] | None = None  # where it was staged before: what ``stage_file`` left in _WHOLE

    @property
    def schema_names(self) -> list[str]:
        return self.staged["schemas"] if self.staged else [schema.name for schema in self.schemas]

    @property
    def unused(self) -> list[str]:
        """The columns that no conversation is made of."""
        used = {name for schema in self.schemas for name in (*schema.columns, *schema.companions, "tools", "label")}
        return [name for name in self.columns if name not in used]

    def rows(self) -> Iterator[RawRow]:
        return read_rows(self.file, functools.partial(is_row, names=self.names))


def sniff(file: RawFile, source: str, names: ColumnNames, carry: Sequence[str]) -> SniffedFile:
    """Detect a file's schemas by its first readable rows; UserError where it has none that is known."""
    sniffed = SniffedFile(file, source, names, (), (), {})
    readable = (raw.value for raw in islice(sniffed.rows(), 100 * _SNIFFED) if raw.value is not None)
    rows = list(islice(readable, _SNIFFED))
    columns = tuple(dict.fromkeys(column for row in rows for column in row))
    values = {column: [row[column] for row in rows if row.get(column) is not None] for column in carry}
    numeric = {column: all(map(_is_number, held)) for column, held in values.items() if held}
    try:
        return replace(
            sniffed, columns=columns, schemas=detect_schemas(columns, names) if columns else (), numeric=numeric
        )
    except UserError as error:
        raise UserError(f"{file.url}: {error}") from None


def carried_types(files: Sequence[SniffedFile], carry: Sequence[str]) -> dict[str, pa.DataType]:
    """The types of the carried columns: numbers where all files hold numbers, else text."""
    if unseen := [column for column in carry if not any(column in sniffed.columns for sniffed in files)]:
        raise UserError(f"--carry {unseen[0]}: no file has this column")
    numeric = {column: [s.numeric[column] for s in files if column in s.numeric] for column in carry}
    return {column: pa.float64() if held and all(held) else pa.string() for column, held in numeric.items()}


@dataclass(frozen=True)
class IngestJob:
    """What every task has to know, and what it does with it."""

    files: tuple[SniffedFile, ...]
    carried: dict[str, pa.DataType]
    strip_markers: bool
    buckets: int  # files of the corpus
    out: Folder
    source_column: str | None = None

    @property
    def staged_schema(self) -> pa.Schema:
        """The corpus's columns, and where each conversation comes from: the key of a file, a row in it."""
        return pa.schema([*corpus_schema(self.carried), pa.field("_file", pa.string()), pa.field("_row", pa.int64())])

    def without_stale(self) -> IngestJob:
        """The same without what was staged of files when their carried columns had other types."""
        kept = [file.staged if file.staged and file.staged["carried"] == self._kinds else None for file in self.files]
        files = (replace(file, staged=staged) for file, staged in zip(self.files, kept, strict=True))
        return replace(self, files=tuple(files))

    @property
    def _kinds(self) -> dict[str, str]:
        return {name: str(kind) for name, kind in self.carried.items()}

    def stage_file(self, index: int) -> Iterator[dict[str, int]]:
        """Read one file; stage its conversations and rejects chunk by chunk, and yield each chunk's counts.

        Where all of it was staged before, only its counts.
        """
        sniffed = self.files[index]
        if sniffed.staged:
            yield sniffed.staged["counts"]
            return
        file, rows, totals = sniffed.file, sniffed.rows(), Counter[str]()
        while chunk := list(islice(rows, _CHUNK)):
            found = [(raw.row, result) for raw in chunk for result in self.convert_row(raw, index)]
            examples = [result for _, result in found if isinstance(result, dict)]
            reasons = [(row, result) for row, result in found if isinstance(result, str)]
            rejects = [{"file": file.url, "row": row, "id": None, "reason": reason} for row, reason in reasons]
            markers = sum(example.pop("_marker") for example in examples)
            # Named by where the chunk comes from: a task that runs twice writes the same files again, and no row twice.
            row = f"{chunk[0].row:012d}"
            if examples:
                table = pa.Table.from_pylist(examples, schema=self.staged_schema)
                write_table(self.out, f"{STAGED}/{sniffed.key}/{row}.parquet", table)
            if rejects:
                self.out.write_json_lines(f"{REJECTS}/{sniffed.key}-{row}.jsonl", rejects)
            counts = {"rows": len(chunk), "examples": len(found), "rejects": len(rejects), "markers": markers}
            totals.update(counts)
            yield counts
        facts = {"source": sniffed.source, "schemas": sniffed.schema_names, "carried": self._kinds, "counts": totals}
        self.out.write_json(f"{STAGED}/{sniffed.key}/{_WHOLE}", facts)

    def convert_row(self, raw: RawRow, index: int) -> Iterator[dict[str, Any] | str]:
        """The conversations of one row of a file; for one that cannot be used, the reason."""
        sniffed = self.files[index]
        if raw.value is None or not sniffed.schemas:
            yield raw.reason or "the file has no readable columns"
            return
        row = raw.value
        schema = schema_of(row, sniffed.schemas)
        try:
            conversations = schema.read(row)
            carried = {name: _carried(row.get(name), name, kind) for name, kind in self.carried.items()}
            source = self.source_column and _carried(row.get(self.source_column), self.source_column, pa.string())
            used = {*schema.columns, *schema.companions}
            unused = {name: value for name, value in row.items() if name not in used}
            extras = [_extra(unused, conversation) for conversation in conversations]
        except RowError as error:
            yield str(error)
            return
        for conversation, extra in zip(conversations, extras, strict=True):
            try:
                messages = validated(conversation, self.strip_markers)
            except RowError as error:
                yield str(error)
                continue
            identity = conversation_id(messages)
            yield {
                "id": identity,
                "source": source or sniffed.source,
                "messages": messages,
                "extra": extra,
                "_file": sniffed.key,
                "_row": raw.row,
                "_marker": any(a["content"] != b["content"] for a, b in zip(messages, conversation, strict=True)),
                **carried,
            }

    def write_buckets(self) -> Iterator[tuple[dict[str, int], int]]:
        """Write the corpus from all that was staged, bucket by bucket; what ``write_bucket`` returns of each."""
        staged = self.with_buckets(read_columns(parquet_parts(self.out.below(STAGED)), self.staged_schema.names))
        for bucket in staged["_bucket"].unique():
            yield self.write_bucket(staged.filter(pc.equal(staged["_bucket"], bucket)))

    def with_buckets(self, table: pa.Table) -> pa.Table:
        """Staged rows, and which file of the corpus each goes to."""
        buckets = [bucket_of(identity, self.buckets) for identity in table["id"].to_pylist()]
        return table.append_column("_bucket", pa.array(buckets, pa.int64()))

    def write_bucket(self, table: pa.Table) -> tuple[dict[str, int], int]:
        """Write one bucket's conversations, each once (its first row in the order of files), sorted by id.

        Returns:
            How many were kept of each source, and how many duplicates were dropped.
        """
        places = pc.index_in(table["_file"], pa.array([sniffed.key for sniffed in self.files]))
        table = table.set_column(table.column_names.index("_file"), "_file", places)
        table = table.sort_by([("id", "ascending"), ("_file", "ascending"), ("_row", "ascending")])
        name = f"part-{table['_bucket'][0].as_py():05d}"
        firsts: dict[str, dict[str, Any]] = {}
        kept, rejects = [], []
        for row in table.select(["id", "_file", "_row"]).to_pylist():
            first = firsts.setdefault(row["id"], row)
            kept.append(first is row)
            if first is not row:
                reason = f"an exact duplicate of row {first['_row']} of {self.files[first['_file']].file.url}"
                url = self.files[row["_file"]].file.url
                rejects.append({"file": url, "row": row["_row"], "id": row["id"], "reason": reason})
        if rejects:
            self.out.write_json_lines(f"{REJECTS}/duplicates-{name}.jsonl", rejects)
        corpus = table.filter(pa.array(kept)).select(corpus_schema(self.carried).names)
        write_table(self.out, f"{TABLE}/{name}.parquet", corpus)
        return dict(Counter(corpus["source"].to_pylist())), len(rejects)


def staging_key(file: RawFile, names: ColumnNames, *options: Any) -> str:
    """What was staged of a file is what would be staged of it now where this is the same: the file and all options."""
    said = [file.url, file.bytes, file.modified, asdict(names), *options]
    return hashlib.blake2b(json.dumps(said, sort_keys=True).encode(), digest_size=16).hexdigest()


def staged_before(out: Folder, key: str) -> Mapping[str, Any] | None:
    """What ``stage_file`` left of a file once all of it was staged."""
    text = out.read_text(f"{STAGED}/{key}/{_WHOLE}")
    return json.loads(text) if text else None


def forget_others(out: Folder, keys: Collection[str]) -> None:
    """Delete all that is of no file with one of these keys, and what is of all files: the corpus, the duplicates."""
    out.delete(TABLE)
    for folder in (STAGED, REJECTS):
        for name in out.below(folder).names() or ():
            if name.partition("-")[0] not in keys:
                out.delete(f"{folder}/{name}")


def bucket_of(identity: str, buckets: int) -> int:
    """Which file of the corpus an id belongs to: equal ranges of ids, in order."""
    return int(identity[:12], 16) * buckets >> 48


def _carried(value: Any, name: str, kind: pa.DataType) -> Any:
    if is_missing(value):
        return None
    if pa.types.is_floating(kind):
        if not _is_number(value):
            raise RowError(f"the column {name!r} holds {value!r}, but numbers in the first rows")
        try:
            return float(value)
        except OverflowError:
            raise RowError(f"the column {name!r} holds a number too large for a float") from None
    return _as_unicode(value, name) if isinstance(value, str) else _as_json(value, name)


def _extra(unused: Mapping[str, Any], conversation: Sequence[Message]) -> str | None:
    """The columns of a row that no conversation is made of, as one JSON object; under ``turns`` such keys of turns."""
    found = {name: value for name, value in unused.items() if not is_missing(value)}
    if any("rest" in message for message in conversation):
        found["turns"] = [message.get("rest", {}) for message in conversation]
    texts = {_as_unicode(name, name): _as_json(value, name) for name, value in found.items()}
    if not texts:
        return None
    return "{" + ", ".join(f"{json.dumps(name, ensure_ascii=False)}: {text}" for name, text in texts.items()) + "}"


def _as_json(value: Any, name: str) -> str:
    try:
        text = json.dumps(_strict(value), ensure_ascii=False, default=str)
    except (TypeError, ValueError, RecursionError):
        raise RowError(f"the column {name!r} holds what JSON cannot write") from None
    return _as_unicode(text, name)


def _strict(value: Any) -> Any:
    """A value as strict JSON has it: NaN and infinities are null, bytes Base64."""
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _as_unicode(text: str, name: str) -> str:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RowError(f"the column {name!r} has text that is not valid Unicode (a lone surrogate)") from None
    return text


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
