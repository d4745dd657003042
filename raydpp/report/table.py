"""A table of results: kept in run.json, printed on the terminal, set in the HTML report."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table as TerminalTable


# Control characters, those that turn the direction of a line, and halves of characters, which UTF-8 cannot write.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")

_NAME_WIDTH = 24  # characters of a first column that a narrow terminal leaves


@dataclass(frozen=True)
class Table:
    """Rows under headings: text, numbers, None for an empty cell.

    A column of numbers is right-aligned and has the same decimals throughout: four significant digits of its largest.

    Raises:
        ValueError: A row has not as many cells as there are headings.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[object]]

    def __post_init__(self) -> None:
        for number, row in enumerate(self.rows):
            if len(row) != len(self.headings):
                raise ValueError(f"row {number} has {len(row)} cells under {len(self.headings)} headings")

    @property
    def record(self) -> dict[str, Any]:
        """What ``Table(**record)`` makes this table of again; strict JSON where the cells are."""
        return {"title": self.title, "headings": list(self.headings), "rows": [list(row) for row in self.rows]}

    @property
    def numeric(self) -> list[bool]:
        """Of each column, whether it holds numbers and nothing else."""
        columns = [[row[i] for row in self.rows if row[i] is not None] for i in range(len(self.headings))]
        return [bool(column) and all(map(_is_number, column)) for column in columns]

    @property
    def cells(self) -> list[list[str]]:
        """Of each row, its cells as they are shown."""
        columns = [
            _aligned([row[i] for row in self.rows]) if numeric else [format_value(row[i]) for row in self.rows]
            for i, numeric in enumerate(self.numeric)
        ]
        return [list(row) for row in zip(*columns, strict=True)]

    def __rich__(self) -> TerminalTable:
        """For a rich console."""
        from rich.table import Table as TerminalTable
        from rich.text import Text

        table, cells = TerminalTable(title=Text(visible(self.title), style="table.title")), self.cells
        for place, (heading, numeric) in enumerate(zip(self.headings, self.numeric, strict=True)):
            # What names a row gives way last; what does not fit goes on in the next line.
            longest = max((len(row[0]) for row in cells), default=0) if place == 0 else 0
            width = min(longest, _NAME_WIDTH)
            table.add_column(
                Text(visible(heading)), justify="right" if numeric else "left", overflow="fold", min_width=width
            )
        for row in cells:
            table.add_row(*map(Text, row))  # names may hold what rich takes for its markup
        return table


def visible(text: str) -> str:
    """A text with U+FFFD for what a terminal or a browser would obey instead of showing it; lines and tabs stay."""
    return _UNSEEN.sub("\ufffd", text.replace("\r\n", "\n"))


def shorten(name: str, longest: int) -> str:
    """A name of at most so many characters, the last an ellipsis where it was longer."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def format_value(value: object) -> str:
    """Counts with separators, other numbers with four significant digits, yes or no; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, numbers.Integral):
        return f"{int(value):,}"
    if isinstance(value, numbers.Real):
        number = float(value)
        if not math.isfinite(number):
            return "n/a" if math.isnan(number) else ("∞" if number > 0 else "-∞")
        return f"{number:,.0f}" if 1000 <= abs(number) < 1e15 else f"{number:.4g}"
    return visible(str(value))


def _is_number(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _aligned(values: Sequence[Any]) -> list[str]:
    """Numbers, and None, with as many decimals as the largest needs for four significant digits."""
    finite = [float(value) for value in values if value is not None and math.isfinite(value)]
    largest = max(map(abs, finite), default=0.0)
    if not 1e-6 <= largest < 1e15:  # all zero, or better with an exponent
        return [format_value(value) for value in values]
    needed = max(len(f"{value:.4g}".partition(".")[2]) for value in finite)
    decimals = min(needed, max(0, 3 - math.floor(math.log10(largest))))
    return [
        format_value(value) if value is None or not math.isfinite(value) else f"{value:,.{decimals}f}"
        for value in values
    ]
