# SPDX-License-Identifier: Apache-2.0
"""Methods, mini models and counts of work for tests of limits."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from work import work

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support import mini_families as mini
from vtc.benchmarks.support.mini_models import mini_llava

METHODS = [m for m in sorted(vtc.methods()) if m not in ("mod", "evs")]  # routers; videos alone


def made(method: str, family: str, keep: int) -> vtc.Method:
    """The method with a budget if it takes one, and with its substitutes."""
    try:
        chosen = seeded(method, keep, 0)
    except ValueError:
        chosen = seeded(method, None, 0)
    known = mini.EVERY[family]
    if not known.has_cls:
        chosen = replace(chosen, **chosen.without_cls)
    return replace(chosen, **chosen.outside_encoder) if known.joins else chosen


def steps(model: Any, inputs: dict[str, Any], method: vtc.Method) -> Any:
    """Work of a prefill and of its report; None where the method is refused."""
    try:
        with torch.no_grad(), vtc.compressing(model, method) as session:
            return work(lambda: (model(**inputs, use_cache=True), session.report()))
    except vtc.UnsupportedError:
        return None


@functools.cache
def square(side: int, heads: int = 1) -> tuple[Any, dict[str, Any]]:
    """A LLaVA with an image of side x side tokens."""
    n, g = side**2, torch.Generator().manual_seed(0)
    ids = torch.tensor([[1, *[3] * n, 8, 9, 10]])
    pixels = torch.randn(1, 3, 14 * side, 14 * side, generator=g)
    model = mini_llava(image_size=14 * side, heads=heads)
    return model, {"input_ids": ids, "pixel_values": pixels}
