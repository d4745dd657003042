"""select: gradient table -> selection table, and the selected examples (partition-and-merge greedy DPP; Ray tasks)."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp import store
from raydpp.errors import UserError
from raydpp.filesystem import resolve
from raydpp.selection.greedy import Selection
from raydpp.selection.kernels import Kernel, KernelName
from raydpp.selection.partition import Request, budget, merge, select_rows, share
from raydpp.stages import run as runs
from raydpp.stages.cluster import connect, explain
from raydpp.stages.progress import Counter, progress_bar, reporter, watch
from raydpp.stages.tables import GRADIENTS, GradientTable, open_table
from raydpp.store import Part

log = logging.getLogger(__name__)

ROWS_PER_PARTITION = 16_384
OVERSAMPLE = 2.0


def select(
    table: str,
    out: str,
    size: int | float,
    *,
    kernel: KernelName = "rbf",
    gamma: float = 1.0,
    ridge: float | None = None,
    quality_weight: float = 0.0,
    quality_column: str = "response_tokens",
    partitions: int | None = None,
    oversample: float = OVERSAMPLE,
    corpus: str | None = None,
    feature_column: str = "gradient",
    address: str | None = None,
) -> runs.Outcome:
    """Select the subset worth training on: greedy MAP of a determinantal point process over the gradients.

    Each partition of the table (a set of its files, read by the task that works on it) picks more than its share;
    the picks of all partitions are selected from again. With one partition the result is exact greedy. OUT/selection
    holds the picks in order, OUT/examples.jsonl the conversations, ready to fine-tune on, OUT/gradients their rows of
    the gradient table. Every first part of the selection is the selection for a smaller budget.

    Args:
        table: Output folder of raydpp extract, or a Parquet file with the columns id and --feature-column.
        out: Folder to write; it must be new, empty, or this same run's.
        size: How many examples: a whole number, or a fraction of the table such as 0.1.
        kernel: Similarity of two examples: rbf, exp(-gamma ||x - y||^2), or cosine, <x, y>.
        gamma: Inverse squared length scale of the rbf kernel; larger counts only closer examples as similar.
        ridge: Added to the kernel's diagonal; default 0 for rbf, 0.1 for cosine.
        quality_weight: w, from 0 (diversity alone) to 1 (quality alone): the objective is
            (1 - w) log det K + w (sum of standardised quality).
        quality_column: The column of the table that says how good an example is; the longer the response the better,
            unless another is named.
        partitions: How many partitions; default one for every 16384 rows. At most the number of the table's files.
        oversample: How many times its share a partition picks; more loses less against exact greedy and costs more.
        corpus: Output folder of raydpp ingest to take the conversations from; default the one the table was made of.
        feature_column: The column with the features, where the table was not written by raydpp extract.
        address: Ray cluster to use; default RAY_ADDRESS, else a local one for this run.
    """
    config = dict(locals())
    if not 0 <= quality_weight <= 1:
        raise UserError(f"--quality-weight {quality_weight}: give a number from 0 (diversity) to 1 (quality)")
    if oversample < 1:
        raise UserError(f"--oversample {oversample}: below 1 the partitions hand in fewer picks than are wanted")
    if partitions is not None and partitions < 1:
        raise UserError(f"--partitions {partitions}: at least one is needed")
    similarity = Kernel(kernel, gamma, ridge)
    opened = open_table(table, feature_column)
    count = budget(size, opened.rows)
    if quality_weight < 1:
        similarity.check_budget(count, opened.dimension)
    corpus = corpus or opened.corpus
    corpus_run = runs.require(["ingest"], corpus) if corpus else None
    run = runs.begin("select", config, [{"table": opened.identity, "corpus": corpus_run and runs.identity(corpus_run)}])
    if run.done:
        return run.done

    connect(address)
    with explain():
        request = Request(similarity, opened.column)
        if quality_weight > 0:
            mean, std = quality_statistics(opened, quality_column)
            request = Request(similarity, opened.column, quality_column, quality_weight, mean, std)
        groups = store.partitions(opened.parts, partitions or store.partition_count(opened.rows, ROWS_PER_PARTITION))
        log.info("select: %d of %d examples, %d partitions", count, opened.rows, len(groups))
        picks, selection = distributed_greedy(opened, groups, count, request, oversample, "select")
        _write(run, picks, selection, request)
        if corpus:
            _write_examples(run.path("examples.jsonl"), corpus, picks["id"].to_pylist())
    how = "exact greedy" if len(groups) == 1 else f"{len(groups)} partitions"
    summary = (
        f"select: {len(picks):,} of {opened.rows:,} examples of {opened.name} by {how},"
        f" log det {selection.log_det:,.2f} nats -> {run.out}"
    )
    if selection.stopped:
        log.warning("select: %s", selection.stopped)
        summary += f" ({selection.stopped})"
    return run.finish(
        summary,
        fingerprint=opened.fingerprint,
        corpus=corpus,
        feature_column=opened.column,
        counts={"in": opened.rows, "asked": count, "rows": len(picks), "partitions": len(groups)},
        log_det=selection.log_det,
        stopped=selection.stopped,
    )


def quality_statistics(table: GradientTable, column: str) -> tuple[float, float]:
    """Mean and population standard deviation of a column over the whole table."""
    import ray
    from ray.data.aggregate import Mean, Std

    store.read_columns(table.parts[:1], [column])  # says in words where there is no such column
    system, _ = resolve(table.parts[0].url)
    paths = [resolve(part.url)[1] for part in table.parts]
    values = ray.data.read_parquet(paths, filesystem=system).select_columns([column])
    found = values.aggregate(Mean(column, alias_name="mean"), Std(column, ddof=0, alias_name="std"))
    return float(found["mean"]), float(found["std"])


def distributed_greedy(
    table: GradientTable,
    groups: list[list[Part]],
    size: int,
    request: Request,
    oversample: float,
    title: str,
) -> tuple[pa.Table, Selection]:
    """Greedy inside each group of files, then over the union of their picks; nothing but the result comes here.

    Returns:
        The picked rows in the order of picking, and the selection over the union.
    """
    import ray

    counter = ray.remote(num_cpus=0)(Counter).remote()
    threads = max([1, *(int(node["Resources"].get("CPU", 1)) for node in ray.nodes() if node["Alive"])])
    local = share(size, len(groups), oversample)
    total = size if len(groups) == 1 else sum(min(local, sum(p.rows for p in group)) for group in groups) + size
    options: dict[str, Any] = {"max_retries": 3, "retry_exceptions": [OSError]}
    with progress_bar(title, total, "picks") as bar:
        first = ray.remote(**options)(_select_partition)
        parts = [
            first.remote(table, group, local, request, counter, threads if len(groups) == 1 else 1) for group in groups
        ]
        watch(parts, counter, bar)
        if len(groups) == 1:
            chosen = parts[0]
        else:
            chosen = ray.remote(**options)(_merge).remote(size, request, counter, threads, *parts)
            watch([chosen], counter, bar)
        picks, selection = ray.get(chosen)
        bar.n = bar.total
        bar.update(0)
    return picks, selection


def _select_partition(
    table: GradientTable, parts: list[Part], size: int, request: Request, counter: Any, threads: int
) -> tuple[pa.Table, Selection]:
    import torch

    torch.set_num_threads(threads)
    return select_rows(table.read(parts), size, request, reporter(counter))


def _merge(
    size: int, request: Request, counter: Any, threads: int, *parts: tuple[pa.Table, Selection]
) -> tuple[pa.Table, Selection]:
    import torch

    torch.set_num_threads(threads)
    return merge([picks for picks, _ in parts], size, request, reporter(counter))


def _write(run: runs.Run, picks: pa.Table, selection: Selection, request: Request) -> None:
    scores = request.scores(picks)
    columns = {
        "rank": np.arange(1, len(picks) + 1),
        "id": picks["id"],
        "source": picks["source"] if "source" in picks.column_names else pa.nulls(len(picks), pa.string()),
        "log_gain": selection.log_gains,
        "log_det": np.cumsum(selection.log_gains),
        "quality": pa.nulls(len(picks), pa.float64()) if scores is None else scores,
    }
    store.write_table(run.path("selection", "selection.parquet"), pa.table(columns, schema=store.SELECTION_SCHEMA))
    store.write_table(run.path(GRADIENTS, "part-00000.parquet"), picks)


def _write_examples(url: str, corpus: str, ids: list[str]) -> None:
    """The selected conversations, in the order of picking; the corpus is filtered where it is read."""
    import ray

    wanted = ray.put(pa.array(ids))
    parts = store.parquet_parts(store.join(corpus, "corpus"))
    system, _ = resolve(parts[0].url)
    found = ray.data.read_parquet([resolve(part.url)[1] for part in parts], filesystem=system).map_batches(
        lambda rows: rows.filter(pc.is_in(rows["id"], ray.get(wanted))),
        batch_format="pyarrow",
        batch_size=None,
    )
    rows = {row["id"]: row for row in found.iter_rows()}
    if missing := [identity for identity in ids if identity not in rows]:
        raise UserError(
            f"{len(missing)} of the selected examples are not in {corpus} (first: {missing[0]}): give the corpus that"
            " the gradient table was made of with --corpus"
        )
    store.write_json_lines(
        url,
        ({"messages": rows[i]["messages"], **{k: v for k, v in rows[i].items() if k != "messages"}} for i in ids),
    )
