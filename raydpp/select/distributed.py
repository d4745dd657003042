"""Greedy MAP over a gradient table: by partition-and-merge with a certificate, or exactly, in rounds."""

from __future__ import annotations

import logging
import time
from dataclasses import replace

from raydpp.select.certificate import Certificate, certify
from raydpp.select.exact import exact_greedy
from raydpp.select.inputs import SelectionJob
from raydpp.select.partition_merge import distributed_greedy
from raydpp.select.request import Picked
from raydpp.tables import Part

log = logging.getLogger(__name__)


def greedy(
    job: SelectionJob, record: Part, *, exact: bool, oversample: float, certified: bool = True
) -> tuple[Picked, Certificate | None]:
    """Greedy over a table in partitions, and a certificate where something may have been lost.

    Where the picks of all partitions are used up before the budget is, since too many of them are copies of one
    another, exact rounds over what is left find the rest.

    Args:
        job: What to select.
        record: A Parquet file that keeps the picks of rounds.
        exact: Whether to search all partitions at once.
        oversample: How many times its share a partition hands in.
        certified: Whether to make the certificate.
    """
    if exact and job.request.objective.quality_weight < 1.0:
        return exact_greedy(job, record), None
    each = len(job.partitions) if exact else oversample  # by quality alone, each hands in as many as are wanted
    picked = distributed_greedy(job, each)
    if len(job.partitions) == 1 or picked.interrupted or not len(picked.rows):
        return picked, None
    if _short(job, picked):
        count = len(picked.rows)
        log.warning("%s: %d picks of partitions are not copies of others; looking for more", job.title, count)
        picked = exact_greedy(job, record, (picked.rows["id"].to_pylist(), picked.selection.log_gains.tolist()))
    if not certified or picked.interrupted:
        return picked, None
    began = time.monotonic()
    found = certify(job, picked)
    if found is not None:
        log.info("%s: %s", job.title, found)
    return replace(picked, seconds={**picked.seconds, "certificate": time.monotonic() - began}), found


def _short(job: SelectionJob, picked: Picked) -> bool:
    """Whether a merge ran out of picks that add something, though more were wanted."""
    request = job.request
    counts = request.budget.size is not None and request.budget.tokens is None and request.budget.min_log_gain is None
    return counts and request.objective.quality_weight < 1.0 and len(picked.rows) < (request.budget.size or 0)
