"""ingest: raw files of any schema -> corpus table.

Two passes, because equal conversations from different files meet only once all files were read. The first reads every
file row by row and stages its conversations in ``_staged``, its rejects in ``rejects``; what was staged whole is not
read again. The second gathers what was staged by ranges of ids, drops the duplicates and writes a file of the corpus
for each range. A small input takes both in this process; for a large one, or where a cluster is named, tasks of Ray
Data call the same functions.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from raydpp import runs
from raydpp.cluster import connect, named_cluster, unwrap_task_errors
from raydpp.errors import UserError
from raydpp.metrics import count
from raydpp.progress import progress_bar
from raydpp.storage import absolute

if TYPE_CHECKING:
    from raydpp.ingest.convert import IngestJob, SniffedFile
    from raydpp.ingest.files import RawFile

log = logging.getLogger(__name__)

_OWN_COLUMNS = frozenset({"id", "source", "messages", "extra", "_file", "_row", "_bucket", "_marker"})
_FILE_BYTES = 32 * 2**20  # raw input for one file of the corpus
_LARGE = 64 * 2**20  # bytes of raw input that are worth a cluster: starting one takes longer than reading less


def ingest(
    inputs: list[str],
    out: str,
    *,
    prompt_column: list[str] | None = None,
    response_column: list[str] | None = None,
    system_column: list[str] | None = None,
    messages_column: list[str] | None = None,
    take: Literal["chosen", "rejected"] | None = None,
    role: list[str] | None = None,
    source: list[str] | None = None,
    source_column: str | None = None,
    carry: list[str] | None = None,
    strip_markers: bool = True,
    files: int | None = None,
    incremental: bool = False,
    address: str | None = None,
) -> runs.RunResult:
    """Read raw instruction files of any known schema into one corpus of conversations.

    Schemas are detected row by row among those that a file shows: messages (OpenAI chat), conversations (ShareGPT),
    Alpaca, Dolly, instruction/response, prompt/completion (TRL's of texts or turns, KTO), question/answer,
    self-instruct, preferences with --take. Context, passages, history and reasoning beside them are used. Exact
    duplicates are dropped; they and the rows that cannot be used go to OUT/rejects with their file, row and reason.
    OUT/corpus holds the rest in the order of their ids, which are hashes: every file is a random part of the corpus.
    Columns that no conversation is made of are kept in the column extra, and selections give them back.

    Args:
        inputs: Files, folders or globs of .jsonl, .json, .csv, .tsv (each also .gz, .zst, .bz2), .parquet or .arrow
            (what save_to_disk of datasets writes), local or by URL (s3://, gs://, hf://datasets/...).

    Columns of the input:
        prompt_column: The column with the prompt, where it has another name than in the known schemas. Here and below,
            GLOB=NAME names it for some files only: 'gsm/*.jsonl=problem'.
        response_column: The column with the response.
        system_column: The column with the system prompt.
        messages_column: The column with a list of messages or turns.
        take: Of preferences (chosen and rejected, with or without a prompt), the answer to read.
        role: Names of speakers that are not known, and their roles: Patient=user Doctor=assistant.
        source: Names of sources and the files they are for: gsm='gsm8k/*.jsonl'; default what tells the files' paths
            apart, shards of one set being one source.
        source_column: The column that holds the source of each row; where it is empty, the file's.
        carry: Columns to carry along into the corpus as columns of their own, of numbers or of text; empty where a row
            does not have them.
        strip_markers: Whether a literal end-of-text marker that ends a response (<|endoftext|>, </s>, <|im_end|>,
            <|eot_id|>, <end_of_turn>) is removed: chat templates write their own.

    Scale:
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run, or none where the input has
            less than 64 MiB.

    Output:
        out: Folder to write; it must be new, empty, or this same run's.
        files: Number of files of the corpus; default one for every 32 MiB of input, at least 8.
        incremental: Whether to keep what was read of each file in OUT/_staged, which takes as much disk again. The same
            command then reads only files that are new or have changed since, and drops the conversations of those
            that are gone. Its options may differ: files are read again where one that concerns them does.
    """
    given = [*inputs, out]
    inputs, out = [absolute(url) for url in inputs], absolute(out)
    config = {name: value for name, value in locals().items() if name != "given"}
    if files is not None and files < 1:
        raise UserError(f"--files {files}: at least one file is needed")
    if taken := sorted(_OWN_COLUMNS & set(carry or ())):
        raise UserError(f"--carry {taken[0]}: ingest has a column of its own with this name")
    from raydpp.ingest.convert import (
        REJECTS,
        STAGED,
        IngestJob,
        SniffedFile,
        carried_types,
        forget_others,
        sniff,
        staged_before,
        staging_key,
    )
    from raydpp.ingest.files import list_files
    from raydpp.ingest.schemas import ColumnNames, checked_roles
    from raydpp.ingest.sources import name_sources, ruled_sources, value_for

    roles = checked_roles(role or ())
    found = list_files(inputs)
    urls, rules = [file.url for file in found], source or ()
    ruled, sources = ruled_sources(urls, rules), name_sources(urls, rules)
    columns = {
        "prompt": prompt_column,
        "response": response_column,
        "system": system_column,
        "messages": messages_column,
    }
    named = [
        ColumnNames(
            **{name: value_for(url, said or (), f"--{name}-column") for name, said in columns.items()},
            take=take,
            roles=roles,
        )
        for url in urls
    ]
    keys = [
        staging_key(file, names, ruled.get(file.url), strip_markers, source_column, carry)
        for file, names in zip(found, named, strict=True)
    ]
    if incremental:
        run = runs.resume("ingest", config, keys, free=[name for name in config if name != "out"])
    else:
        run = runs.begin("ingest", config, [[file.url, file.bytes or 0] for file in found], keep=True)
    if run.done:
        return run.done
    if run.old:
        run.claim({})

    def look(file: RawFile, names: ColumnNames, key: str) -> SniffedFile:
        before = staged_before(run.out, key)
        if before and not carry and not source_column:
            return SniffedFile(file, before["source"], names, (), (), {}, key, before)
        return replace(sniff(file, sources[file.url], names, carry or ()), key=key, staged=before)

    with ThreadPoolExecutor(16) as pool:  # a few rows of each: waiting, not computing
        sniffed = tuple(pool.map(look, found, named, keys))
    if source_column and not any(source_column in file.columns for file in sniffed):
        raise UserError(f"--source-column {source_column}: no file has this column")
    buckets = files or max(8, math.ceil(sum(file.bytes or 0 for file in found) / _FILE_BYTES))
    carried = carried_types(sniffed, carry or ())
    job = IngestJob(sniffed, carried, strip_markers, buckets, run.out, source_column).without_stale()
    fresh = [file for file in job.files if not file.staged]
    if len(fresh) < len(found):
        log.info("ingest: %d of %d files are to be read, the others were before", len(fresh), len(found))
    _report_schemas(fresh)
    if on_cluster := needs_cluster(found, address):
        connect(address, given)
    with unwrap_task_errors() if on_cluster else nullcontext():
        staged = _stage(job, on_cluster)
        if staged["rejects"] == staged["examples"]:
            raise UserError(f"no row of the input can be used: {run.out.url_of(REJECTS)} says why for each")
        forget_others(run.out, keys)
        kept, duplicates = _write(job, staged["examples"] - staged["rejects"], on_cluster)
    if not incremental:
        run.out.delete(STAGED)
    rows = kept.total()
    if rows + duplicates + staged["rejects"] != staged["examples"]:
        raise RuntimeError(f"{staged} were read, but {rows} kept and {duplicates} dropped as duplicates")
    if staged["markers"]:
        log.info("ingest: %d responses ended with an end-of-text marker, which was removed", staged["markers"])
    further = staged["examples"] - staged["rows"]
    summary = (
        f"ingest: {staged['rows']:,} rows in{f' (+ {further:,} from rows with several)' if further else ''}"
        f" = {rows:,} kept + {duplicates:,} duplicates + {staged['rejects']:,} rejects"
        f", {len(kept)} source{'s' * (len(kept) > 1)} -> {run.out}"
    )
    counts = {**staged, "kept": rows, "duplicates": duplicates, "sources": dict(sorted(kept.items()))}
    return run.finish(summary, counts=counts, schemas={file.file.url: file.schema_names for file in job.files})


def needs_cluster(files: Sequence[RawFile], address: str | None) -> bool:
    """Whether Ray reads the input: a cluster is named, or the input is large, or nobody knows how large it is."""
    size = sum(_LARGE if file.bytes is None else file.bytes for file in files)
    return size >= _LARGE or bool(named_cluster(address))


def _report_schemas(files: Sequence[SniffedFile]) -> None:
    """Log what schema the files have, in one line if it is the same; the files without one are named."""
    names: dict[str, list[str]] = {}
    for sniffed in files:
        if sniffed.schemas:
            names.setdefault(" or ".join(schema.name for schema in sniffed.schemas), []).append(sniffed.file.name)
        else:
            log.info("ingest: %s: no readable row", sniffed.file.url)
    for schema, found in names.items():
        few = f" ({', '.join(found)})" if len(names) > 1 and len(found) <= 3 else ""
        log.info("ingest: %d file%s: %s%s", len(found), "s" * (len(found) > 1), schema, few)
    if unused := sorted({name for sniffed in files for name in sniffed.unused}):
        log.info("ingest: of no use to the conversations, and kept in the column extra: %s", ", ".join(unused))


def _stage(job: IngestJob, on_cluster: bool) -> Counter[str]:
    """The first pass: read all files; the counts of what was staged."""
    chunks: Iterable[dict[str, int]]
    if on_cluster:
        import ray

        numbers = ray.data.range(len(job.files), override_num_blocks=len(job.files))
        chunks = numbers.flat_map(lambda row: job.stage_file(int(row["id"]))).iter_rows()
    else:
        chunks = itertools.chain.from_iterable(map(job.stage_file, range(len(job.files))))
    totals: Counter[str] = Counter()
    with progress_bar("ingest: reading", None, "rows") as bar:
        for chunk in chunks:
            bar.update(chunk["rows"])
            for name in ("rows", "rejects"):
                count(name, chunk[name])
            totals.update(chunk)
    if not totals["rows"]:
        raise UserError("the input has no rows")
    return totals


def _write(job: IngestJob, rows: int, on_cluster: bool) -> tuple[Counter[str], int]:
    """The second pass: gather what was staged by bucket and write the corpus; rows kept by source, and duplicates."""
    kept: Counter[str] = Counter()
    duplicates = 0
    with progress_bar("ingest: writing", rows, "rows") as bar:
        for sources, dropped in _write_by_ray(job) if on_cluster else job.write_buckets():
            bar.update(sum(sources.values()) + dropped)
            kept.update(sources)
            duplicates += dropped
    return kept, duplicates


def _write_by_ray(job: IngestJob) -> Iterator[tuple[dict[str, int], int]]:
    import ray

    from raydpp.ingest.convert import STAGED

    # One partition for each file of the corpus: Ray's default of 200 takes longer than the work in them.
    staged = ray.data.read_parquet(STAGED, filesystem=job.out.system, file_extensions=["parquet"])
    buckets = staged.map_batches(job.with_buckets, batch_format="pyarrow").groupby(
        "_bucket", num_partitions=job.buckets
    )
    counts = buckets.map_groups(lambda table: {"counts": [json.dumps(job.write_bucket(table))]}, batch_format="pyarrow")
    return (json.loads(row["counts"]) for row in counts.iter_rows())
