"""Greedy MAP over a gradient table: by partition-and-merge with a certificate, or exactly, in rounds."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from raydpp.select.certificate import Certificate, certify
from raydpp.select.exact import exact_greedy
from raydpp.select.inputs import Owned
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.plan import ROWS_PER_PARTITION
from raydpp.select.request import Picked, Request
from raydpp.tables import GradientTable, Part, partition_count, partition_files

log = logging.getLogger(__name__)

_LEAST_ROWS = 4_096
_ENOUGH_SHARDS = 64  # from here on, shards get more threads: each costs the rounds a call and some contenders


def partitioned(table: GradientTable, partitions: int | None, exact: bool) -> list[list[Part]]:
    """A table's files in so many partitions; by default one for every ``ROWS_PER_PARTITION`` rows, or for exact rounds
    one for every CPU that has a few thousand rows to work on, or every node where there are many."""
    import ray

    if partitions is None and exact:
        cpus = max(1, int(ray.cluster_resources().get("CPU", 1)))
        nodes = sum(1 for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU"))
        partitions = min(cpus, max(nodes, _ENOUGH_SHARDS), partition_count(table.rows, _LEAST_ROWS))
    return partition_files(table.parts, partitions or partition_count(table.rows, ROWS_PER_PARTITION))


def greedy(
    table: GradientTable,
    groups: list[list[Part]],
    request: Request,
    have: Owned,
    record: str,
    *,
    exact: bool,
    oversample: float,
    certified: bool = True,
    title: str = "select",
) -> tuple[Picked, Certificate | None]:
    """Greedy over a table in partitions, and a certificate where something may have been lost.

    Where the picks of all partitions are used up before the budget is, since too many of them are copies of one
    another, exact rounds over what is left find the rest.

    Args:
        table: The table.
        groups: Its files, in partitions.
        request: What to select by.
        have: What is owned and excluded.
        record: URL of a Parquet file that keeps the picks of rounds.
        exact: Whether to search all partitions at once.
        oversample: How many times its share a partition hands in.
        certified: Whether to make the certificate.
        title: Of the progress bars.
    """
    if exact and request.objective.quality_weight < 1.0:
        return exact_greedy(table, groups, request, title, record, have.features, have.excluded, have.count), None
    each = len(groups) if exact else oversample  # by quality alone, each hands in as many as are wanted
    picked = distributed_greedy(table, groups, request, each, title, have.features, have.excluded, have.count)
    if len(groups) == 1 or picked.interrupted or not len(picked.rows):
        return picked, None
    if _short(picked, request):
        log.warning("%s: %d picks of partitions are not copies of others; looking for more", title, len(picked.rows))
        start = picked.rows["id"].to_pylist(), picked.selection.log_gains.tolist()
        picked = exact_greedy(table, groups, request, title, record, have.features, have.excluded, have.count, start)
    if not certified or picked.interrupted:
        return picked, None
    began = time.monotonic()
    found = certify(table, groups, request, picked, title, have.features, have.excluded, have.count)
    if found is not None:
        log.info("%s: %s", title, found)
    return replace(picked, seconds={**picked.seconds, "certificate": time.monotonic() - began}), found


def _short(picked: Picked, request: Request) -> bool:
    """Whether a merge ran out of picks that add something, though more were wanted."""
    budget = request.budget
    counts = budget.tokens is None and budget.min_log_gain is None and request.objective.quality_weight < 1.0
    return counts and len(picked.rows) < (budget.size or 0)
