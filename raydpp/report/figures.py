"""Figures of a report: curves, gains and shares, drawn with matplotlib (no display, no pyplot)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import ArrayLike, NDArray

from raydpp.report.style import INK, SERIES, SOFT, Plot, in_words, styled

_DASHES = ("-", "--", ":", "-.")  # the next style when the colours are used up
_MOST_SOURCES = 15
_LONGEST_LABEL = 32
_MOST_POINTS = 1000  # a line; more than a screen can show


def curve_figure(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    *,
    title: str,
    xlabel: str = "examples m",
    ylabel: str = "log-det distance, nats per example",
) -> Plot:
    """Lines with a band of one standard deviation on either side, each labelled where it ends.

    Args:
        curves: Name -> (sizes [n], means [n], standard deviations [n]). What is not finite is not drawn.
        title: Above the figure.
        xlabel: The axis is logarithmic where the sizes span more than a decade.
        ylabel: Of the means.
    """
    return _lines(curves, title, xlabel, ylabel, logarithmic=True)


def gains_figure(
    log_gains: ArrayLike | Mapping[str, ArrayLike],
    *,
    floor: float | None = None,
    title: str = "What each pick adds",
    xlabel: str = "pick",
    ylabel: str = "marginal log-gain, nats",
) -> Plot:
    """The marginal log-gain of every pick, in the order of the greedy selection.

    Args:
        log_gains: The gains [k], or several runs by name. What is not finite is not drawn.
        floor: Draws a line at this log-gain, below which a pick adds nothing.
        title: Above the figure.
        xlabel: Picks count from 1.
        ylabel: Of the gains.
    """
    runs = log_gains if isinstance(log_gains, Mapping) else {"": log_gains}
    gains = {name: _finite(values) for name, values in runs.items()}  # [k] each
    curves = {name: (np.arange(1, len(g) + 1), g, np.zeros(len(g))) for name, g in gains.items()}
    return _lines(curves, title, xlabel, ylabel, floor=floor)


def mix_figure(
    shares: Mapping[str, Mapping[str, float]],
    *,
    title: str = "Where the examples come from",
    xlabel: str = "share of the set",
) -> Plot:
    """Grouped bars of each source's share in several sets, the largest sources first.

    Args:
        shares: Set -> source -> fraction of the set. A missing, negative or non-finite one is drawn as zero.
            Sources beyond the 15 largest are folded into one bar.
        title: Above the figure.
        xlabel: Of the shares.
    """
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
    keys, words = [], []
    with styled():
        figure = Figure(figsize=(7.2, 1.5 + len(labels) * (0.14 + 0.14 * len(shares))))
        axes = figure.add_subplot(title=title, xlabel=xlabel)
        for number, (name, widths) in enumerate(zip(shares, bars, strict=True)):
            y = rows + (number - (len(shares) - 1) / 2) * thickness
            colour = SERIES[number % len(SERIES)]
            drawn = axes.barh(y, widths, 0.86 * thickness, color=colour)
            keys.append(Patch(color=colour))
            percents = [f"{width:.1%}" for width in widths]
            axes.bar_label(drawn, percents, padding=3, fontsize=7.5, color=SOFT)
            words.append(f"{name}: " + ", ".join(map(" ".join, zip(labels, percents, strict=True))))
        axes.set_yticks(rows, labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, 1.12 * max(bars.max(initial=0.0), 0.01))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{100 * x:.3g}%"))
        axes.tick_params(axis="y", length=0, labelcolor=INK)
        axes.spines["left"].set_visible(False)
        axes.grid(False, axis="y")
        axes.grid(True, axis="x")
        figure.legend(keys, [_label(name) for name in shares], loc="outside lower right", ncols=3, frameon=False)
    return Plot(figure, _alt(f"Bar chart, {title}: {xlabel} by source", words))


def _lines(
    curves: Mapping[str, tuple[ArrayLike, ArrayLike, ArrayLike]],
    title: str,
    xlabel: str,
    ylabel: str,
    *,
    logarithmic: bool = False,
    floor: float | None = None,
) -> Plot:
    ends, words = [], []
    with styled():
        figure = Figure(figsize=(7.2, 3.8))
        axes = figure.add_subplot(title=title, xlabel=xlabel, ylabel=ylabel)
        for number, (name, curve) in enumerate(curves.items()):
            size, mean, std = (_finite(values) for values in curve)  # [n] each
            drawn = np.flatnonzero(np.isfinite(size) & np.isfinite(mean))
            if not drawn.size:
                continue
            words.append(f"{name}: " * bool(name) + " to ".join(_point(size[i], mean[i]) for i in drawn[[0, -1]]))
            colour = SERIES[number % len(SERIES)]
            ends.append((float(mean[drawn[-1]]), _label(name), colour))
            if size.size > _MOST_POINTS:
                some = np.union1d(np.linspace(0, size.size - 1, _MOST_POINTS).astype(int), drawn[[0, -1]])
                size, mean, std = size[some], mean[some], std[some]
            dashes = _DASHES[number // len(SERIES) % len(_DASHES)]
            axes.plot(size, mean, dashes, color=colour, marker="o" if drawn.size <= 12 else "", markersize=3.5)
            if np.nanmax(std, initial=0.0) > 0:
                axes.fill_between(size, mean - std, mean + std, color=colour, alpha=0.16, linewidth=0)
        if floor is not None and math.isfinite(floor):
            axes.axhline(floor, color=SOFT, linewidth=1, linestyle=(0, (4, 3)))
            ends.append((floor, "floor", SOFT))
            words.append(f"floor: {in_words(floor)}")
        _size_axis(axes, logarithmic)
        _label_ends(axes, ends)
    return Plot(figure, _alt(f"Line chart, {title}: {ylabel} against {xlabel}", words))


def _finite(values: ArrayLike) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64).ravel()  # [n]
    return np.where(np.isfinite(array), array, np.nan)


def _point(size: float, mean: float) -> str:
    return f"{in_words(float(mean))} at {in_words(float(size))}"


def _label(name: str) -> str:
    """A name that fits a figure: one line, printable (SVG is XML, which has no control characters)."""
    name = "".join(c if c.isprintable() else " " for c in name)
    return name if len(name) <= _LONGEST_LABEL else name[: _LONGEST_LABEL - 1] + "…"


def _alt(what: str, words: Sequence[str]) -> str:
    return f"{what}. {'; '.join(words) or 'Nothing to draw'}."


def _size_axis(axes: Axes, logarithmic: bool) -> None:
    """Plain counts on the x axis, logarithmic, if so wanted, where they span more than a decade."""
    low, high = axes.dataLim.intervalx
    if not math.isfinite(high):
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "no finite values", ha="center", transform=axes.transAxes)
    elif logarithmic and 0 < 10 * low < high:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,), numticks=20))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.10g}"))


def _label_ends(axes: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Writes each curve's name beside its last value, moved up or down until no two overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.062
    ends = sorted(ends)
    heights = [(y - bottom) / (top - bottom) for y, _, _ in ends]  # in fractions of the axes
    for i in range(1, len(heights)):
        heights[i] = max(heights[i], heights[i - 1] + gap)
    if heights:
        heights[-1] = min(heights[-1], 1.0)
    for i in range(len(heights) - 2, -1, -1):
        heights[i] = min(heights[i], heights[i + 1] - gap)
    for height, (_, name, colour) in zip(heights, ends, strict=True):
        axes.text(1.015, height, name, color=colour, va="center", weight="bold", transform=axes.transAxes)
