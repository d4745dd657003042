"""How a report's figures look: Vega-Lite's configuration on a light and on a dark screen, and a figure as PNG."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import vl_convert

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
_RAMP = (("#3b0a57", "#b0247c", "#ef8fb8"), ("#ffd9ea", "#ee5fa7", "#8a2b86"))  # what comes first stands out most
SERIES = sum(name.startswith("series") for name in COLOURS)  # as many colours; line styles tell more series apart
_PNG_WIDTH = 640  # pixels of the plot, without its axes


@dataclass(frozen=True)
class Plot:
    """A figure as a Vega-Lite specification, and a text that says what it shows to those who cannot see it."""

    name: str  # of its file
    spec: Mapping[str, Any]
    alt: str
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # the data, where rows would take much space

    @property
    def packed(self) -> str:
        """The specification and the columns, for ``report.js``."""
        return packed(json.dumps({"spec": self.spec, "columns": self.columns}, allow_nan=False, separators=(",", ":")))


def packed(text: str) -> str:
    """Gzip, in base64."""
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def config(scheme: int) -> dict[str, Any]:
    """Vega-Lite's config on a light (0) or a dark (1) screen."""
    colour = {name: pair[scheme] for name, pair in COLOURS.items()}
    text = {"labelColor": colour["soft"], "titleColor": colour["soft"], "titleFontWeight": "normal"}
    return {
        "background": None,
        "font": "system-ui, sans-serif",
        "view": {"stroke": None},
        "range": {
            "category": [colour[name] for name in colour if name.startswith("series")],
            "ramp": list(_RAMP[scheme]),
        },
        "title": {"anchor": "start", "color": colour["ink"], "fontSize": 14, "offset": 12},
        "axis": {**text, "domainColor": colour["soft"], "tickColor": colour["soft"], "gridColor": colour["line"]},
        "legend": {**text, "labelColor": colour["ink"], "labelLimit": 240, "symbolOpacity": 1},
        "text": {"color": colour["soft"]},
        "rule": {"color": colour["soft"], "strokeDash": [2, 3]},
    }


def png(plot: Plot) -> bytes:
    """The figure on white paper, two pixels for each of its own; no browser is needed."""
    spec = {**plot.spec, "width": _PNG_WIDTH, "background": COLOURS["paper"][0]}
    if drawn := {name: values for name, values in plot.columns.items() if name != "text"}:
        rows = zip(*drawn.values(), strict=True)
        spec["data"] = {"values": [dict(zip(drawn, row, strict=True)) for row in rows]}
    return vl_convert.vegalite_to_png(spec, config=config(0), scale=2)
