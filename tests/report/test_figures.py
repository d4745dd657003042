from __future__ import annotations

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Section, render
from raydpp.report.style import Plot

CURVES = {
    "alpaca": ([50, 500, 5000], [0.51, 0.62, 0.74], [0.01, 0.01, 0.02]),
    "gaps": ([50, 500, 5000], [0.4, np.nan, 0.6], [0.0, 0.0, np.inf]),
}


@pytest.mark.parametrize(
    "plot",
    [
        pytest.param(lambda: curve_figure({}), id="no curves"),
        pytest.param(lambda: curve_figure({"a": ([1, 2], [np.nan, np.inf], [0, 0])}), id="not finite"),
        pytest.param(lambda: gains_figure({}), id="no gains"),
        pytest.param(lambda: gains_figure({"a": np.full(3, -np.inf)}), id="gains of nothing"),
        pytest.param(lambda: mix_figure({}), id="no sets"),
        pytest.param(lambda: mix_figure({"corpus": {}}), id="no sources"),
    ],
)
def test_nothing_to_draw_is_no_error(plot: object) -> None:
    assert callable(plot)
    figure = plot()
    assert isinstance(figure, Plot)
    assert "<svg" in render("t", "", [Section("s", figures=[figure])])


def test_what_is_not_finite_is_not_drawn() -> None:
    line = curve_figure(CURVES).figure.axes[0].lines[1]
    assert np.isfinite(np.asarray(line.get_ydata())).tolist() == [True, False, True]
    bars = mix_figure({"corpus": {"a": np.inf, "b": np.nan, "c": -1.0, "d": 0.5}})
    assert bars.alt.endswith("d 50.0%, a 0.0%, b 0.0%, c 0.0%.")


@pytest.mark.parametrize(("last", "scale"), [(400, "linear"), (5000, "log")])
def test_sizes_over_a_decade_get_a_logarithmic_axis(last: int, scale: str) -> None:
    plot = curve_figure({"a": ([50, last], [1, 2], [0.1, 0.1])})
    assert plot.figure.axes[0].get_xscale() == scale


def test_the_band_is_one_standard_deviation() -> None:
    plot = curve_figure({"a": ([1, 2], [1.0, 2.0], [0.25, 0.5])})
    corners = np.asarray(plot.figure.axes[0].collections[0].get_paths()[0].vertices)  # [corners, 2]
    assert {(1.0, 0.75), (1.0, 1.25), (2.0, 1.5), (2.0, 2.5)} <= set(map(tuple, corners.tolist()))


def test_the_legend_names_every_curve_that_is_drawn_beside_its_line() -> None:
    curves = {f"c{i}": ([1, 2], [1.0, 1.0], [0, 0]) for i in range(8)}
    figure = curve_figure({"empty": ([1, 2], [np.nan, np.nan], [0, 0]), **curves}).figure
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(curves)
    keys = [(line.get_color(), line.get_linestyle()) for line in legend.get_lines()]
    assert keys == [(line.get_color(), line.get_linestyle()) for line in figure.axes[0].lines]
    assert len(set(keys)) == 8


def test_long_runs_of_gains_stay_small_and_keep_their_ends() -> None:
    gains = np.full(50_000, -np.inf)
    gains[:20_001] = -np.arange(20_001) / 1000
    plot = gains_figure({"selection": gains})
    assert "0 at 1 to -20 at 20,001" in plot.alt
    assert np.nanmin(np.asarray(plot.figure.axes[0].lines[0].get_ydata())) == -20
    assert len(render("t", "", [Section("s", figures=[plot])])) < 100_000


def test_several_runs_of_gains_have_a_legend_and_one_has_none() -> None:
    plot = gains_figure({"one": [0, -1], "two": [0, -2, -3], "empty": [np.nan]})
    (legend,) = plot.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["one", "two"]
    assert plot.alt.endswith("one: 0 at 1 to -1 at 2; two: 0 at 1 to -3 at 3.")
    assert not gains_figure({"one": [0, -1]}).figure.legends
    marked = gains_figure({"one": [0, -1, -2]}, mark=2)
    np.testing.assert_array_equal(marked.figure.axes[0].lines[-1].get_xdata(), [2, 2])
    assert marked.alt.endswith("a line at 2.")


def test_sources_are_sorted_and_the_rest_folded() -> None:
    plot = mix_figure({"corpus": {f"s{i:02}": (i + 1) / 210 for i in range(20)}})
    labels = [label.get_text() for label in plot.figure.axes[0].get_yticklabels()]
    assert labels == [*(f"s{i:02}" for i in range(19, 4, -1)), "other (5 sources)"]
    assert plot.alt.endswith(f"other (5 sources) {15 / 210:.1%}.")


def test_awkward_names_survive(recwarn: pytest.WarningsRecorder) -> None:
    names = ["$x$", "$unbalanced", "中文", "a\x00b\nc", "_hidden", "long " * 20]
    curves = {name: ([1, 2], [1, 2], [0, 0]) for name in names}
    html = render(
        "t",
        "",
        [Section("s", figures=[curve_figure(curves), mix_figure({n: {n: 1.0} for n in names})])],
    )
    for text in ("$x$", "$unbalanced", "中文", "a b c", "_hidden", ("long " * 20)[:31] + "…"):
        assert f">{text}<" in html.replace("\n", "")
    assert not recwarn.list
