"""How a report's figures look: matplotlib's style, and its drawing as an inline SVG element.

Colours are CSS variables, so that one file reads well on a light and on a dark screen. The same input gives the same
bytes.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from xml.etree import ElementTree

import matplotlib.style
from markupsafe import Markup
from matplotlib.figure import Figure

# CSS variable -> (light, dark). Any two series are 26 or more apart in CIELAB under normal, deuteranopic and
# protanopic sight (Machado et al. 2009), each at a contrast of 4.5 or more against the background.
COLOURS = {
    "paper": ("#ffffff", "#15181c"),
    "ink": ("#1b1e23", "#e7e9ec"),
    "soft": ("#5c636e", "#a3abb6"),
    "line": ("#d9dce1", "#363c44"),
    "series-0": ("#2b74be", "#73b5f7"),
    "series-1": ("#652602", "#d9601c"),
    "series-2": ("#17845f", "#6ff2bd"),
    "series-3": ("#381126", "#e8309f"),
    "series-4": ("#867311", "#fcd475"),
}
INK, SOFT, LINE = (COLOURS[name][0] for name in ("ink", "soft", "line"))
SERIES = [light for name, (light, _) in COLOURS.items() if name.startswith("series")]

_STYLE = {
    "svg.fonttype": "none",  # text stays text: the page's own font, searchable
    "svg.hashsalt": "raydpp",
    "text.parse_math": False,  # a source may be called "$x$"
    "font.size": 9.5,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": INK,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "text.color": INK,
    "lines.linewidth": 1.8,
    "figure.constrained_layout.use": True,
}
styled = partial(matplotlib.style.context, ["default", _STYLE])


@dataclass(frozen=True)
class Plot:
    """A figure, and a text that says what it shows to those who cannot see it."""

    figure: Figure
    alt: str


def svg(plot: Plot, prefix: str) -> Markup:
    """The figure as an inline SVG element: ids are unique by the prefix, colours are CSS variables."""
    stream = BytesIO()
    with styled(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # the reader's fonts draw the text
        plot.figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(stream.getvalue())
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]  # HTML has no namespaces
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            key = key.rpartition("}")[2]
            element.set(key, _attribute(key, value, prefix))
    for metadata in root.findall("metadata"):
        root.remove(metadata)
    del root.attrib["width"], root.attrib["height"]  # as wide as the page
    root.attrib |= {"role": "img", "aria-label": plot.alt}
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _attribute(key: str, value: str, prefix: str) -> str:
    if key == "id":
        return prefix + value
    if key == "href":
        return value.replace("#", f"#{prefix}", 1)
    for name, (light, _) in COLOURS.items():
        value = value.replace(light, f"var(--{name})")
    return value.replace("url(#", f"url(#{prefix}")
