# SPDX-License-Identifier: Apache-2.0
"""What a report is made of: sections with tables, figures and notes; and columns of tables."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

Row = dict[str, Any]
Result = dict[str, Any]


@dataclass(frozen=True)
class Cell:
    """Text, and what a table is sorted by: a number, or the text itself."""

    text: str
    value: float | None = None


@dataclass
class Table:
    """Rows of cells; ``strong`` are those of the stock model, or of what was chosen."""

    title: str
    head: list[str]
    rows: list[list[Cell]]
    strong: set[int] = field(default_factory=set)

    @property
    def words(self) -> set[int]:
        """The columns that are text."""
        columns = range(len(self.head))
        return {i for i in columns if all(line[i].value is None for line in self.rows)}


@dataclass
class Figure:
    """A drawing as SVG, or a picture as a data URI."""

    title: str
    svg: str = ""
    picture: str = ""


@dataclass
class Section:
    """What one result file says.

    Attributes:
        brief: what the table at the top says of it, by heading.
        facts: name and text of where it comes from, the command first.
        notes: sentences: what was skipped, refused, not finished, where compression does not pay.
    """

    title: str
    source: str
    brief: dict[str, str] = field(default_factory=dict)
    facts: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)


# ---- columns ----------------------------------------------------------------------------------

Column = tuple[str, Callable[[Row], Cell]]


def number(head: str, key: str, digits: int = 0, scale: float = 1.0, unit: str = "") -> Column:
    """A column of a field, empty where nothing was measured."""

    def cell(row: Row) -> Cell:
        value = row.get(key)
        if not isinstance(value, (int, float)):
            return Cell("")
        return Cell(f"{value * scale:.{digits}f}{unit}", value * scale)

    return head, cell


def between(head: str, key: str, digits: int = 1, scale: float = 100.0) -> Column:
    """A column of a field with its interval, ``key_low`` and ``key_high``."""

    def cell(row: Row) -> Cell:
        values = [row.get(key + end) for end in ("", "_low", "_high")]
        if values[0] is None:
            return Cell("")
        mid, low, high = (v if v is None else scale * v for v in values)
        if low is None or high is None:
            return Cell(f"{mid:.{digits}f}", mid)
        return Cell(f"{mid:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})", mid)

    return head, cell


def text(head: str, key: str) -> Column:
    """A column of text."""
    return head, lambda row: Cell("" if row.get(key) is None else rounded(str(row[key])))


def rounded(words: str) -> str:
    """Text with the long fractions in it, such as 0.2222222222222222, rounded to four digits."""
    return re.sub(r"\d*\.\d{6,}", lambda found: f"{float(found[0]):.4g}", words)


def speedup(head: str, key: str) -> Column:
    """A column of how many times as fast, from a ratio of times."""

    def cell(row: Row) -> Cell:
        ratio = row.get(key)
        return Cell(f"{1 / ratio:.2f}x", 1 / ratio) if ratio else Cell("")

    return head, cell


def table(title: str, columns: Sequence[Column], rows: Sequence[Row]) -> Table:
    """A table of the columns that have something to say."""
    cells = [[cell(row) for _, cell in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i].text for line in cells)]
    strong = {
        n
        for n, row in enumerate(rows)
        if row.get("method") == "uncompressed" or row.get("is_chosen")
    }
    return Table(
        title, [columns[i][0] for i in used], [[line[i] for i in used] for line in cells], strong
    )
