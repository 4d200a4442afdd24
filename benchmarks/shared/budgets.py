# SPDX-License-Identifier: Apache-2.0
"""Budgets as text and as tokens, and methods that have one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from fractions import Fraction
from typing import Any

from ...method import Method
from ...registry import resolve

SHARES = (Fraction(1, 2), Fraction(1, 3), Fraction(2, 9), Fraction(1, 9))
"""The budgets of the literature: 288, 192, 128 and 64 of LLaVA-1.5's 576 tokens."""

VARIANTS: dict[str, dict[str, Any]] = {"cdpruner": {"relevance": "none"}}
"""How methods run that need more than a model and an image, which the embedded models lack."""


def parse_keep(text: str) -> Fraction | int:
    """A budget from "0.33" or "2/9" (a share) or from "128" (tokens).

    The roundings 0.33, 0.22 and 0.11 mean the thirds and ninths of the literature.

    Raises:
        ValueError: neither a share in (0, 1] nor a count.
    """
    try:
        if "e" in text.lower():  # an exponent: 1e999999999 would be written out
            raise ValueError
        value = Fraction(text.strip())
    except (ValueError, ZeroDivisionError):
        raise ValueError(f'"{text}" is no budget; give 0.33, 1/3 or a token count') from None
    if value > 1 and value.denominator == 1:
        return int(value)
    near = value.limit_denominator(9)
    if near and abs(near - value) < Fraction(4, 1000):
        value = near
    if not 0 < value <= 1:
        raise ValueError(f"a share of tokens lies in (0, 1]; got {text}")
    return value


def token_budgets(keep: Sequence[Fraction | int], total: int) -> dict[int, Fraction | int]:
    """Budgets by the tokens that they leave of ``total``, below it, largest first."""
    counts = {k if isinstance(k, int) else max(1, round(total * k)): k for k in keep}
    return {c: counts[c] for c in sorted(counts, reverse=True) if c < total}


def seeded(name: str, keep: Fraction | int | None, seed: int) -> Method:
    """The method with a budget (None: as it comes), and the seed if it takes one."""
    budget: dict[str, Any] = {}
    if keep is not None:
        budget = {"keep_tokens": keep} if isinstance(keep, int) else {"keep_ratio": float(keep)}
    (method,) = resolve(name, **budget, **VARIANTS.get(name, {}))
    takes_seed = any(f.name == "seed" for f in fields(method))
    return replace(method, seed=seed) if takes_seed else method  # type: ignore[call-arg]
