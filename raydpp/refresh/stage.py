"""refresh: raw files that come, change and go -> a new version of a selection; what is known already costs nothing."""

from __future__ import annotations

import inspect
import json
import logging
from collections.abc import Mapping
from typing import Any

from raydpp import runs
from raydpp.errors import UserError
from raydpp.extract.stage import extract as run_extract
from raydpp.ingest.files import list_files
from raydpp.ingest.stage import ingest as run_ingest
from raydpp.refresh.changes import compare_versions
from raydpp.refresh.lease import lease
from raydpp.refresh.versions import Versions
from raydpp.select.partition_cache import PartitionCache
from raydpp.select.stage import select as run_select
from raydpp.storage import Folder, absolute
from raydpp.tables import GRADIENTS, parquet_parts, read_columns

log = logging.getLogger(__name__)

CORPUS, TABLE, PARTITIONS = "corpus", "table", "partitions"

_OWN = {
    "ingest": {"inputs", "out", "incremental", "address"},
    "extract": {"corpus", "out", "model", "prune", "address", "dry_run"},
    "select": {
        *("table", "out", "size", "corpus", "complete", "arrivals", "scales_from", "partition_cache", "address"),
        *("dry_run", "preview", "feature_column"),
    },
}
"""The options of each stage that are refresh's to give."""


def refresh(
    inputs: list[str],
    out: str,
    model: str,
    size: int | float | None = None,
    *,
    keep: bool = False,
    add: int | None = None,
    retain: int = 3,
    ingest: dict[str, Any] | None = None,
    extract: dict[str, Any] | None = None,
    select: dict[str, Any] | None = None,
    address: str | None = None,
) -> runs.RunResult:
    """Bring a selection up to date with raw files that come, change and go: the nightly job.

    Only files that are new or have changed are read, only conversations that are new get gradients, only partitions
    with new ones are searched. OUT/versions holds each selection as raydpp select writes it, OUT/latest the name of the
    latest: a small file that is replaced when a new version is whole. OUT/changes says what each version changed. Where
    nothing has changed, nothing is loaded, and the version stays. Killed at any moment, it leaves OUT/latest as it was,
    and the next start goes on. Of two at once, the second ends with a message.

    What was read from a file that is gone, or is not among the inputs any more, disappears: from the corpus, the
    gradients, the new selection, and from all older versions, whose reports are deleted.

    Args:
        inputs: Files, folders or globs, as for raydpp ingest; all that the corpus is to be made of.
        model: As for raydpp extract.

    What to select:
        size: How many examples, as for raydpp select; it or a budget in --select is needed, but with --add.
        keep: Whether the picks of the last version stay as they are, and only what is missing to the budget is picked.
        add: Keep the picks of all versions, and pick so many more from what has come since: a daily selection, at the
            cost of what came that day.

    Options of the stages:
        ingest: Options of raydpp ingest by name, such as {source_column: domain}; here and below, best in a file for
            --config.
        extract: Options of raydpp extract, such as {dimension: 4096}. With others than the last time OUT/table must be
            deleted first, and all gradients are taken again.
        select: Options of raydpp select, such as {quality_weight: 0.3}. Scales that are measured, such as --gamma auto,
            are those of the first version.

    Scale:
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.

    Output:
        out: Folder to write; it must be new, empty, or that of earlier refreshes.
        retain: How many versions to keep, the latest among them.
    """
    given = inputs
    inputs, out = [absolute(url) for url in inputs], absolute(out)
    options = {"ingest": ingest or {}, "extract": extract or {}, "select": select or {}}
    config = {name: value for name, value in locals().items() if name not in ("given", "options")}
    if retain < 1:
        raise UserError(f"--retain {retain}: at least the latest version is kept")
    if add is not None and (keep or size is not None or add < 1):
        raise UserError(f"--add {add}: give a whole number above 0, and neither --keep nor --size beside it")
    typed = {name: checked(name, given_here) for name, given_here in options.items()}
    if size is None and add is None and not {"tokens", "min_log_gain"} & typed["select"].keys():
        raise UserError("no budget: give --size or --add, or tokens or min_log_gain in --select")
    what = {name: config[name] for name in ("model", "size", "keep", "add", "ingest", "extract", "select")}
    folder = Folder.at(out)
    runs.refuse_foreign(folder)
    with lease(folder):
        seen: list[Any] = [[file.url, file.bytes or 0, file.modified or 0] for file in list_files(inputs)]
        run = runs.resume("refresh", config, [*seen, what], free=[name for name in config if name != "out"])
        versions = Versions(run.out)
        if run.done and (latest := versions.latest):
            runs.load_finished(["select"], versions.folder(latest))
            return run.done
        run.claim({})
        read = run_ingest(given, folder.url_of(CORPUS), incremental=True, address=address, **typed["ingest"])
        log.info(read.summary)
        corpus = folder.url_of(CORPUS)
        table = run_extract(corpus, folder.url_of(TABLE), model, prune=True, address=address, **typed["extract"])
        log.info(table.summary)
        before = versions.latest
        made_from = {"corpus": _sizes(folder.below(CORPUS)), "table": _files(folder.below(TABLE)), "what": what}
        if before is None or _made_from(versions, before) != made_from:
            name = versions.next()
            chosen = _select(versions, before, name, size, keep, add, {**typed["select"], "address": address})
            if chosen.record["status"] == runs.INTERRUPTED:  # the picks so far are no version
                raise KeyboardInterrupt
            log.info(chosen.summary)
            versions.changes(name).write_json("made_from.json", made_from)
            runs.require_owner(run.out, run.record["owner"])
            versions.publish(name)
        return _finish(run, versions, retain, read, table, address)


