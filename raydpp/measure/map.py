"""The map of a report of measure: some examples of every table, and the texts that their corpora have."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import pyarrow as pa

from raydpp import runs
from raydpp.cluster import Here
from raydpp.errors import UserError
from raydpp.report.html import Section
from raydpp.report.map import LONGEST
from raydpp.select.map import MOST, draw, place, show
from raydpp.select.outputs import read_texts
from raydpp.storage import Folder
from raydpp.tables import GradientTable

log = logging.getLogger(__name__)


def tables_map(tasks: Here, tables: Sequence[GradientTable], corpus: str | None, out: Folder) -> Section:
    """OUT/map and its section: at most ``MOST`` points, as many of each table as there are, each table a colour.

    Texts are those of the corpus, else of the one that each table was made of, where that is still there.
    """
    most = max(1, MOST // len(tables))
    points, explained = place(tasks, [tasks.submit(_drawn, table, most) for table in tables], tables)
    texts: dict[str, str] = {}
    for url in sorted({corpus} if corpus else {table.corpus for table in tables if table.corpus}):
        folder = Folder.at(url)
        try:
            runs.load_finished(["ingest"], folder)
        except UserError as error:
            log.info("measure: %s: the map shows ids in place of texts", error)
        else:
            texts |= read_texts(tasks, folder, points["id"].to_pylist(), LONGEST)
    sampled = any(table.rows > most for table in tables)
    lead = f"Each point is an example, {f'at most {most:,} of a table' if sampled else 'all of each table'}."
    return show(out, points, texts, explained, lead, "table")


def _drawn(table: GradientTable, rows: int) -> pa.Table:
    found = draw(table, rows, pa.array([], pa.string()))
    return found.append_column("table", pa.repeat(table.name, len(found)))
