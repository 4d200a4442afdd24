# SPDX-License-Identifier: Apache-2.0
"""Exceptions at every line that a call of a wrapped model runs, in vtc and in the stock model.

Hooks, methods, kernels, cache layers and the attention interface are all reached so, without a list
that could forget one: a trace function counts lines, and raises in front of the chosen one.
"""

from __future__ import annotations

import functools
import linecache
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import transformers

import vtc

STOCK = Path(transformers.__file__).parent
FORWARD = (
    str(Path(vtc.__file__).parent),
    *(str(STOCK / part) for part in ("cache_utils.py", "masking_utils.py", "integrations/sdpa")),
    str(STOCK / "models"),
)
"""Folders whose lines are counted: vtc, and what transformers runs in the forward of a model."""


class Place(NamedTuple):
    """Place of a line."""

    file: str
    function: str
    line: int


class Fault(Exception):
    """Raised by no one else."""


KINDS: tuple[Callable[[], BaseException], ...] = (
    Fault,
    KeyboardInterrupt,  # no Exception: what catches those alone is passed by
    lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
)


@functools.cache
def stock_with(file: str, line: int) -> bool:
    """Whether it is a ``with`` of transformers: its line runs again in front of ``__exit__``.

    An exception there skips the exit, wrapped or not: Gemma 3's masks leave a mode of torch behind.
    """
    inside = file.startswith(str(STOCK))
    return inside and linecache.getline(file, line).lstrip().startswith("with ")


@contextmanager
def tracing(note: Callable[[Place], None]) -> Iterator[None]:
    """Call ``note`` in front of every line of `FORWARD` that runs."""

    def line(frame: Any, event: str, _: Any) -> Any:
        code = frame.f_code
        if event == "line" and not stock_with(code.co_filename, frame.f_lineno):
            note(Place(code.co_filename, code.co_name, frame.f_lineno))
        return line

    def call(frame: Any, event: str, _: Any) -> Any:
        return line if frame.f_code.co_filename.startswith(FORWARD) else None

    before = sys.gettrace()
    sys.settrace(call)
    try:
        yield
    finally:
        sys.settrace(before)


def crossings(run: Callable[[], Any]) -> list[Place]:
    """The lines that a call runs, in order."""
    seen: list[Place] = []
    with tracing(seen.append):
        run()
    return seen


def fault(run: Callable[[], Any], at: int, error: BaseException) -> BaseException | None:
    """Exception at the caller when ``error`` is raised in front of line number ``at`` that runs."""
    count = -1

    def note(place: Place) -> None:
        nonlocal count
        count += 1
        if count == at:
            raise error

    try:
        with tracing(note):
            run()
    except BaseException as caught:  # KeyboardInterrupt is one of those injected
        return caught
    return None


def entries(places: list[Place]) -> list[int]:
    """First and last entry of each function: in prefill and decoding."""
    return _ends([place[:2] for place in places])


def lines(places: list[Place]) -> list[int]:
    """First and last run of each line."""
    return _ends(places)


def _ends(keys: list[Any]) -> list[int]:
    last = {key: i for i, key in enumerate(keys)}
    first = {key: len(keys) - 1 - i for i, key in enumerate(reversed(keys))}
    return sorted({*first.values(), *last.values()})
