from __future__ import annotations

import json

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.style import SERIES, Plot

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
    ],
)
def test_nothing_to_draw_is_no_error(plot: object) -> None:
    assert callable(plot)
    figure = plot()
    assert isinstance(figure, Plot)
    assert "no finite values" in str(figure.spec)
    assert figure.alt.endswith("Nothing to draw.")


def test_what_is_not_finite_is_not_drawn() -> None:
    points = curve_figure(CURVES).spec["data"]["values"]
    assert [point["y"] for point in points if point["name"] == "gaps"] == [0.4, None, 0.6]
    assert points[-1]["low"] is None
    bars = mix_figure({"corpus": {"a": np.inf, "b": np.nan, "c": -1.0, "d": 0.5}})
    assert bars.alt.endswith("d 50.0%, a 0.0%, b 0.0%, c 0.0%.")


@pytest.mark.parametrize(("last", "scale"), [(400, "linear"), (5000, "log")])
def test_sizes_over_a_decade_get_a_logarithmic_axis(last: int, scale: str) -> None:
    plot = curve_figure({"a": ([50, last], [1, 2], [0.1, 0.1])})
    assert plot.spec["encoding"]["x"]["scale"].get("type", "linear") == scale
    assert "type" not in gains_figure({"a": np.zeros(last)}).spec["encoding"]["x"]["scale"]


def test_the_band_is_one_standard_deviation() -> None:
    plot = curve_figure({"a": ([1, 2], [1.0, 2.0], [0.25, 0.5])})
    assert [(p["x"], p["low"], p["high"]) for p in plot.spec["data"]["values"]] == [(1, 0.75, 1.25), (2, 1.5, 2.5)]
    assert [layer["mark"]["type"] for layer in plot.spec["layer"]] == ["area", "line", "point"]
    flat = curve_figure({"a": ([1, 2], [1.0, 2.0], [0, 0])})
    assert [layer["mark"]["type"] for layer in flat.spec["layer"]] == ["line", "point"]


def test_the_legend_names_every_curve_that_is_drawn_beside_its_line() -> None:
    curves = {f"c{i}": ([1, 2], [1.0, 1.0], [0, 0]) for i in range(8)}
    spec = curve_figure({"empty": ([1, 2], [np.nan, np.nan], [0, 0]), **curves}).spec
    colour, dash = spec["encoding"]["color"], spec["layer"][0]["encoding"]["strokeDash"]
    assert colour["scale"]["domain"] == dash["scale"]["domain"] == list(curves)
    assert colour["legend"] == dash["legend"]  # one legend for both
    assert len({(n % SERIES, *dashes) for n, dashes in enumerate(dash["scale"]["range"])}) == 8


def test_long_runs_of_gains_stay_small_and_keep_their_ends() -> None:
    gains = np.full(50_000, -np.inf)
    gains[:20_001] = -np.arange(20_001) / 1000
    plot = gains_figure({"selection": gains})
    assert "0 at 1 to -20 at 20,001" in plot.alt
    points = plot.spec["data"]["values"]
    assert min(point["y"] for point in points if point["y"] is not None) == -20
    assert len(json.dumps(plot.spec)) < 100_000


def test_several_runs_of_gains_have_a_legend_and_one_has_none() -> None:
    plot = gains_figure({"one": [0, -1], "two": [0, -2, -3], "empty": [np.nan]})
    assert plot.spec["encoding"]["color"]["scale"]["domain"] == ["one", "two"]
    assert plot.spec["encoding"]["color"]["legend"]
    assert plot.alt.endswith("one: 0 at 1 to -1 at 2; two: 0 at 1 to -3 at 3.")
    assert gains_figure({"one": [0, -1]}).spec["encoding"]["color"]["legend"] is None
    marked = gains_figure({"one": [0, -1, -2]}, mark=2)
    assert [layer["data"]["values"] for layer in marked.spec["layer"] if "data" in layer] == [[{"x": 2}]] * 2
    assert marked.spec["layer"][-1]["mark"]["text"] == "pick 2"
    assert marked.alt.endswith("a line at 2.")


def test_sources_are_sorted_and_the_rest_folded() -> None:
    plot = mix_figure({"corpus": {f"s{i:02}": (i + 1) / 210 for i in range(20)}})
    assert plot.spec["encoding"]["y"]["sort"] == [*(f"s{i:02}" for i in range(19, 4, -1)), "other (5 sources)"]
    assert plot.alt.endswith(f"other (5 sources) {15 / 210:.1%}.")


def test_awkward_names_become_labels_of_one_line_and_no_two_alike() -> None:
    names = ["$x$", "中文", "a\x00b\nc\u202e", "_hidden", "long " * 20, "long " * 30, "</script>"]
    labels = ["$x$", "中文", "a b c ", "_hidden", long := ("long " * 20)[:31] + "…", f"{long} (2)", "</script>"]
    curves = curve_figure({name: ([1, 2], [1, 2], [0, 0]) for name in names})
    assert curves.spec["encoding"]["color"]["scale"]["domain"] == labels
    mix = mix_figure({name: {name: 1.0} for name in names})
    assert mix.spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == labels
    assert set(mix.spec["encoding"]["y"]["sort"]) == set(labels)
