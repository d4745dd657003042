"""How long examples are: counts in logarithmic bins, of a table of any size or of picks, and the section that shows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from raydpp.report.figures import lengths_figure
from raydpp.report.html import Section
from raydpp.select.request import numbers
from raydpp.tables import GradientTable

EDGES = np.unique(np.ceil(2.0 ** (np.arange(81) / 2)))
"""The lower ends of the bins, (b,): 1, 2, 3, 4, 6, 8, 12, ...: two for each doubling."""


def table_lengths(table: GradientTable, column: str) -> np.ndarray:
    """How many rows of a table are in each bin, (b,); one short column, a file at a time."""
    return np.sum([lengths(table.read_columns([part], [column]), column) for part in table.parts], axis=0)


def lengths(rows: pa.Table, column: str) -> np.ndarray:
    """How many rows are in each bin, (b,); what is below the first is in it."""
    values = numbers(rows.filter(pc.is_valid(rows[column])), column)
    places = np.searchsorted(EDGES, values[np.isfinite(values)], side="right") - 1
    return np.bincount(places.clip(0), minlength=len(EDGES))


def lengths_section(counts: Mapping[str, np.ndarray], column: str) -> Section:
    """Of sets by name, the share of each in every bin."""
    text = f"The share of each set, by {column}, in bins of which two double the length."
    return Section("How long the examples are", text, figures=[lengths_figure(EDGES, counts, column)])
