"""Figures of a report: curves, gains and shares, drawn with matplotlib (no display, no pyplot)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from raydpp.report.style import INK, SERIES, SOFT, Plot, styled
from raydpp.report.table import format_value, shorten

_DASHES = ("-", "--", ":", "-.")  # the next style when the colours are used up
_MOST_SOURCES = 15
_LONGEST_LABEL = 32
_MOST_POINTS = 1000  # a line; more than a screen can show


def curve_figure(curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]]) -> Plot:
    """Log-det distance against the number of examples: lines with a band of one standard deviation on either side.

    Args:
        curves: Name -> (sizes [n], means [n], standard deviations [n]). What is not finite is not drawn.
    """
    title = "Log-det distance against the number of examples"
    with styled():
        figure = Figure(figsize=(7.2, 3.6 + 0.2 * math.ceil(len(curves) / 3)))  # a legend has three names in a row
        axes = figure.add_subplot(title=title, xlabel="examples m", ylabel="log-det distance, nats per example")
        lines: dict[str, Artist] = {}
        alts = []
        for number, (name, curve) in enumerate(curves.items()):
            size, mean, std = (_finite(values) for values in curve)  # [n] each
            if (drawn := _line(axes, number, size, mean, std)) is None:
                continue
            lines[name], ends = drawn
            alts.append(f"{name}: {ends}")
        low, high = axes.dataLim.intervalx
        if lines and 0 < 10 * low < high:
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=20))
            axes.xaxis.set_minor_locator(NullLocator())
        _finish_lines(axes, bool(lines))
        _legend(figure, lines)
    return Plot(figure, _alt(f"Line chart, {title}", alts))


def gains_figure(log_gains: Mapping[str, ArrayLike], mark: int | None = None) -> Plot:
    """The marginal log-gain of every pick, in the order of the greedy selection; with a legend of several.

    Args:
        log_gains: Name -> the gains [k]. What is not finite is not drawn.
        mark: A pick to draw a line at.
    """
    title = "What each pick adds"
    with styled():
        figure = Figure(figsize=(7.2, 3.6))
        axes = figure.add_subplot(title=title, xlabel="pick", ylabel="marginal log-gain, nats")
        lines: dict[str, Artist] = {}
        alts = []
        for number, (name, values) in enumerate(log_gains.items()):
            gains = _finite(values)  # [k]
            if drawn := _line(axes, number, np.arange(1.0, len(gains) + 1), gains, np.zeros(len(gains))):
                lines[name], ends = drawn
                alts.append(f"{name}: {ends}" if len(log_gains) > 1 else ends)
        if mark is not None:
            axes.axvline(mark, color=SOFT, linewidth=1, linestyle=":")
            alts.append(f"a line at {mark:,}")
        _finish_lines(axes, bool(lines))
        if len(lines) > 1:
            _legend(figure, lines)
    return Plot(figure, _alt(f"Line chart, {title}", alts))


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
    labels, bars = [_label(sources[i]) for i in kept], share[:, kept]  # [sets, bars]
    if folded.size:
        labels.append(f"other ({folded.size} sources)")
        bars = np.column_stack([bars, share[:, folded].sum(axis=1)])
    rows, thickness = np.arange(len(labels)), 0.8 / max(1, len(shares))
    keys: dict[str, Artist] = {}
    alts = []
    with styled():
        figure = Figure(figsize=(7.2, 1.5 + len(labels) * (0.14 + 0.14 * len(shares))))
        axes = figure.add_subplot(title=title, xlabel="share of the set")
        for number, (name, widths) in enumerate(zip(shares, bars, strict=True)):
            y = rows + (number - (len(shares) - 1) / 2) * thickness
            colour = SERIES[number % len(SERIES)]
            drawn = axes.barh(y, widths, 0.86 * thickness, color=colour)
            keys[name] = Patch(color=colour)
            percents = [f"{width:.1%}" for width in widths]
            axes.bar_label(drawn, percents, padding=3, fontsize=7.5, color=SOFT)
            alts.append(f"{name}: " + ", ".join(map(" ".join, zip(labels, percents, strict=True))))
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(bars.max(initial=0.0), 0.01))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}%"))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        _legend(figure, keys)
    return Plot(figure, _alt(f"Bar chart, {title}", alts))


def _line(axes: Axes, number: int, size: NDArray, mean: NDArray, std: NDArray) -> tuple[Artist, str] | None:
    """Draw one line and its band, [n] each; the line, and its first and last point as text. None: nothing is finite."""
    drawn = np.flatnonzero(np.isfinite(size) & np.isfinite(mean))
    if not drawn.size:
        return None
    ends = " to ".join(f"{format_value(float(mean[i]))} at {format_value(float(size[i]))}" for i in drawn[[0, -1]])
    if size.size > _MOST_POINTS:
        some = np.union1d(np.linspace(0, size.size - 1, _MOST_POINTS).astype(int), drawn[[0, -1]])
        size, mean, std = size[some], mean[some], std[some]
    colour, dashes = SERIES[number % len(SERIES)], _DASHES[number // len(SERIES) % len(_DASHES)]
    (line,) = axes.plot(size, mean, dashes, color=colour, marker="o" if drawn.size <= 12 else "", markersize=3.5)
    if np.nanmax(std, initial=0.0) > 0:
        axes.fill_between(size, mean - std, mean + std, color=colour, alpha=0.16, linewidth=0)
    return line, ends


def _finish_lines(axes: Axes, drawn: bool) -> None:
    """Plain counts on the x axis; a note where nothing was drawn."""
    if not drawn:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no finite values", ha="center", transform=axes.transAxes)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def _legend(figure: Figure, keys: Mapping[str, Artist]) -> None:
    names = [_label(name) for name in keys]
    figure.legend(list(keys.values()), names, loc="outside lower right", ncols=3, frameon=False)


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()  # [n]
    return np.where(np.isfinite(array), array, np.nan)


def _label(name: str) -> str:
    """A name that fits a figure: one line, printable (SVG is XML, which has no control characters)."""
    return shorten("".join(c if c.isprintable() else " " for c in name), _LONGEST_LABEL)


def _alt(what: str, series: Sequence[str]) -> str:
    return f"{what}. {'; '.join(series) or 'Nothing to draw'}."
