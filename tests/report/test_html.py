from __future__ import annotations

import base64
import hashlib
import re
import string
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Pair, Section, render, write_report
from raydpp.report.map import map_figure
from raydpp.report.style import png
from raydpp.report.table import Table
from raydpp.storage import Folder
from tests.report.pages import figures, unpacked

EVIL = '<script>alert("x")</script>'
CURVES = {
    "alpaca": ([50, 500, 5000], [0.51, 0.62, 0.74], [0.01, 0.01, 0.02]),
    EVIL: ([50, 500, 5000], [0.4, np.nan, 0.6], [0.0, 0.0, np.inf]),
}


class Page(HTMLParser):
    """What a browser would see of the document: tags with their attributes, and text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def values(self, attribute: str) -> list[str]:
        return [found for _, attrs in self.tags if (found := attrs.get(attribute)) is not None]


def build() -> str:
    plots = [
        curve_figure(CURVES),
        gains_figure({"a": np.linspace(0, -5, 40)}),
        mix_figure({"corpus": {EVIL: 0.7, "b": 0.3}, "_chosen": {EVIL: 0.4, "b": 0.6}}),
    ]
    table = Table("How far", ["table", "rows", "distance"], [[EVIL, 52002, 0.512345], ["dolly", 15011, float("nan")]])
    return render(
        "Diversity of A & B",
        f"A lead about {EVIL}.",
        [Section("How <diverse>", "One.\n\nTwo.", table, plots[:2]), Section("Mix", figures=plots[2:])],
    )


@pytest.fixture(scope="module")
def html() -> str:
    return build()


def test_the_report_has_its_headings_numbers_and_names(html: str) -> None:
    page = Page(html)
    for text in (
        "Diversity of A & B",
        "How <diverse>",
        "How far",
        "One.",
        "Two.",
        "52,002",
        "0.5123",
        "n/a",
        EVIL,
    ):
        assert text in page.texts
    assert any('"name":"_chosen"' in text for text in unpacked(html))
    assert page.texts.count("Diversity of A & B") == 2  # the title and the first heading


def test_names_are_escaped_everywhere(html: str) -> None:
    page = Page(html)
    kinds = [(attrs.get("type") or "").removeprefix("application/") for tag, attrs in page.tags if tag == "script"]
    assert kinds == ["gzip", "gzip", "gzip", "json", "gzip", ""]
    assert html.count("&lt;script&gt;") >= 4  # lead, table, two alternatives
    assert len(figures(html)) == 3


def test_the_policy_allows_what_is_in_the_page_and_no_more(html: str) -> None:
    page = Page(html)
    assert not {"link", "img", "iframe"} & {tag for tag, _ in page.tags}
    assert not page.values("src") + page.values("href") + page.values("style")
    (policy,) = [content for content in page.values("content") if "default-src" in content]
    inside = re.findall(r"<(style|script)>(.*?)</\1>", html, re.DOTALL)
    inside = [*inside[:1], ("script", unpacked(html)[-1]), *inside[1:]]  # Vega, which the page's script puts in
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for _, text in inside]
    style, *scripts = [f"'sha256-{one}'" for one in hashes]
    assert policy == f"default-src 'none'; style-src {style}; script-src {' '.join(scripts)}"
    assert len(scripts) == 2


def test_a_page_without_figures_runs_nothing() -> None:
    html = render("t", "", [Section("s")])
    assert "script-src 'none'" in html
    assert "<script" not in html


@pytest.mark.parametrize("text", ["a\x00b\x1b[31m", "\u202egnp.exe", "\ud800", "x\u2066y\u2069"])
def test_what_cannot_be_seen_is_shown(text: str) -> None:
    html = render(text, text, [Section(text, text, Table(text, [text], [[text]]), [mix_figure({text: {text: 1.0}})])])
    assert not set(text) & set(html) - set(string.printable)
    assert html.count("\ufffd") >= 7
    html.encode()


def test_a_report_is_written_with_its_plots(tmp_path: Path) -> None:
    plots = [gains_figure({"a": [0, -1]}), map_figure([0], [0], ["a"], ["b"])]
    sections = [Section("s", figures=[plot]) for plot in plots]
    write_report(Folder.at(tmp_path), "t", "", sections)
    assert (tmp_path / "report.html").read_text() == render("t", "", sections)
    for plot in plots:
        assert (tmp_path / "plots" / f"{plot.name}.png").read_bytes() == png(plot)


def test_the_same_input_gives_the_same_bytes(html: str) -> None:
    assert build() == html


def test_figures_are_described_in_words(html: str) -> None:
    labels = [label for label in Page(html).values("aria-label") if "chart" in label]
    assert len(labels) == 3
    assert "alpaca: 0.51 at 50 to 0.74 at 5,000" in labels[0]
    assert "0 at 1 to -5 at 40" in labels[1]
    assert f"corpus: {EVIL} 70.0%, b 30.0%" in labels[2]


def test_pairs_stand_side_by_side_as_text_and_a_command_can_be_copied() -> None:
    pair = Pair("alike", ("left \u202e", EVIL), (EVIL + "\x00\n  indented", "x" * 100_000))
    page = Page(render("t", "", [Section("s", pairs=[pair, pair], command="raydpp <b>")]))
    assert page.texts.count(EVIL) == 2
    for text in ("alike", "left \ufffd", f"{EVIL}\ufffd\n  indented", "x" * 100_000, "raydpp <b>"):
        assert text in page.texts
    assert [tag for tag, _ in page.tags].count("pre") == 5


def test_empty_sections_and_tables() -> None:
    page = Page(render("t", "", [Section("bare"), Section("rowless", table=Table("", ["a"], []))]))
    assert {"bare", "rowless", "a"} <= set(page.texts)
    assert "p" not in {tag for tag, _ in page.tags}


def test_headings_align_with_their_numbers() -> None:
    html = render("t", "", [Section("s", table=Table("", ["name", "n"], [["a", 1], ["b", None]]))])
    assert '<th scope="col">name</th>' in html
    assert '<th scope="col" class="number">n</th>' in html
    assert "<td>a</td>" in html
    assert '<td class="number">1</td>' in html
