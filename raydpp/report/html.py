"""A self-contained HTML report: text, tables and figures in one file that needs no network and no script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from raydpp.report.style import COLOURS, Plot, svg
from raydpp.report.table import Table


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
    environment.filters["paragraphs"] = _paragraphs
    plots = [plot for section in sections for plot in section.figures]
    drawn = {id(plot): svg(plot, f"figure-{number}-") for number, plot in enumerate(plots, 1)}
    return environment.get_template("report.html").render(
        title=title, lead=lead, sections=sections, colours=COLOURS, svg=lambda plot: drawn[id(plot)]
    )


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