def checked(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of a stage with the types of its parameters; those that refresh gives itself are refused."""
    from raydpp.cli import find_stage, stage_parser

    stage = find_stage(name)
    if own := sorted(_OWN[name] & options.keys()):
        raise UserError(f"{own[0]} among the options of {name}: refresh gives it itself")
    if unknown := sorted(options.keys() - inspect.signature(stage).parameters.keys()):
        raise UserError(f"{name} has no option {unknown[0]}: raydpp {name} --help lists them")
    parser = stage_parser(stage, f"raydpp {name}")
    values = vars(parser.parse_object(dict(options), _skip_required=True))
    return {option: values[option] for option in options}


def _select(
    versions: Versions,
    before: str | None,
    name: str,
    size: int | float | None,
    keep: bool,
    add: int | None,
    options: dict[str, Any],
) -> runs.RunResult:
    """Make a version from the table."""
    table, out = versions.out.url_of(TABLE), versions.folder(name).url
    if not {"exact", "partitions"} & options.keys():
        options["partition_cache"] = versions.out.url_of(PARTITIONS)
    if before is None:
        return run_select(table, out, size if add is None else add, **options)
    last = versions.folder(before)
    if add is None:
        options["complete" if keep else "scales_from"] = last.url
        return run_select(table, out, size, **options)
    known = runs.load_finished(["select"], last)["table_files"]
    # without arrivals, but with picks that are gone, what is left of the last version is the new one
    came = _files(versions.out.below(TABLE)).keys() - known.keys()
    return run_select(table, out, add if came else 1, complete=last.url, arrivals=bool(came), **options)


def _files(table: Folder) -> dict[str, int]:
    return {part.name: part.rows for part in parquet_parts(table.below(GRADIENTS))}


def _sizes(corpus: Folder) -> dict[str, int]:
    """What tells whether a corpus has changed where its conversations have not: other columns have."""
    names = corpus.files(".parquet")
    infos = corpus.system.get_file_info([name for name in names if name.startswith("corpus/")])
    return {info.base_name: info.size for info in infos}


def _made_from(versions: Versions, name: str) -> Any:
    return json.loads(versions.changes(name).read_text("made_from.json") or "null")


def _finish(
    run: runs.Run,
    versions: Versions,
    retain: int,
    read: runs.RunResult,
    table: runs.RunResult,
    address: str | None,
) -> runs.RunResult:
    """Erase what is gone from older versions, delete the oldest, and say what has changed."""
    living = read_columns(parquet_parts(run.out.below(f"{CORPUS}/corpus")), ["id"])["id"].combine_chunks()
    erased = versions.erase(living, read.record["counts"]["sources"])
    left = 0 if table.repeated else table.record["counts"]["dropped"]
    if left or erased:
        log.info("refresh: %d conversations left the corpus; %d picks of older versions were erased", left, erased)
    done = {name: 0 if table.repeated else table.record["timings"][name] for name in ("rows", "rejects", "tokens")}
    cost = {"new conversations": done["rows"] + done["rejects"], "tokens": done["tokens"]}
    changes = compare_versions(versions, cost, address)
    versions.retain(retain)
    made = runs.load_finished(["select"], versions.folder(changes.version))
    PartitionCache(run.out.below(PARTITIONS), "").keep_only(made["partition_cache"])
    facts = {"version": changes.version, "left": left, "erased": erased, "cost": cost}
    summary = (
        f"refresh: version {changes.version}, {changes.rows:,} examples, {len(changes.added):,} added,"
        f" {len(changes.removed):,} gone; gradients of {cost['new conversations']:,} conversations"
        f" -> {versions.folder(changes.version)}"
    )
    paths = [versions.folder(changes.version).url_of(file) for file in ("examples.jsonl", "report.html")]
    paths.append(versions.changes(changes.version).url_of("report.html"))
    tables = [one.record for one in changes.tables]
    return run.finish(summary, **facts, files=None, paths=paths, tables=tables)  # files have records of their own
