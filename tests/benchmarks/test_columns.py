# SPDX-License-Identifier: Apache-2.0
"""The column model: cells of rows that lack fields, and what each renderer makes of one table."""

from __future__ import annotations

import io

from rich.console import Console

from vtc.benchmarks.shared.columns import (
    WHOLE,
    between,
    comma_separated,
    fill,
    markdown,
    number,
    plain,
    speedup,
    terminal,
    used,
    words,
)

ROWS = [
    {"name": "a|b", "x": 0.5, "ratio": 0.25, "in": {"y": 1.0}, "in_low": {"y": 0.9}, "in_high": {}},
    {"name": "c", "x": None, "ratio": 0, "in": None},
]
COLUMNS = [
    words("name", "name"),
    number("x %", "x", 1, 100),
    number("z", "z"),
    speedup("gain", "ratio"),
    between("y", ("in", "y"), ends=WHOLE),
    words("first", lambda row: row["name"][0], "center"),
]


def test_cells_and_renderers():
    assert [column.title for column in used(COLUMNS, ROWS)] == ["name", "x %", "gain", "y", "first"]
    table = fill(used(COLUMNS, ROWS), ROWS, strong={0})
    assert [cell.value for cell in table.rows[0]] == [None, 50.0, 4.0, 100.0, None]
    assert table.lines[1:] == [["a|b", "50.0", "4.00x", "100.0", "a"], ["c", "", "", "", "c"]]
    assert markdown(table, lambda text: text.replace("|", "!")).splitlines() == [
        "| name | x % | gain | y | first |",
        "|---|---:|---:|---:|:-:|",
        "| a!b | 50.0 | 4.00x | 100.0 | a |",
        "| c |  |  |  | c |",
    ]
    console = Console(width=40, record=True, file=io.StringIO())
    console.print(terminal(table, whole=1))
    assert console.export_text().splitlines()[1].split() == ["a|b", "50.0", "4.00x", "100.0", "a"]


def test_an_interval_that_is_known():
    row = {"y": 0.5, "y_low": 0.25, "y_high": 0.75}
    (cells,) = fill([between("y", "y"), between("y", "y", ends=WHOLE)], [row]).rows
    assert [cell.text for cell in cells] == ["50.0 (25.0 to 75.0)", "50.0 [25, 75]"]


def test_files_hold_four_digits():
    rows = [{"n": 12345, "x": 0.123456, "why": "a, b"}, {"n": None}]
    columns = [plain(name) for name in ("n", "x", "why")]
    assert comma_separated(fill(columns, rows)) == 'n,x,why\n12345,0.1235,"a, b"\n,,\n'
