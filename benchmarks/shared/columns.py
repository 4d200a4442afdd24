# SPDX-License-Identifier: Apache-2.0
"""The column model of all tables, and one renderer each for the terminal, Markdown and CSV.

A column has a title and makes the cell of a row, which may be anything; a table is columns filled
with rows. `pages.html` renders the same tables as HTML.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any, Literal, NamedTuple

import rich.table

Align = Literal["left", "center", "right"]
RULES: dict[Align, str] = {"left": "---", "center": ":-:", "right": "---:"}
WHOLE = "[{:.0f}, {:.0f}]"
"""An interval in whole percents, for `between`."""

Key = str | tuple[str, ...]
"""A field of a row, or the path to a field of fields."""


class Cell(NamedTuple):
    """Text, empty where a row has nothing to say, and what a table is sorted by if not by it."""

    text: str
    value: float | None = None


@dataclass(frozen=True)
class Column:
    """Title, the cell of a row, and where cells stand."""

    title: str
    cell: Callable[[Any], Cell]
    align: Align = "right"


@dataclass(frozen=True)
class Table:
    """Rows of cells; ``strong`` are those of the stock model, or of what was chosen."""

    columns: Sequence[Column]
    rows: list[list[Cell]]
    title: str = ""
    strong: Collection[int] = ()

    @property
    def lines(self) -> list[list[str]]:
        """The titles, then the text of each row."""
        titles = [column.title for column in self.columns]
        return [titles, *([cell.text for cell in row] for row in self.rows)]


def fill(
    columns: Sequence[Column], rows: Iterable[Any], title: str = "", strong: Collection[int] = ()
) -> Table:
    """A table of all columns and rows."""
    return Table(columns, [[c.cell(row) for c in columns] for row in rows], title, strong)


def used(columns: Iterable[Column], rows: Sequence[Any]) -> list[Column]:
    """The columns that some row has."""
    return [c for c in columns if any(c.cell(row).text for row in rows)]


# ---- columns -------------------------------------------------------------------------------------


def words(title: str, text: str | Callable[[Any], str], align: Align = "left") -> Column:
    """A column of text: of a field, or made from a row."""
    make = itemgetter(text) if isinstance(text, str) else text
    return Column(title, lambda row: Cell(make(row)), align)


def measured(
    title: str, value: Callable[[Any], float | None], form: Callable[[float], str]
) -> Column:
    """A column of numbers, empty where nothing was measured."""

    def cell(row: Any) -> Cell:
        found = value(row)
        return Cell("") if found is None else Cell(form(found), found)

    return Column(title, cell)


def number(title: str, key: Key, digits: int = 0, scale: float = 1.0, unit: str = "") -> Column:
    """A column of a field."""

    def value(row: Any) -> float | None:
        found = _field(row, key)
        return found * scale if isinstance(found, (int, float)) else None

    return measured(title, value, lambda found: f"{found:.{digits}f}{unit}")


def between(title: str, key: Key, digits: int = 1, scale: float = 100.0, ends: str = "") -> Column:
    """A column of a field with its interval, ``key_low`` and ``key_high``, if it has one."""
    ends = ends or f"({{:.{digits}f}} to {{:.{digits}f}})"

    def cell(row: Any) -> Cell:
        middle, *both = (_field(row, key, end) for end in ("", "_low", "_high"))
        if middle is None:
            return Cell("")
        interval = "" if None in both else " " + ends.format(*(scale * end for end in both))
        return Cell(f"{scale * middle:.{digits}f}{interval}", scale * middle)

    return Column(title, cell)


def speedup(title: str, key: str) -> Column:
    """A column of how many times as fast, from a ratio of times."""

    def value(row: Any) -> float | None:
        ratio = row.get(key)
        return 1 / ratio if ratio else None

    return measured(title, value, lambda found: f"{found:.2f}x")


def plain(name: str) -> Column:
    """A column of a file: a field under its own name, fractions to four digits."""

    def text(row: Any) -> str:
        value = row.get(name)
        return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)

    return words(name, text)


def _field(row: Any, key: Key, end: str = "") -> Any:
    first, *inner = (key,) if isinstance(key, str) else key
    value = row.get(first + end)  # older result files lack some
    for name in inner:
        value = (value or {}).get(name)
    return value


# ---- renderers -----------------------------------------------------------------------------------


def terminal(
    table: Table, whole: int = 0, overflow: Any = "ellipsis", **looks: Any
) -> rich.table.Table:
    """The table for a console.

    Args:
        whole: so many columns are never wrapped; looks: of a Rich table.
    """
    out = rich.table.Table(**{"box": None, "header_style": "bold", "pad_edge": False, **looks})
    for i, column in enumerate(table.columns):
        out.add_column(column.title, justify=column.align, no_wrap=i < whole, overflow=overflow)
    for i, texts in enumerate(table.lines[1:]):
        out.add_row(*texts, style="bold" if i in table.strong else None)
    return out


def markdown(table: Table, escape: Callable[[str], str] = str) -> str:
    """The table in Markdown."""
    head, *rows = ("| " + " | ".join(map(escape, line)) + " |" for line in table.lines)
    rule = "|".join(RULES[column.align] for column in table.columns)
    return "\n".join([head, f"|{rule}|", *rows])


def comma_separated(table: Table) -> str:
    """The table as a CSV file."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(table.lines)
    return out.getvalue()
