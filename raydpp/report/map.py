"""A map of examples: points in a plane, whose texts a pointer finds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from raydpp.report.figures import LEGEND, TOGGLED, label_names
from raydpp.report.style import SERIES, Plot
from raydpp.report.table import visible

LONGEST = 2_000
"""The most characters of a point's text."""

_TITLE = "Map of the examples"
_MOST_NAMES = 15  # of a legend; the rest is one
_LARGEST = 1_250_000  # bytes of a packed map, which leave a page below 2 MB
_STEPS = 4_095  # places along the longer side; a screen has fewer


def map_figure(
    x: ArrayLike,
    y: ArrayLike,
    names: Sequence[str],
    texts: Sequence[str],
    ranks: Sequence[int | None] | None = None,
    *,
    kind: str = "source",
) -> Plot:
    """Points to zoom into; a pointer finds their texts, a click keeps one, a click on the legend shows names alone.

    Texts are cut to ``LONGEST`` characters, and to fewer so that the figure takes no more than 1.25 MB of a page.

    Args:
        x: [n] and finite.
        y: [n] and finite.
        names: What each point belongs to, n. Beyond the 15 largest they are one.
        texts: Of each point, n.
        ranks: Of a point that was picked its place in the order of picks, which is then its colour; None of others,
            which are drawn faint.
        kind: What names are of.
    """
    plane = np.column_stack([x, y]).astype(np.float64)  # [n, 2]
    low, span = plane.min(0), np.ptp(plane, axis=0)  # [2] each
    places = np.rint((plane - low) * (_STEPS / (span.max() or 1.0))).astype(int)  # [n, 2]
    counts = Counter(names)
    largest = [name for name, _ in counts.most_common(_MOST_NAMES if len(counts) > _MOST_NAMES + 1 else None)]
    shown = label_names(largest if ranks else [name for name in counts if name in largest])
    rest = f"other ({len(counts) - len(largest)} {kind}s)"
    legend = [*shown.values(), *([rest] if len(counts) > len(largest) else [])]
    order = list(range(len(places)))
    if ranks is not None:  # the first picks above the others, and those above what was left out
        order.sort(key=lambda i: -(ranks[i] or np.inf))
    columns: dict[str, Sequence[Any]] = {
        "x": places[order, 0].tolist(),
        "y": places[order, 1].tolist(),
        "name": [shown.get(names[i], rest) for i in order],
        "text": [texts[i] for i in order],
    }
    if ranks is not None:
        columns["rank"] = [ranks[i] for i in order]
    plot = Plot("map", _spec(columns, legend, kind), _alt(counts, legend, ranks), columns)
    return _fitted(plot)


def _fitted(plot: Plot) -> Plot:
    """The same with texts cut so that it is not too large."""
    texts = [visible(text[: LONGEST + 1]) for text in plot.columns["text"]]
    longest = min(LONGEST, max(64, 4_000_000 // max(1, len(texts))))
    while True:
        cut = [text if len(text) <= longest else text[: longest - 1] + "…" for text in texts]
        found = replace(plot, columns={**plot.columns, "text": cut})
        if longest < 16 or len(found.packed) <= _LARGEST:
            return found
        longest = int(0.8 * longest)


def _spec(columns: dict[str, Sequence[Any]], legend: Sequence[str], kind: str) -> dict[str, Any]:
    n = len(columns["x"])
    size = float(np.clip(60_000 / max(1, n), 8, 50))  # square pixels
    edge = 0.03 * _STEPS
    axes = {
        axis: {
            "field": axis,
            "type": "quantitative",
            "axis": None,
            "scale": {"domain": [-edge, max(columns[axis], default=0) + edge], "nice": False, "zero": False},
        }
        for axis in ("x", "y")
    }
    found = [{"field": "name", "type": "nominal", "title": kind}, {"field": "text", "type": "nominal"}]
    scheme = {"scheme": "tableau10" if len(legend) <= 10 else "tableau20"} if len(legend) > SERIES else {}
    names = {
        "field": "name",
        "type": "nominal",
        "scale": {"domain": legend, **scheme},
        "legend": LEGEND if len(legend) > 1 else None,
    }
    only = {"filter": {"param": "shown"}}
    zoom = {"name": "zoom", "select": "interval", "bind": "scales"}
    rest: dict[str, Any] = {
        "params": [TOGGLED, zoom],
        "transform": [only],
        "mark": {"type": "circle", "size": size, "opacity": 0.7, "clip": True},
        "encoding": {**axes, "color": names, "tooltip": found},
    }
    layers = [rest]
    if "rank" in columns:
        rest["mark"]["opacity"] = 0.35
        picked = {"filter": "datum.rank !== null"}
        rank = {"field": "rank", "type": "quantitative", "title": "pick"}
        bar = {"orient": "top", "direction": "horizontal", "gradientLength": 200, "tickMinStep": 1, "format": ",.0f"}
        layers.append(
            {
                "transform": [picked, *rest["transform"]],
                "mark": {"type": "circle", "size": 3 * size, "opacity": 1, "clip": True},
                "encoding": {
                    **axes,
                    "color": {
                        **rank,
                        "legend": bar,
                        "scale": {"domain": [1, max(filter(None, columns["rank"]), default=2)]},
                    },
                    "tooltip": [{**rank, "format": ",.0f"}, *found],
                },
            }
        )
        rest["transform"] = [{"filter": "datum.rank === null"}, *rest["transform"]]
    return {
        "title": _TITLE,
        "width": "container",
        "height": 480,
        "layer": layers,
        "resolve": {"scale": {"color": "independent"}},
    }


def _alt(counts: Counter[str], legend: Sequence[str], ranks: Sequence[int | None] | None) -> str:
    picked = "" if ranks is None else f", {sum(rank is not None for rank in ranks):,} of them picked"
    return f"{_TITLE}. {counts.total():,} points{picked}: {', '.join(legend)}."
