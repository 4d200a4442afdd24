# SPDX-License-Identifier: Apache-2.0
"""Methods and budgets for tests of LLaVA."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import vtc
from vtc.benchmarks.shared.budgets import seeded


def takes_budget(method: str) -> bool:
    try:
        return seeded(method, 4, 0).has_budget
    except ValueError:
        return False


VIDEO = {m for m, cls in vtc.methods().items() if "frames" in cls.needs}
"""See test_video.py."""
METHODS = [m for m in sorted(vtc.methods()) if takes_budget(m) and m not in VIDEO]
"""Those without a budget (VidKV) are in test_in_cache.py."""

NO_CLS = {"siglip"}


def budget(method: str) -> int:
    return 8 if method == "tome" else 6 if method != "pitome" else 9


def made(method: str, tower: str = "clip", keep: Fraction | int | None = None) -> vtc.Method:
    """The method with a budget; with its substitute for [CLS] on a tower without."""
    chosen = seeded(method, keep or budget(method), 0)
    return replace(chosen, **chosen.without_cls) if tower in NO_CLS else chosen
