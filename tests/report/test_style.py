from __future__ import annotations

import struct

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.style import COLOURS, SERIES, Plot, config, png

EVIL = "</script>$x$\x00\u202e"


@pytest.mark.parametrize(
    "plot",
    [
        pytest.param(curve_figure({EVIL: ([50, 500, 5000], [0.5, 0.6, 0.7], [0.01, 0.01, 0.02])}), id="curves"),
        pytest.param(gains_figure({"a": np.linspace(0, -5, 40)}), id="gains"),
        pytest.param(mix_figure({"corpus": {EVIL: 0.7, "b": 0.3}}), id="mix"),
        pytest.param(gains_figure({}), id="nothing"),
    ],
)
def test_a_figure_is_drawn_without_a_browser(plot: Plot) -> None:
    image = png(plot)
    assert image.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", image[16:24])
    assert 1200 < width < 2000
    assert 160 < height < 1000


@pytest.mark.parametrize("scheme", [0, 1])
def test_the_colours_are_those_of_the_screen(scheme: int) -> None:
    found = config(scheme)
    assert found["range"]["category"] == [COLOURS[f"series-{n}"][scheme] for n in range(SERIES)]
    assert found["title"]["color"] == COLOURS["ink"][scheme]
