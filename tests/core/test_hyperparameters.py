# SPDX-License-Identifier: Apache-2.0
"""Checks of hyper-parameters: values that pass, and messages on the rest."""

from __future__ import annotations

import re
from math import inf, nan
from types import SimpleNamespace
from typing import Any

import pytest

from vtc import hyperparameters


def said(check: Any, value: Any, *args: Any, **kwargs: Any) -> str | None:
    method: Any = SimpleNamespace(x=value, budget_given=True, needs=frozenset({"cls"}))
    try:
        check(method, "x", *args, **kwargs)
    except ValueError as error:
        return str(error)
    return None


def test_choice() -> None:
    assert said(hyperparameters.check_choice, None, (None, "a", "b")) is None
    assert (
        said(hyperparameters.check_choice, "c", (None, "a", "b"))
        == 'x is None, "a" or "b"; got \'c\''
    )


@pytest.mark.parametrize("value", [True, 1.0, "2", 0, None, nan])
def test_count(value: Any) -> None:
    got = said(hyperparameters.check_count, value, "a count of tokens", least=1)
    assert got == f"x is a count of tokens, at least 1; got {value!r}"
    assert said(hyperparameters.check_count, 1, "a count of tokens", least=1) is None
    assert said(hyperparameters.check_count, -5) is None
    assert said(hyperparameters.check_count, None, optional=True) is None


@pytest.mark.parametrize(
    ("ends", "inside", "outside"),
    [
        ("[]", (0, 1, 0.5), (-0.1, 1.1, nan, True, "0.5", None)),
        ("(]", (1, 0.1), (0, 2)),
        ("[)", (0, 0.9), (1,)),
    ],
)
def test_range(ends: str, inside: tuple, outside: tuple) -> None:
    for value in inside:
        assert said(hyperparameters.check_range, value, "a share", ends) is None
    for value in outside:
        want = f"x is a share, in {ends[0]}0, 1{ends[1]}; got {value!r}"
        assert said(hyperparameters.check_range, value, "a share", ends) == want


def test_half_open_ranges() -> None:
    assert said(hyperparameters.check_range, inf, "a scale", "(]", high=inf) is None
    assert (
        said(hyperparameters.check_range, 0, "a scale", "(]", high=inf)
        == "x is a scale, above 0; got 0"
    )
    assert (
        said(hyperparameters.check_range, inf, "w", "[)", high=inf) == "x is w, at least 0; got inf"
    )
    assert said(hyperparameters.check_range, None, "w", optional=True) is None


def test_shares_and_layers() -> None:
    assert said(hyperparameters.check_shares, None, "shares") is None
    assert said(hyperparameters.check_shares, (0.5, 0.5), "shares", 2, falling=True) is None
    for wrong in ((0.5,), (0.5, 0.6), (0.5, 0), (0.5, "a")):
        got = said(hyperparameters.check_shares, wrong, "2 shares", 2, falling=True)
        assert got == f"x are 2 shares, in (0, 1]; got {wrong}"
    assert said(hyperparameters.check_layers, (0, 31), "layers", of=32) is None
    for wrong in ((), (3, 3), (-1, 2), (2, 32), (1.0, 2), (True, 2)):
        got = said(hyperparameters.check_layers, wrong, "layers", of=32)
        assert got is not None and re.match(r"x are ascending numbers of layers, from 0; got", got)
    assert said(hyperparameters.check_layers, (1, 2, 3), "layers", count=2) is not None


@pytest.mark.parametrize("value", [(1, 2, 3), (1, 0), (1, nan), (1, "2"), (1, True), 5, "12"])
def test_counts(value: Any) -> None:
    assert said(hyperparameters.check_counts, (30, 1), "votes", 2) is None
    assert (
        said(hyperparameters.check_counts, value, "votes", 2)
        == f"x are votes, at least 1; got {value!r}"
    )


def test_budgets_and_needs() -> None:
    assert said(hyperparameters.check_no_budget, None) is None
    assert "give x or a budget" in str(said(hyperparameters.check_no_budget, 3))
    method: Any = SimpleNamespace(needs=frozenset({"cls"}))
    hyperparameters.require(method, "ahead")
    hyperparameters.waive(method, "cls")
    assert method.needs == {"ahead"}
