"""ingest: raw files of any schema -> corpus table (CPU; Ray Data).

Two passes. The first reads every file once, row by row, and sets conversations aside in ``_staging`` and rejects in
``rejects``. The second shuffles the conversations by id, so that equal ones meet, drops the doubles, and writes.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from raydpp import runs
from raydpp.cluster import connect, explain
from raydpp.errors import UserError
from raydpp.ingest.convert import IngestJob, convert_row, sniff
from raydpp.ingest.files import RawFile, list_files, read_rows
from raydpp.ingest.schemas import ColumnNames, detect_schema
from raydpp.progress import progress_bar
from raydpp.storage import Folder, absolute
from raydpp.tables import corpus_schema, write_table

log = logging.getLogger(__name__)

TABLE = "corpus"
STAGING = "_staging"
_CHUNK = 2_000  # rows of a raw file that are set aside together
_FILE_BYTES = 32 * 2**20  # raw input for one file of the corpus


def ingest(
    inputs: list[str],
    out: str,
    *,
    prompt_column: str | None = None,
    response_column: str | None = None,
    system_column: str | None = None,
    messages_column: str | None = None,
    carry: list[str] | None = None,
    strip_markers: bool = True,
    files: int | None = None,
    address: str | None = None,
) -> runs.Outcome:
    """Read raw instruction files of any known schema into one corpus of conversations.

    Schemas are recognised file by file: messages (OpenAI chat), conversations (ShareGPT), Alpaca, Dolly,
    instruction/response, prompt/completion, question/answer, self-instruct. Exact duplicates are dropped; they and the
    rows that cannot be used go to OUT/rejects with their file, row and reason. OUT/corpus holds the rest in the order
    of their ids, which are hashes: every file is a random part of the corpus.

    Args:
        inputs: Files, folders or globs of .jsonl, .json, .csv, .tsv (each also .gz, .zst, .bz2) or .parquet, local or
            by URL (s3://, gs://, ...).
        out: Folder to write; it must be new, empty, or this same run's.
        prompt_column: The column with the prompt, where it has another name than in the known schemas.
        response_column: The column with the response.
        system_column: The column with the system prompt.
        messages_column: The column with a list of messages or turns.
        carry: Columns to carry along into the corpus; empty where a row does not have them.
        strip_markers: Whether a literal end-of-text marker that ends a response (<|endoftext|>, </s>, <|im_end|>,
            <|eot_id|>, <end_of_turn>) is removed: chat templates write their own.
        files: Number of files of the corpus; default one for every 32 MiB of input, at least 8.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
    """
    given = [*inputs, out]
    inputs, out = [absolute(url) for url in inputs], absolute(out)
    config = {name: value for name, value in locals().items() if name != "given"}
    if files is not None and files < 1:
        raise UserError(f"--files {files}: at least one file is needed")
    if taken := sorted({"id", "source", "messages"} & set(carry or ())):
        raise UserError(f"--carry {taken[0]}: the corpus has a column of its own with this name")
    found = list_files(inputs)
    run = runs.begin("ingest", config, [[file.url, file.bytes] for file in found])
    if run.done:
        return run.done
    buckets = files or max(8, math.ceil(sum(file.bytes for file in found) / _FILE_BYTES))
    connect(address, given)
    with explain():
        names = ColumnNames(prompt_column, response_column, system_column, messages_column)
        plan = _plan(found, names, tuple(carry or ()), strip_markers, run.out)
        staged = _stage(plan)
        kept = _shuffle(plan, staged["examples"] - staged["rejects"], buckets)
    run.out.delete(STAGING)
    duplicates = kept.pop("duplicates")
    rows = sum(kept.values())
    if rows + duplicates + staged["rejects"] != staged["examples"]:
        raise RuntimeError(f"{staged} were read, but {rows} kept and {duplicates} dropped as duplicates")
    if not rows:
        raise UserError(f"no row of the input can be used: {run.out.url_of('rejects')} says why for each")
    if staged["markers"]:
        log.info(
            "ingest: %d responses ended with a literal end-of-text marker, which was removed",
            staged["markers"],
        )
    further = staged["examples"] - staged["rows"]
    summary = (
        f"ingest: {staged['rows']:,} rows in{f' (+ {further:,} from rows with several)' if further else ''}"
        f" = {rows:,} kept + {duplicates:,} duplicates + {staged['rejects']:,} rejects"
        f", {len(kept)} source{'s' * (len(kept) > 1)} -> {run.out}"
    )
    counts = {**staged, "kept": rows, "duplicates": duplicates, "sources": dict(sorted(kept.items()))}
    return run.finish(summary, counts=counts, formats={item.file.url: item.format_name for item in plan.files})


def _plan(
    found: Sequence[RawFile], names: ColumnNames, carry: tuple[str, ...], strip_markers: bool, out: Folder
) -> IngestJob:
    import ray

    looks = ray.data.range(len(found), override_num_blocks=len(found)).map(
        lambda row: {"id": row["id"], "look": sniff(found[row["id"]], names, carry)}
    )
    files = tuple(row["look"] for row in sorted(looks.iter_rows(), key=lambda row: row["id"]))
    for item in files:
        if item.error:
            raise UserError(f"{item.file.url}: {item.error}")
        log.info("ingest: %s: %s", item.file.url, item.format_name or "no readable row")
    if unseen := [name for name in carry if not any(name in item.columns for item in files)]:
        raise UserError(f"--carry {unseen[0]}: no file has this column")
    texts = frozenset().union(*(item.texts for item in files))
    numbers = frozenset().union(*(item.numbers for item in files)) - texts
    return IngestJob(
        files, names, {c: pa.float64() if c in numbers else pa.string() for c in carry}, strip_markers, out
    )


def _stage(plan: IngestJob) -> Counter[str]:
    import ray

    totals: Counter[str] = Counter()
    chunks = ray.data.range(len(plan.files), override_num_blocks=len(plan.files)).map_batches(
        functools.partial(stage_file, plan=plan), batch_size=1
    )
    with progress_bar("ingest: reading", None, "rows") as bar:
        for chunk in chunks.iter_rows():
            bar.update(chunk["rows"])
            totals.update({name: int(count) for name, count in chunk.items()})
    if not totals["rows"]:
        raise UserError("the input has no rows")
    return totals


def stage_file(batch: dict[str, Any], plan: IngestJob) -> Iterator[dict[str, list[int]]]:
    """Read one file; set its conversations aside, chunk by chunk, and yield each chunk's counts.

    Files are named by where the chunk comes from: a task that is repeated writes the same files again.
    """
    index = int(batch["id"][0])
    item = plan.files[index]
    form = detect_schema(item.columns, plan.names) if item.columns else None
    rows = read_rows(item.file)
    while chunk := list(itertools.islice(rows, _CHUNK)):
        name = f"{index:06d}-{chunk[0].row:012d}"
        examples: list[dict[str, Any]] = []
        rejects: list[dict[str, Any]] = []
        markers = 0
        for raw in chunk:
            good, bad = convert_row(raw, form, item, plan)
            markers += sum(example.pop("marker") for example in good)
            examples += [example | {"file": index} for example in good]
            rejects += bad
        if examples:
            table = pa.Table.from_pylist(examples, schema=plan.schema)
            write_table(plan.out, f"{STAGING}/{name}.parquet", table)
        if rejects:
            plan.out.write_json_lines(f"rejects/{name}.jsonl", rejects)
        yield {
            "rows": [len(chunk)],
            "examples": [len(examples) + len(rejects)],
            "rejects": [len(rejects)],
            "markers": [markers],
        }


def bucket_of(identity: str, buckets: int) -> int:
    """Which file of the corpus an id belongs to: equal ranges of ids, in order."""
    return int(identity[:12], 16) * buckets >> 48


def _shuffle(plan: IngestJob, rows: int, buckets: int) -> Counter[str]:
    """Gather the conversations by bucket and write each as a file; counts of kept rows by source, and duplicates."""
    import ray

    totals: Counter[str] = Counter({"duplicates": 0})
    if not rows:
        return totals
    written = (
        ray.data.read_parquet(STAGING, filesystem=plan.out.system)
        .map_batches(functools.partial(_with_bucket, buckets=buckets), batch_format="pyarrow")
        .groupby("bucket")
        .map_groups(functools.partial(write_bucket, plan=plan), batch_format="pyarrow")
    )
    with progress_bar("ingest: writing", rows, "rows") as bar:
        for row in written.iter_rows():
            counts = json.loads(row["counts"])
            bar.update(sum(counts.values()))
            totals.update(counts)
    return totals


def _with_bucket(table: pa.Table, buckets: int) -> pa.Table:
    values = pa.array([bucket_of(identity, buckets) for identity in table["id"].to_pylist()], pa.int64())
    return table.set_column(table.schema.get_field_index("bucket"), "bucket", values)


def write_bucket(table: pa.Table, plan: IngestJob) -> pa.Table:
    """One bucket's conversations: sorted by id, each id once (its first row in the order of files), written whole."""
    table = table.sort_by([("id", "ascending"), ("file", "ascending"), ("row", "ascending")])
    ids = table["id"].to_pylist()
    first = [index == 0 or ids[index] != ids[index - 1] for index in range(len(ids))]
    kept = table.filter(pa.array(first))
    doubles = table.filter(pa.array([not is_first for is_first in first]))
    name = f"part-{table['bucket'][0].as_py():05d}"
    if doubles.num_rows:
        origin = {row["id"]: row for row in kept.select(["id", "file", "row"]).to_pylist()}
        rejects = [
            {
                "file": plan.files[row["file"]].file.url,
                "row": row["row"],
                "id": row["id"],
                "reason": "an exact duplicate of row {} of {}".format(
                    origin[row["id"]]["row"], plan.files[origin[row["id"]]["file"]].file.url
                ),
            }
            for row in doubles.select(["id", "file", "row"]).to_pylist()
        ]
        plan.out.write_json_lines(f"rejects/duplicates-{name}.jsonl", rejects)
    corpus = kept.select(corpus_schema(plan.carried).names)
    write_table(plan.out, f"{TABLE}/{name}.parquet", corpus)
    counts = {item["values"]: item["counts"] for item in pc.value_counts(kept["source"]).to_pylist()}
    return pa.table({"counts": [json.dumps(counts | {"duplicates": doubles.num_rows})]})
