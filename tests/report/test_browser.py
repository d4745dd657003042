"""A report in headless Chromium: what it draws, what a pointer finds, and that nothing is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Pair, Section, render, visible
from raydpp.report.map import map_figure
from raydpp.report.style import COLOURS
from raydpp.report.table import Table

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium"),
]
EVIL = "</script><script>document.title = 'ran'</script><b>\u202e\x00"
CORNER = "const corner = (view) => view.origin().map((at, axis) => at + view.padding()[['left', 'top'][axis]]);"
"""Where the plot begins on the canvas."""

# Where the first label of a legend is on the canvas.
LEGEND_LABEL = """
const find = (item, x, y) => {
  if (item.mark?.role === "legend-label") return [x + item.x, y + item.y];
  for (const child of item.items ?? []) {
    const found = find(child, x + (child.items && child.x || 0), y + (child.items && child.y || 0));
    if (found) return found;
  }
};
const view = document.querySelector("figure").drawn.view;
return find(view.scenegraph().root, ...corner(view));
"""
NAMES = {
    "markup": EVIL,
    "quotes": "\"'`${1}{{x}}",
    "long": "x" * 100_000,
}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=900,1400"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options=options, service=service)
    yield driver
    driver.quit()


def wait(browser: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 30).until(lambda b: b.execute_script(f"return {script}"))


def opened(browser: Any, path: Path, name: str, scheme: str) -> None:
    curves = {name: ([1, 2, 3], [1.0, 2.0, 3.0], [0.1] * 3), "b": ([1, 2, 3], [2.0, 3.0, 5.0], [0.0] * 3)}
    plots = [
        curve_figure(curves),
        gains_figure({"a": np.linspace(0, -5, 40)}),
        mix_figure({"whole": {name: 0.7, "b": 0.3}, name: {name: 0.4, "b": 0.6}}),
    ]
    show(browser, path, [Section(name, name, Table(name, [name], [[name]]), plots)], scheme)
    wait(browser, "document.querySelectorAll('figure svg').length === 3")


def show(browser: Any, path: Path, sections: list[Section], scheme: str) -> None:
    path.write_text(render("title", sections[0].text, sections))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_figures_answer_to_the_pointer(browser: Any, tmp_path: Path, name: str, scheme: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By

    opened(browser, tmp_path / "report.html", NAMES[name], scheme)
    assert browser.title == "title"
    assert not browser.find_elements(By.CSS_SELECTOR, "b")
    figure = browser.find_element(By.TAG_NAME, "figure")
    drawn = COLOURS["series-0"][scheme == "dark"]
    assert figure.find_elements(By.CSS_SELECTOR, f"path[stroke='{drawn}']")
    # the pointer in the middle of the plot finds one of the points, with its numbers
    plot = figure.find_element(By.CSS_SELECTOR, "svg path.background")
    ActionChains(browser).move_to_element(plot).move_by_offset(5, 5).perform()
    wait(browser, "document.querySelector('#vg-tooltip-element.visible') !== null")
    shown = browser.find_element(By.ID, "vg-tooltip-element")
    for text in ("name", "examples m", "log-det distance", "low", "high"):
        assert text in shown.text
    assert int(browser.execute_script("return parseInt(arguments[0].style.left)", shown)) > 0
    # the second entry of the legend alone: the other line becomes faint
    ActionChains(browser).click(figure.find_elements(By.CSS_SELECTOR, ".mark-text.role-legend-label text")[1]).perform()
    opacities = (
        "[...document.querySelectorAll('figure')[0].querySelectorAll('.mark-line path')]"
        ".map(p => +(p.getAttribute('opacity') ?? 1)).sort().join()"
    )
    assert wait(browser, f"{opacities}.startsWith('0.08') && {opacities}.endsWith(',1')")
    assert not complaints(browser)


def complaints(browser: Any) -> list[Any]:
    return [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", NAMES)
def test_a_map_shows_texts_keeps_one_and_toggles_sources(browser: Any, tmp_path: Path, name: str, scheme: str) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.actions.wheel_input import ScrollOrigin
    from selenium.webdriver.common.by import By

    text = f"user: {NAMES[name]}\n\nassistant: \tok"
    sources, ranks = [NAMES[name], "b", "b", NAMES[name]], [None, 2, 1, None]
    plot = map_figure([0, 1, 2, 4], [0, 4, 2, 3], sources, [text, "one", text, "three"], ranks)
    pair = Pair(NAMES[name], (NAMES[name], "left"), (text, text))
    show(browser, tmp_path / "report.html", [Section("Map", figures=[plot]), Section("Pairs", pairs=[pair])], scheme)
    wait(browser, "Boolean(document.querySelector('figure').drawn)")
    canvas = browser.find_element(By.TAG_NAME, "canvas")

    def pointer(place: tuple[int, int]) -> Any:
        """At a point of the map: where the view has it, from the middle of the canvas."""
        x, y, left, top = browser.execute_script(
            CORNER + "const view = document.querySelector('figure').drawn.view;"
            "return [view.scale('x')(arguments[0]), view.scale('y')(arguments[1]), ...corner(view)]",
            *place,
        )
        x, y = x + left - canvas.size["width"] / 2, y + top - canvas.size["height"] / 2
        return ActionChains(browser).move_to_element_with_offset(canvas, round(x), round(y))

    def tooltip() -> str:
        return str(
            browser.execute_script("return document.querySelector('#vg-tooltip-element.visible')?.innerText ?? ''")
        )

    picked, left_out = (2048, 2048), (0, 0)
    assert plot.columns["x"].index(2048) == plot.columns["rank"].index(1)
    pointer(picked).perform()
    wait(browser, "document.querySelector('#vg-tooltip-element.visible') !== null")
    said = tooltip()
    assert all(part in said for part in ("pick", "source", "user: ")), said
    panel = browser.find_element(By.CSS_SELECTOR, "aside")
    assert not panel.is_displayed()
    pointer(picked).click().perform()
    assert panel.is_displayed()
    kept = panel.find_element(By.TAG_NAME, "pre").get_attribute("textContent")
    assert kept == visible(text if len(text) <= 2000 else text[:1999] + "…")
    assert panel.find_element(By.TAG_NAME, "p").text == "pick 1, b"
    pointer(left_out).click().perform()
    assert panel.find_element(By.TAG_NAME, "p").text.split() == plot.columns["name"][0].split()
    assert "pick" not in tooltip()
    # the first entry of the legend alone: nothing of the other source is found
    label = browser.execute_script(CORNER + LEGEND_LABEL)
    across, down = label[0] - canvas.size["width"] / 2, label[1] - canvas.size["height"] / 2
    ActionChains(browser).move_to_element_with_offset(canvas, round(across), round(down)).click().perform()
    pointer(picked).perform()
    assert tooltip() == ""
    pointer(left_out).perform()
    assert "user: " in tooltip()
    span = "(([low, high]) => high - low)(document.querySelector('figure').drawn.view.scale('x').domain())"
    whole = browser.execute_script(f"return {span}")
    ActionChains(browser).scroll_from_origin(ScrollOrigin.from_element(canvas), 0, -300).perform()
    wait(browser, f"{span} < {whole}")
    ActionChains(browser).double_click(canvas).perform()
    wait(browser, f"{span} === {whole}")
    assert browser.title == "title"
    assert not browser.find_elements(By.CSS_SELECTOR, "b")
    assert browser.find_element(By.CSS_SELECTOR, ".pair pre").get_attribute("textContent") == visible(text)
    assert not complaints(browser)


def test_figures_follow_the_scheme_while_the_page_is_open(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path / "report.html", "a", "light")
    media = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    wait(browser, f"document.querySelector(\"figure path[stroke='{COLOURS['series-0'][1]}']\") !== null")


def test_the_policy_refuses_a_script_that_is_not_the_pages_own(browser: Any, tmp_path: Path) -> None:
    opened(browser, tmp_path / "report.html", "a", "light")
    page = (tmp_path / "report.html").read_text()
    (tmp_path / "changed.html").write_text(page.replace("<main>", "<main><script>document.title = 'ran'</script>"))
    browser.get((tmp_path / "changed.html").as_uri())
    assert browser.title == "title"
    assert any("Content Security Policy" in entry["message"] for entry in browser.get_log("browser"))
