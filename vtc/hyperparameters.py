# SPDX-License-Identifier: Apache-2.0
"""Checks of hyper-parameters, for ``__post_init__`` of methods.

Each takes the method and the name of one of its parameters, and raises a ValueError that says what
the parameter means, what it may be and what was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from math import inf
from numbers import Real
from typing import Any, ClassVar, Protocol


class Parameters(Protocol):
    """A method as checks read it, besides the parameter itself."""

    needs: ClassVar[frozenset[str]]

    @property
    def budget_given(self) -> bool:
        """True when a number of tokens was asked for."""


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _inside(value: Any, low: float, high: float, ends: str) -> bool:
    if not isinstance(value, Real) or isinstance(value, bool):
        return False
    number: Any = value
    above = number > low if ends[0] == "(" else number >= low
    return above and (number < high if ends[1] == ")" else number <= high)


def check_choice(method: Parameters, name: str, allowed: Sequence[Any]) -> None:
    """One of a few values."""
    value = getattr(method, name)
    if value not in allowed:
        *others, last = (f'"{a}"' if isinstance(a, str) else str(a) for a in allowed)
        raise ValueError(f"{name} is {', '.join(others)} or {last}; got {value!r}")


def check_count(
    method: Parameters,
    name: str,
    what: str = "an integer",
    least: int | None = None,
    optional: bool = False,
) -> None:
    """A whole number, True and False excluded.

    Args:
        what: what the message calls it, such as "a count of tokens".
        least: the smallest one allowed.
        optional: None is allowed as well.
    """
    value = getattr(method, name)
    if optional and value is None:
        return
    if not _whole(value) or (least is not None and value < least):
        bound = "" if least is None else f", at least {least}"
        raise ValueError(f"{name} is {what}{bound}; got {value!r}")


def check_counts(method: Parameters, name: str, what: str, count: int, least: int = 1) -> None:
    """A tuple of so many whole numbers.

    Args:
        what: what the message calls them, such as "counts of votes, one for each layer".
        least: the smallest one allowed.
    """
    values = getattr(method, name)
    right = isinstance(values, Sequence) and len(values) == count
    if not right or not all(_whole(x) and x >= least for x in values):
        raise ValueError(f"{name} are {what}, at least {least}; got {values!r}")


def check_range(
    method: Parameters,
    name: str,
    what: str,
    ends: str = "[]",
    low: float = 0.0,
    high: float = 1.0,
    optional: bool = False,
) -> None:
    """A number in an interval, by default a fraction in [0, 1]; never NaN.

    Args:
        what: what the message calls it, such as "a share of the budget".
        ends: the brackets of the interval, round where the end itself is excluded.
        optional: None is allowed as well.
    """
    value = getattr(method, name)
    if (optional and value is None) or _inside(value, low, high, ends):
        return
    if high == inf:
        bound = f"above {low:g}" if ends[0] == "(" else f"at least {low:g}"
    else:
        bound = f"in {ends[0]}{low:g}, {high:g}{ends[1]}"
    raise ValueError(f"{name} is {what}, {bound}; got {value!r}")


def check_shares(
    method: Parameters,
    name: str,
    what: str,
    count: int | None = None,
    ends: str = "(]",
    falling: bool = False,
) -> None:
    """A tuple of fractions, or None.

    Args:
        what: what the message calls them, such as "shares of the tokens, one for each layer".
        count: how many there must be.
        ends: the brackets of the interval from 0 to 1.
        falling: none may be larger than the one before.
    """
    values = getattr(method, name)
    if values is None:
        return
    right = count in (None, len(values)) and all(_inside(x, 0, 1, ends) for x in values)
    if not right or (falling and any(a < b for a, b in pairwise(values))):
        raise ValueError(f"{name} are {what}, in {ends[0]}0, 1{ends[1]}; got {values}")


def check_layers(
    method: Parameters,
    name: str,
    what: str,
    first: int = 0,
    of: float = inf,
    count: int | None = None,
) -> None:
    """A tuple of ascending numbers of layers, at least one.

    Args:
        what: what the message calls them, such as "layers of 32".
        first: the lowest number there is; of: the first number that there no longer is.
        count: how many there must be.
    """
    values = getattr(method, name)
    right = len(values) > 0 and count in (None, len(values)) and all(map(_whole, values))
    rising = right and all(a < b for a, b in pairwise((first - 1, *values, of)))
    if not rising:
        number = "" if count is None else f"{count} "
        raise ValueError(
            f"{name} are {number}ascending numbers of {what}, from {first}; got {values}"
        )


def check_no_budget(method: Parameters, name: str) -> None:
    """Refuse a budget beside a parameter that decides how many tokens stay."""
    if getattr(method, name) is not None and method.budget_given:
        raise ValueError(f"give {name} or a budget (keep_ratio, keep_tokens), not both")


def require(method: Parameters, need: str) -> None:
    """The method, with its parameters, needs this as well (see `Method.needs`)."""
    object.__setattr__(method, "needs", method.needs | {need})


def waive(method: Parameters, need: str) -> None:
    """The method, with its parameters, does without this (see `Method.needs`)."""
    object.__setattr__(method, "needs", method.needs - {need})
