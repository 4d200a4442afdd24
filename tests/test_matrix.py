# SPDX-License-Identifier: Apache-2.0
"""Calling styles x methods x families: every cell of the README's table is run and compared."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import vtc
from vtc.benchmarks import mini_families, styles
from vtc.benchmarks.catalogue import read_block, style_matrix
from vtc.method import Scorer

ROOT = Path(__file__).resolve().parent.parent
QUICK = ("one prompt", "batch, padded on the left", "second turn on the same cache")
"""The others are slow in sum."""
ROWS = [pytest.param(s, marks=[] if s in QUICK else pytest.mark.slow) for s in styles.STYLES]
FIRST = next(iter(styles.STYLES))


@pytest.mark.parametrize("family", mini_families.COLUMNS)
@pytest.mark.parametrize("style", ROWS)
def test_cells(style: str, family: str) -> None:
    """A cell agrees with its oracle, or is refused with words; wrapping refuses in every style."""
    if "offload" in style:
        pytest.importorskip("accelerate", reason="accelerate is a dev dependency")
    if "PEFT" in style:
        pytest.importorskip("peft", reason="peft is a dev dependency")
    for method in styles.METHODS:
        if styles.outcome(FIRST, method, family) is None:
            why = styles.outcome(style, method, family)
            assert why is None or len(why) > 30
    model = mini_families.build(family)
    refused = [m for m in styles.METHODS if styles.outcome(FIRST, m, family) is not None]
    for method in refused:
        with pytest.raises(vtc.UnsupportedError):
            vtc.wrap(model, styles.METHODS[method])


@pytest.mark.slow
def test_the_table_in_the_readme_is_what_ran() -> None:
    """The cells that ran above are not run again."""
    pytest.importorskip("accelerate", reason="accelerate is a dev dependency")
    pytest.importorskip("peft", reason="peft is a dev dependency")
    assert read_block(ROOT / "README.md", "styles") == style_matrix(), (
        "run: python -m vtc.benchmarks.catalogue"
    )


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
    monkeypatch.setitem(styles.METHODS, "test", method)
    with torch.no_grad():
        styles.STYLES[style](styles.Cell(style, "test", "LLaVA, CLIP"))


NOT_HERE = ("chunked prefill", "`torch.compile(fullgraph=True)`")
ANSWERED = [s for s in styles.STYLES if s not in NOT_HERE]


@pytest.mark.parametrize("style", ANSWERED)
def test_a_method_that_does_nothing_has_no_yes(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(AssertionError, match="no teeth"):
        run(style, Nothing(), monkeypatch)


@pytest.mark.parametrize("style", [s for s in ANSWERED if "static" not in s and "CPU" not in s])
def test_a_wrong_column_has_no_yes(style: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine drops a token next to the one that it says: the oracle masks another."""
    from vtc.decoder import DecoderEngine

    stock = DecoderEngine._apply

    def shifted(self: Any, st: Any, hidden: Any, view: Any, reduction: Any, *more: Any) -> Any:
        return stock(self, st, hidden.roll(1, 1), view, reduction, *more)

    run(style, First(keep_ratio=0.5), monkeypatch)
    monkeypatch.setattr(DecoderEngine, "_apply", shifted)
    with pytest.raises(AssertionError, match=r"not close|not equal|do not match"):
        run(style, First(keep_ratio=0.5), monkeypatch)
