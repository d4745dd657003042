"""Figures of a report: curves, gains and shares, as Vega-Lite specifications."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from raydpp.report.style import SERIES, Plot
from raydpp.report.table import format_value, shorten

_DASHES = ([1, 0], [6, 3], [2, 2], [8, 3, 2, 3])  # the next style when the colours are used up
_MOST_SOURCES = 15
_LONGEST_LABEL = 32
_MOST_POINTS = 1000  # a line; more than a screen can show


def curve_figure(curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]], file: str = "curves") -> Plot:
    """Log-det distance against the number of examples: lines with a band of one standard deviation on either side.

    Args:
        curves: Name -> (sizes [n], means [n], standard deviations [n]). What is not finite is not drawn.
        file: The name of its PNG.
    """
    title = "Log-det distance against the number of examples"
    return _lines(file, title, "examples m", "log-det distance, nats per example", curves, named=True, log=True)


def gains_figure(log_gains: Mapping[str, ArrayLike], mark: int | None = None) -> Plot:
    """The marginal log-gain of every pick, in the order of the greedy selection; with a legend of several.

    Args:
        log_gains: Name -> the gains [k]. What is not finite is not drawn.
        mark: A pick to draw a line at.
    """
    runs = {name: _finite(gains) for name, gains in log_gains.items()}  # [k] each
    lines = {name: (np.arange(1.0, len(gains) + 1), gains, np.zeros(len(gains))) for name, gains in runs.items()}
    title, y = "What each pick adds", "marginal log-gain, nats"
    return _lines("gains", title, "pick", y, lines, named=len(lines) > 1, mark=mark)


def mix_figure(shares: Mapping[str, Mapping[str, float]]) -> Plot:
    """Grouped bars of each source's share in several sets, the largest sources first.

    Args:
        shares: Set -> source -> fraction of the set. A missing, negative or non-finite one is drawn as zero.
            Sources beyond the 15 largest are folded into one bar.
    """
    title = "Where the examples come from"
    sources = sorted({source for mix in shares.values() for source in mix})
    share = np.zeros((len(shares), len(sources)))  # [sets, sources]
    for row, mix in zip(share, shares.values(), strict=True):
        row[:] = np.nan_to_num([max(0.0, mix.get(source, 0.0)) for source in sources], posinf=0.0)
    order = np.argsort(-share.sum(axis=0), kind="stable")
    kept, folded = order[:_MOST_SOURCES], order[_MOST_SOURCES:]
    labels, bars = [*label_names(sources[i] for i in kept).values()], share[:, kept]  # [sets, bars]
    if folded.size:
        labels.append(f"other ({folded.size} sources)")
        bars = np.column_stack([bars, share[:, folded].sum(axis=1)])
    sets = list(label_names(shares).values())
    values = [
        {"name": name, "source": label, "share": _digits(width)}
        for name, widths in zip(sets, bars, strict=True)
        for label, width in zip(labels, widths, strict=True)
    ]
    alts = []
    for name, widths in zip(shares, bars, strict=True):
        percents = [f"{width:.1%}" for width in widths]
        alts.append(f"{name}: " + ", ".join(map(" ".join, zip(labels, percents, strict=True))))
    x, axis = {"field": "share", "type": "quantitative"}, {"format": ".0%", "title": "share of the set"}
    spec = {
        "title": title,
        "width": "container",
        "height": len(labels) * (6 + 14 * len(sets)),
        "data": {"values": values},
        "encoding": {
            "y": {
                "field": "source",
                "type": "nominal",
                "sort": labels,
                "title": None,
                "axis": {"ticks": False, "domain": False, "labelLimit": 240},
            },
            "yOffset": {"field": "name", "type": "nominal", "sort": sets},
        },
        "layer": [
            {
                "params": [TOGGLED],
                "mark": {"type": "bar"},
                "encoding": {
                    "x": {**x, "axis": {**axis, "tickCount": 5}, "stack": None},
                    "color": _colour(sets),
                    "opacity": _faint(1),
                    "tooltip": [
                        {"field": "source", "type": "nominal"},
                        {"field": "name", "type": "nominal", "title": "set"},
                        {**x, "format": ".1%"},
                    ],
                },
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 4, "fontSize": 10},
                "encoding": {"x": x, "text": {**x, "format": ".1%"}, "opacity": _faint(1)},
            },
        ],
    }
    return Plot("mix", _sound(spec), _alt(f"Bar chart, {title}", alts))


def lengths_figure(edges: ArrayLike, counts: Mapping[str, ArrayLike], of: str) -> Plot:
    """Histograms of several sets, as shares of each.

    Args:
        edges: The lower ends of the bins [b], above 0; each reaches to the next.
        counts: Set -> what is in each bin [b].
        of: What is counted, for the axis.
    """
    ends = np.asarray(edges, dtype=np.float64)  # [b]
    held = {name: np.asarray(values, dtype=np.float64) for name, values in counts.items()}  # [b] each
    filled = np.flatnonzero(np.sum([*held.values(), np.zeros(len(ends))], axis=0))
    some = slice(filled[0], filled[-1] + 2) if filled.size else slice(0)  # the last one is empty and ends the line
    lines = {name: (ends[some], (n / max(1.0, n.sum()))[some], 0 * ends[some]) for name, n in held.items()}
    title = "How long the examples are"
    return _lines("lengths", title, f"{of}, from", "share of the set", lines, named=True, log=True, steps=True)


# A click on an entry of the legend shows it alone, further clicks add and take away others.
TOGGLED = {"name": "shown", "bind": "legend", "select": {"type": "point", "fields": ["name"], "toggle": "true"}}


def _lines(
    file: str,
    title: str,
    x: str,
    y: str,
    lines: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    named: bool,
    log: bool = False,
    mark: int | None = None,
    steps: bool = False,
) -> Plot:
    """Lines with bands, name -> (x, y, half the band's width), [n] each; ``log``: over more than a decade of x.

    ``mark`` is an x to draw a line at; with ``steps`` each y, a share, holds until the next x.
    """
    labels = label_names(lines)
    values, alts, drawn = [], [], []
    low, high, banded = np.inf, 0.0, False
    for name, line in lines.items():
        size, mean, std = (_finite(part) for part in line)  # [n] each
        finite = np.flatnonzero(np.isfinite(size) & np.isfinite(mean))
        if not finite.size:
            continue
        drawn.append(labels[name])
        ends = (f"{format_value(float(mean[i]))} at {format_value(float(size[i]))}" for i in finite[[0, -1]])
        alts.append((f"{name}: " if named else "") + " to ".join(ends))
        low, high = min(low, size[finite].min()), max(high, size[finite].max())
        some = np.arange(len(size))
        if len(size) > _MOST_POINTS:
            some = np.union1d(np.linspace(0, len(size) - 1, _MOST_POINTS).astype(int), finite[[0, -1]])
        banded = banded or bool(np.nanmax(std, initial=0.0) > 0)
        values += [
            {"name": labels[name], **{key: _digits(number) for key, number in zip(_POINT, point, strict=True)}}
            for point in np.column_stack([size, mean, mean - std, mean + std])[some]
        ]
    log = log and 0 < 10 * low < high
    decades, whole = {"type": "log"} if log else {"zero": False}, {} if log else {"tickMinStep": 1}
    value: dict[str, Any] = {"field": "y", "type": "quantitative", "title": y, "scale": {"zero": steps}}
    titles = {"x": x, "y": y} | ({"low": "low", "high": "high"} if banded else {})
    shown: list[dict[str, str]] = [{"field": "name", "type": "nominal"}] if named else []
    for field, heading in titles.items():
        form = ",.10~g" if field == "x" else ".1%" if steps else ".4~g"
        shown.append({"field": field, "type": "quantitative", "title": heading, "format": form})
    dash = {"domain": drawn, "range": [_DASHES[n // SERIES % len(_DASHES)] for n in range(len(drawn))]}
    path = {"strokeWidth": 2, "invalid": "break-paths-show-path-domains"}
    if steps:
        path, value = path | {"interpolate": "step-after"}, value | {"axis": {"format": ".0%"}}
    legend = {**LEGEND, "symbolType": "stroke", "symbolSize": 250, "symbolStrokeWidth": 2} if named else None
    layers: list[dict[str, Any]] = [
        {
            "params": [TOGGLED] if legend else [],
            "mark": {"type": "line", **path},
            "encoding": {
                "y": value,
                "opacity": _faint(1) if legend else {"value": 1},
                "strokeDash": {"field": "name", "type": "nominal", "scale": dash, "legend": legend},
            },
        },
        {  # the point nearest to the pointer
            "params": [{"name": "near", "select": {"type": "point", "on": "pointerover", "nearest": True}}],
            "mark": {"type": "point", "filled": True, "size": 50},
            "encoding": {
                "y": value,
                "opacity": {"condition": {"param": "near", "empty": False, "value": 1}, "value": 0},
                "tooltip": shown,
            },
        },
    ]
    if banded:
        band = {
            "y": {**value, "field": "low"},
            "y2": {"field": "high"},
            "opacity": _faint(1) if legend else {"value": 1},
        }
        area = {"type": "area", "fillOpacity": 0.16, "invalid": "break-paths-show-path-domains"}
        layers.insert(0, {"mark": area, "encoding": band})
    if mark is not None:
        at, bare = {"values": [{"x": mark}]}, {"color": None}
        side = {"align": "right", "dx": -4} if 2 * mark > low + high else {"align": "left", "dx": 4}
        text = {"type": "text", "text": f"{x} {mark:,}", "baseline": "top", "y": 2, **side}
        layers += [{"data": at, "mark": "rule", "encoding": bare}, {"data": at, "mark": text, "encoding": bare}]
        alts.append(f"a line at {mark:,}")
    colour = {**_colour(drawn), "legend": legend}
    spec = {
        "title": title,
        "width": "container",
        "height": 280,
        "data": {"values": values},
        "encoding": {
            "x": {
                "field": "x",
                "type": "quantitative",
                "title": x,
                "scale": {**decades, "nice": False},
                "axis": {"grid": False, "format": ",.10~g", "labelOverlap": True, **whole},
            },
            "color": colour,
        },
        "layer": layers,
    }
    return Plot(file, _sound(spec), _alt(f"Line chart, {title}", alts))


LEGEND = {"orient": "bottom", "columns": 3, "title": None}
_POINT = ("x", "y", "low", "high")


def _sound(spec: dict[str, Any]) -> dict[str, Any]:
    """The specification, or a note in its place where there is nothing to draw."""
    if spec["data"]["values"]:
        return spec
    text = {"mark": {"type": "text", "text": "no finite values"}, "data": {"values": [{}]}}
    return {"title": spec["title"], "width": "container", "height": 80, **text}


def _colour(names: Sequence[str]) -> dict[str, Any]:
    return {"field": "name", "type": "nominal", "scale": {"domain": list(names)}, "legend": LEGEND}


def _faint(opacity: float) -> dict[str, Any]:
    """Full where the legend shows a series, nearly nothing elsewhere."""
    return {"condition": {"param": "shown", "value": opacity}, "value": opacity / 12}


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()  # [n]
    return np.where(np.isfinite(array), array, np.nan)


def _digits(value: float) -> float | None:
    """Six significant digits, which are more than a screen can show; JSON has no NaN."""
    return float(f"{value:.6g}") if np.isfinite(value) else None


def label_names(names: Iterable[str]) -> dict[str, str]:
    """Names as a figure shows them: one line of printable characters, shortened, no two alike."""
    labels: dict[str, str] = {}
    for name in names:
        label = base = shorten("".join(c if c.isprintable() else " " for c in name), _LONGEST_LABEL)
        number = 1
        while label in labels.values():
            number += 1
            label = f"{base} ({number})"
        labels[name] = label
    return labels


def _alt(what: str, series: Sequence[str]) -> str:
    return f"{what}. {'; '.join(series) or 'Nothing to draw'}."
