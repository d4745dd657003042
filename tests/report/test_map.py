from __future__ import annotations

import string

import numpy as np
import pytest

from raydpp.report.html import Section, render
from raydpp.report.map import map_figure
from raydpp.report.style import png

NAMES = ["a", "b", "a", "b", "a"]
TEXTS = ["0", "1", "2", "3", "4"]


def test_first_picks_are_drawn_above_later_ones_and_these_above_the_rest() -> None:
    plot = map_figure([0, 1, 2, 3, 4], [0, 0, 0, 0, 8], NAMES, TEXTS, [None, 2, 1, None, 3])
    assert plot.columns["text"] == ["0", "3", "4", "1", "2"]
    assert plot.columns["rank"] == [None, None, 3, 2, 1]
    assert plot.columns["name"] == ["a", "b", "a", "b", "a"]
    assert plot.columns["y"] == [0, 0, 4095, 0, 0]
    assert plot.columns["x"] == [0, 1536, 2048, 512, 1024]  # one scale for both
    assert plot.alt == "Map of the examples. 5 points, 3 of them picked: a, b."
    assert len(plot.spec["layer"]) == 2


def test_without_ranks_points_keep_their_order_and_colours_are_names() -> None:
    plot = map_figure([0.5, 1, 2, 3, 4], [0, 0, 0, 0, 1], NAMES, TEXTS, kind="table")
    assert plot.columns["text"] == TEXTS
    (layer,) = plot.spec["layer"]
    assert layer["encoding"]["color"]["scale"]["domain"] == ["a", "b"]
    assert layer["encoding"]["tooltip"][0]["title"] == "table"
    few_first = map_figure([0, 1, 2], [0, 0, 1], ["few", "many", "many"], TEXTS[:3])
    assert few_first.spec["layer"][0]["encoding"]["color"]["scale"]["domain"] == ["few", "many"]
    assert "rank" not in plot.columns


@pytest.mark.parametrize(("points", "names"), [(1, 1), (3, 1), (40, 40), (16, 16)])
def test_any_map_can_be_drawn(points: int, names: int) -> None:
    own = [f"s{n % names:02}" for n in range(points)]
    plot = map_figure(np.zeros(points), np.ones(points), own, own, [*range(1, points), None])
    shown = plot.spec["layer"][0]["encoding"]["color"]["scale"]["domain"]
    assert len(shown) == min(names, 16)
    assert set(plot.columns["name"]) == set(shown)
    assert ("other (25 sources)" in shown) == (names == 40)
    assert png(plot).startswith(b"\x89PNG")


def test_texts_are_shown_as_text_and_cut() -> None:
    texts = ["</script><b>\u202e\x00\ud800", "x" * 100_000, "two\nlines", "", "y" * 2000]
    shown = map_figure([0] * 5, [0] * 5, NAMES, texts).columns["text"]
    assert shown == ["</script><b>\ufffd\ufffd\ufffd", "x" * 1999 + "…", "two\nlines", "", "y" * 2000]


def test_a_page_with_20_000_points_has_at_most_2_mb() -> None:
    random = np.random.default_rng(0)
    letters = np.array([*string.ascii_letters, *string.digits, "语", "ж"])
    texts = ["".join(row) for row in random.choice(letters, (20_000, 200))]
    x, y = random.standard_normal((2, 20_000))
    names = [f"source {n % 12}" for n in range(20_000)]
    ranks = [*range(1, 10_001), *[None] * 10_000]
    plot = map_figure(x, y, names, texts, ranks)
    assert 20 < len(plot.columns["text"][0]) < 200  # of what cannot be packed well
    assert len(render("t", "", [Section("s", figures=[plot])]).encode()) <= 1_750_000  # the rest is for other sections
