"""A self-contained HTML report: text, tables and figures in one file that needs no network.

Figures are drawn by Vega-Lite, whose code is part of the page, packed as the figures are (``style.packed``). A content
security policy allows the page's own scripts and style by their hashes and nothing else; expressions are interpreted,
since eval is not allowed.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from raydpp.report.style import COLOURS, Plot, config, packed, png
from raydpp.report.table import Table, visible
from raydpp.storage import Folder


@dataclass(frozen=True)
class Pair:
    """Two texts to be read beside each other, each under a line that says what it is."""

    heading: str
    labels: tuple[str, str]
    texts: tuple[str, str]


@dataclass(frozen=True)
class Section:
    """One part of the report; `text` is plain text, a blank line starts a new paragraph; `command` is to be copied."""

    heading: str
    text: str = ""
    table: Table | None = None
    figures: Sequence[Plot] = ()
    pairs: Sequence[Pair] = ()
    command: str = ""


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The report as one HTML document; all text is escaped, and what cannot be seen of it is shown as U+FFFD.

    Args:
        title: The document's title and first heading.
        lead: What the report says, in a sentence or two.
        sections: In order of appearance.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"paragraphs": _paragraphs, "embedded": _embedded, "hash": _hash}
    style = Markup(environment.get_template("report.css").render(colours=COLOURS))
    drawn = any(section.figures for section in sections)
    return environment.get_template("report.html").render(
        title=title,
        lead=lead,
        sections=sections,
        style=style,
        script=Markup((Path(__file__).parent / "report.js").read_text(encoding="utf-8")) if drawn else None,
        vega=_vega() if drawn else None,
        configs=[config(0), config(1)],
    )


def write_report(out: Folder, title: str, lead: str, sections: Sequence[Section]) -> None:
    """OUT/report.html, and each of its figures as OUT/plots/NAME.png."""
    for plot in [plot for section in sections for plot in section.figures]:
        out.write_bytes(f"plots/{plot.name}.png", png(plot))
    out.write_text("report.html", render(title, lead, sections))


@cache
def _vega() -> tuple[str, str]:
    """Vega, Vega-Lite, the expression interpreter and vegaEmbed as one script, packed, and its hash; takes seconds."""
    script = vl_convert.javascript_bundle()  # type: ignore[call-arg]  # its stub has no default
    return packed(script), _hash(script)


def _visible(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _embedded(value: Any) -> Markup:
    """JSON as the content of a script element: no text in it can end the element."""
    return Markup(json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"))


def _hash(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in text.split("\n\n") if paragraph.strip()]
