"""A report in headless Chromium: what it draws, what a pointer finds, and that nothing is refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydpp.report.figures import curve_figure, gains_figure, mix_figure
from raydpp.report.html import Section, render
from raydpp.report.style import COLOURS
from raydpp.report.table import Table

webdriver = pytest.importorskip("selenium.webdriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (shutil.which("chromium") and shutil.which("chromedriver")), reason="no Chromium"),
]
EVIL = "</script><script>document.title = 'ran'</script><b>\u202e\x00"
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

    return WebDriverWait(browser, 60).until(lambda b: b.execute_script(f"return {script}"))


def opened(browser: Any, path: Path, name: str, scheme: str) -> None:
    curves = {name: ([1, 2, 3], [1.0, 2.0, 3.0], [0.1] * 3), "b": ([1, 2, 3], [2.0, 3.0, 5.0], [0.0] * 3)}
    plots = [
        curve_figure(curves),
        gains_figure({"a": np.linspace(0, -5, 40)}),
        mix_figure({"whole": {name: 0.7, "b": 0.3}, name: {name: 0.4, "b": 0.6}}),
    ]
    path.write_text(render("title", name, [Section(name, name, Table(name, [name], [[name]]), plots)]))
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
    browser.get(path.as_uri())
    wait(browser, "document.querySelectorAll('figure svg').length === 3")


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
    assert not [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]


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
