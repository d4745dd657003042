"""The measures beside the log-det distance: computed by tasks, shown, and written for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from raydpp.cluster import Here
from raydpp.diversity.measures import NEIGHBOURS, SAMPLE, measures
from raydpp.dpp.kernels import Kernel
from raydpp.report.table import Table
from raydpp.storage import Folder
from raydpp.tables import GradientTable, vectors

if TYPE_CHECKING:
    from raydpp.report.html import Section

_HEADINGS = {
    "table": "table",
    "examples": "rows",
    "Vendi": "vendi_1",
    "Vendi, q = 2": "vendi_2",
    "q = ∞": "vendi_inf",
    "cosine distance": "cosine_distance",
    "NovelSum": "novel_sum",
    "nearest cosine": "nearest_cosine",
    "10th nearest": "tenth_cosine",
    "near duplicates": "near_duplicates",
    "cluster entropy": "cluster_entropy",
}


def submit_measures(tasks: Here, tables: Sequence[GradientTable], reference: GradientTable | None = None) -> list[Any]:
    """A task's reference to the measures of each table; samples are as large as the smallest one's.

    A sample of ``reference`` tells NovelSum's densities.
    """
    sample = max(2, min(SAMPLE, *(table.rows for table in tables)))
    if reference and reference.rows <= NEIGHBOURS:  # too few to tell a density
        reference = None
    threads = max(1, tasks.threads // len(tables))
    references = []
    for table in tables:
        moments = min(table.rows, table.dimension) * table.dimension
        file = max(part.rows for part in table.parts) * table.dimension
        memory = 24 * moments + 8 * sample * table.dimension + 3 * file * table.kind.value_type.bit_width // 8
        references.append(tasks.submit(_measure, table, sample, threads, reference, memory=memory))
    return references


def _measure(table: GradientTable, sample: int, threads: int, reference: GradientTable | None) -> dict[str, Any]:
    torch.set_num_threads(threads)
    blocks = (vectors(table.read([part])[table.column]) for part in table.parts)
    densities = reference.sample(SAMPLE) if reference else None
    return asdict(measures(blocks, sample=sample, reference=densities))


def measures_section(found: Mapping[str, Mapping[str, Any]], order: Sequence[str]) -> Section:
    """The table of the measures of tables by name, in some order, and what they mean."""
    from raydpp.report.html import Section

    sampled = found[order[0]]["sampled"]
    rows = [{"table": name, **found[name]} for name in order]
    table = Table(
        f"Other measures (from NovelSum on of {sampled:,} examples each)",
        list(_HEADINGS),
        [[one[name] for name in _HEADINGS.values()] for one in rows],
    )
    text = (
        "The Vendi score is how many examples with nothing in common the table is worth, by Shannon's entropy of the"
        " kernel's spectrum (G-Vendi where features are gradients); at q = 2 and ∞ frequent kinds of examples count"
        " more. Cosine distance is the mean over all pairs. NovelSum weighs the distances to near examples most, with"
        " --reference also by how dense that is there (such values compare with their like only). For these, larger is"
        " more diverse.\n\nNearest cosine and 10th nearest are means over examples, near duplicates"
        " the share that has another at a cosine of 0.95 or more: larger is more redundant. Cluster entropy is 1 where"
        " k-means finds clusters of one size.\n\nVendi scores are of all examples and grow with their number, so"
        f" compare tables of one size; from NovelSum on it is a sample of {sampled:,} of each table that is measured."
    )
    return Section("Other measures", text, table)


def write_metrics(
    out: Folder, results: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], kernel: Kernel
) -> None:
    """metrics.json, and metrics.csv with a line a table: distances by subset (``greedy_mean``), measures, the kernel.

    ``results`` are run.json's, one for each table and subset; ``found`` the measures of tables by name, or nothing.
    """
    used = {"kernel": kernel.name, "gamma": kernel.gamma if kernel.name == "rbf" else None, "ridge": kernel.ridge}
    tables: dict[str, dict[str, Any]] = {}
    for one in results:
        record = tables.setdefault(one["table"], {name: one[name] for name in ("table", "rows", "size")})
        record |= {f"{one['subset']}_{name}": one[name] for name in one if name not in {*record, "subset"}}
    records = [{**record, **found.get(name, {}), **used} for name, record in tables.items()]
    out.write_json("metrics.json", records)
    lines = io.StringIO()
    writer = csv.DictWriter(lines, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    out.write_text("metrics.csv", lines.getvalue())
