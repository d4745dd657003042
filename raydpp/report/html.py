"""A self-contained HTML report: text, tables and figures in one file that needs no network and no script."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import numpy as np

from raydpp.report.style import COLOURS, Plot, in_words, svg


@dataclass(frozen=True)
class Table:
    """Rows under headings; numbers are set right-aligned, with four significant digits.

    Raises:
        ValueError: A row has not as many cells as there are headings.
    """

    headings: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.headings):
                raise ValueError(f"row {number} has {len(row)} cells under {len(self.headings)} headings")


@dataclass(frozen=True)
class Section:
    """One part of the report; `text` is plain text, a blank line starts a new paragraph."""

    heading: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Plot] = ()


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as one HTML document; all text is escaped.

    Args:
        title: The document's title and first heading.
        lead: What the report says, in a sentence or two.
        sections: In order of appearance.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(cell=in_words, paragraphs=_paragraphs)
    environment.tests["numeric"] = _is_number
    plots = [plot for section in sections for plot in section.figures]
    drawn = {id(plot): svg(plot, f"figure-{number}-") for number, plot in enumerate(plots, 1)}
    return environment.get_template("report.html").render(
        title=title, lead=lead, sections=sections, colours=COLOURS, svg=lambda plot: drawn[id(plot)]
    )


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool | np.bool_)
