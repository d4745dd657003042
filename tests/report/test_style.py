from __future__ import annotations

import re

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Section, render
from raydpp.report.style import COLOURS


@pytest.fixture(scope="module")
def html() -> str:
    plots = [
        curve_figure({"alpaca": ([50, 500, 5000], [0.51, 0.62, 0.74], [0.01, 0.01, 0.02])}),
        gains_figure({"a": np.linspace(0, -5, 40)}),
        mix_figure({"corpus": {"a": 0.7, "b": 0.3}, "_chosen": {"a": 0.4, "b": 0.6}}),
    ]
    return render("t", "", [Section("s", figures=plots)])


def test_ids_are_unique_and_references_find_them(html: str) -> None:
    ids = re.findall(r' id="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted
    assert wanted <= set(ids)


def test_the_same_plot_may_be_shown_twice() -> None:
    plot = mix_figure({"corpus": {"a": 1.0}})
    html = render("t", "", [Section("s", figures=[plot]), Section("s", figures=[plot])])
    assert html.count("<svg") == 2


def test_colours_follow_the_screen(html: str) -> None:
    assert "prefers-color-scheme: dark" in html
    drawn = html[html.index("<body>") :]
    assert "var(--series-0)" in drawn
    assert not [light for light, _ in COLOURS.values() if light in drawn]
    assert not re.findall(r"(?:fill|stroke|color): *#[0-9a-f]{6}", drawn)
