from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from rich.console import Console

from raydpp.report.table import Table, format_value


def test_a_record_makes_the_same_table_again() -> None:
    table = Table("t", ("name", "n"), [("a", 1), ("b", None)])
    kept = json.loads(json.dumps(table.record, allow_nan=False))
    assert Table(**kept).record == table.record


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234567, "1,234,567"),
        (np.int64(1000), "1,000"),
        (0.000123456, "0.0001235"),
        (12.3456, "12.35"),
        (np.float32(98765.4), "98,765"),
        (-0.5, "-0.5"),
        (float("inf"), "∞"),
        (0.0, "0"),
        (None, ""),
        (True, "yes"),
        ("3", "3"),
    ],
)
def test_a_value_alone_is_shown_as_in_a_column(value: object, text: str) -> None:
    assert format_value(value) == text
    table = Table("", ["h"], [[value]])
    assert table.cells == [[text]]
    assert table.numeric == [isinstance(value, int | float | np.number) and not isinstance(value, bool)]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0334, 0.149, 0.2], ["0.0334", "0.1490", "0.2000"]),
        ([-9.8123, -13.4, None], ["-9.81", "-13.40", ""]),
        ([12345.0, 800.0], ["12,345", "800"]),
        ([52002, 7], ["52,002", "7"]),
        ([0.25, 0.5, float("nan")], ["0.25", "0.50", "n/a"]),
        ([3e-9, 0.0], ["3e-09", "0"]),
        ([0.5, 1e-9], ["0.5", "0.0"]),
    ],
)
def test_the_numbers_of_a_column_have_the_same_decimals(values: list[object], texts: list[str]) -> None:
    table = Table("", ["n"], [[value] for value in values])
    assert table.numeric == [True]
    assert [cell for (cell,) in table.cells] == texts


def test_numbers_among_text_are_text() -> None:
    table = Table("", ["n"], [["all"], [0.125], [True]])
    assert table.numeric == [False]
    assert table.cells == [["all"], ["0.125"], ["yes"]]


def test_the_terminal_shows_title_headings_and_cells_as_they_are() -> None:
    text = io.StringIO()
    rows = [["[red]a[/red] :cat:", 52002], ["b", 7]]
    Console(file=text, width=60).print(Table("The title", ["name", "rows"], rows))
    lines = text.getvalue()
    assert all(part in lines for part in ("The title", "name", "[red]a[/red] :cat:", "52,002"))
    assert "│      7 │" in lines  # right-aligned


def test_nothing_of_a_table_is_obeyed_by_the_terminal() -> None:
    text = io.StringIO()
    Console(file=text, width=60).print(Table("\x1b[31mt", ["[red]h\u202e", "\x07"], [["\x9b1m", "x\u2066"]]))
    assert not set(text.getvalue()) & set("\x1b\x07\x9b\u202e\u2066")
    assert "[red]h\ufffd" in text.getvalue()


def test_a_narrow_terminal_keeps_the_rows_names_and_cuts_nothing_off() -> None:
    text = io.StringIO()
    rows = [["facility-location", 1.25, "a_source_with_a_very_long_name, another"], ["greedy", 2.5, "x"]]
    Console(file=text, width=50).print(Table("", ["method", "distance", "mix"], rows))
    lines = text.getvalue()
    assert "│ facility-location │" in lines
    assert "…" not in lines


def test_ragged_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has 1 cells under 2 headings"):
        Table("", ["a", "b"], [[1, 2], [3]])


def test_a_table_is_made_without_what_draws_it() -> None:
    script = "import sys, raydpp.report.table; print({'rich', 'jinja2', 'vl_convert', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
