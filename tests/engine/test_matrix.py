# SPDX-License-Identifier: Apache-2.0
"""Calling styles x methods x families: every cell of the table in docs/calling-styles.md is run and
compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vtc
from vtc.benchmarks.shared.markdown import read_block
from vtc.benchmarks.support import calling_styles, mini_families
from vtc.benchmarks.support.tables import said_of, style_matrix, without_names
from vtc.method import Scorer

ROOT = Path(__file__).resolve().parents[2]
REFRESH = "run: python -m vtc.benchmarks.support.tables"
QUICK = ("one prompt", "batch, padded on the left", "second turn on the same cache")
"""The others are slow in sum."""
ROWS = [
    pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in calling_styles.STYLES
]
FIRST = next(iter(calling_styles.STYLES))


@pytest.mark.parametrize("family", mini_families.COLUMNS)
@pytest.mark.parametrize("style", ROWS)
def test_cells(style: str, family: str) -> None:
    """A cell agrees with its oracle or is refused, and the table says so.

    A method that cannot be wrapped is refused in every style.
    """
    if "offload" in style:
        pytest.importorskip("accelerate", reason="accelerate is a dev dependency")
    if "PEFT" in style:
        pytest.importorskip("peft", reason="peft is a dev dependency")
    model, table = (
        mini_families.build(family),
        read_block(ROOT / "docs/calling-styles.md", "styles"),
    )
    for method in calling_styles.METHODS:
        if calling_styles.outcome(FIRST, method, family) is not None and style != FIRST:
            with pytest.raises(vtc.UnsupportedError):
                vtc.wrap(model, calling_styles.METHODS[method])
            continue
        why = calling_styles.outcome(style, method, family)
        why = None if why is None else without_names(why, method)
        assert why == said_of(table, style, method, family), f"{method}; {REFRESH}"


def test_the_table_in_the_readme_has_all_rows_and_columns() -> None:
    head, _, *rows = (
        read_block(ROOT / "docs/calling-styles.md", "styles").split("\n\n")[0].splitlines()
    )
    assert [row.split(" | ")[0].strip("| ") for row in rows] == list(calling_styles.STYLES), REFRESH
    names = [cell.strip(" `") for cell in head.strip("|").split("|")]
    assert names[1:-1] == list(calling_styles.METHODS), REFRESH


def test_a_table_is_read_as_it_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every cell of an arbitrary table comes back, refusals that hold for a whole family too."""

    def answer(style: str, method: str, family: str) -> str | None:
        if style == FIRST:
            return None if method != "pitome" or len(family) % 2 else "pitome is not for this"
        n = len(style) * len(family) % 5
        if n == 0:
            return "nothing goes here"
        return f"no {method}" if n + len(method) in (9, 10, 11) else None

    monkeypatch.setattr(calling_styles, "outcome", answer)
    table = style_matrix()
    for style in calling_styles.STYLES:
        for family in mini_families.COLUMNS:
            for method in calling_styles.METHODS:
                if style != FIRST and answer(FIRST, method, family):
                    continue
                why = answer(style, method, family)
                why = None if why is None else without_names(why, method)
                assert said_of(table, style, method, family) == why
    with pytest.raises(ValueError, match="no row for by hand"):
        said_of(table, "by hand", method, family)


# ---- what runs the cells can fail ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Nothing(vtc.Method):
    """Leaves everything alone."""

    name: ClassVar[str] = "test-nothing"

    def on_features(self, v: Any) -> None:
        return None


@dataclass(frozen=True, kw_only=True)
class First(Scorer):
    """Keeps half of the features."""

    name: ClassVar[str] = "test-first"

    def score(self, v: Any) -> torch.Tensor:
        return -v.index.float()


def run(style: str, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calling_styles.METHODS, "test", method)
    with torch.no_grad():
        calling_styles.STYLES[style](calling_styles.StyleCell(style, "test", "LLaVA, CLIP"))


NOT_HERE = ("chunked prefill", "`torch.compile(fullgraph=True)`")
ANSWERED = [s for s in calling_styles.STYLES if s not in NOT_HERE]


@pytest.mark.parametrize("style", ANSWERED)
def test_a_method_that_does_nothing_has_no_yes(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="no teeth"):
        run(style, Nothing(), monkeypatch)


@pytest.mark.parametrize("style", [s for s in ANSWERED if "static" not in s and "CPU" not in s])
def test_a_wrong_column_has_no_yes(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine drops a token next to the one that it says: the oracle masks another."""
    from vtc.engine.llm.forward import Forward

    stock = Forward.drop

    def shifted(self: Any, hidden: Any, view: Any, reduction: Any, *more: Any) -> Any:
        return stock(self, hidden.nan_to_num().roll(1, 1), view, reduction, *more)

    run(style, First(keep_ratio=0.5), monkeypatch)
    monkeypatch.setattr(Forward, "drop", shifted)
    with pytest.raises(AssertionError, match=r"not close|not equal|do not match"):
        run(style, First(keep_ratio=0.5), monkeypatch)
