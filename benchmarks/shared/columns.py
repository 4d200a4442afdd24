# SPDX-License-Identifier: Apache-2.0
"""Columns of tables: cells that show a field of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Cell = Callable[[dict[str, Any]], str]


def number(name: str, digits: int = 0, scale: float = 1.0, unit: str = "") -> Cell:
    """A cell that shows a field, empty where nothing was measured."""

    def cell(row: dict[str, Any]) -> str:
        value = row.get(name)  # older result files lack some
        return "" if value is None else f"{value * scale:.{digits}f}{unit}"

    return cell


def interval(row: dict[str, Any]) -> str:
    """Accuracy with its 95 % interval, in percent."""
    if row["accuracy"] is None:
        return ""
    low, mid, high = (100 * row[k] for k in ("accuracy_low", "accuracy", "accuracy_high"))
    return f"{mid:.1f} [{low:.0f}, {high:.0f}]"


def speedup(row: dict[str, Any]) -> str:
    """How many times faster than the stock model."""
    ratio = row["prefill_ratio"]
    return f"{1 / ratio:.2f}x" if ratio else ""
