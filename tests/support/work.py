# SPDX-License-Identifier: Apache-2.0
"""How much work a call is, counted rather than timed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

import vtc

PLACE = str(Path(vtc.__file__).resolve().parent.parent)


class _Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **(kwargs or {}))


def work(run: Callable[[], Any], place: str = PLACE) -> Counter[str]:
    """Calls of each torch operator, and bytecodes run in each function of files below ``place``.

    A loop of Python runs as many more bytecodes as it has rounds, whatever a round does.
    """
    steps: Counter[CodeType] = Counter()

    def inside(frame: FrameType, event: str, arg: Any) -> Any:
        if event == "opcode":
            steps[frame.f_code] += 1
        return inside

    def entered(frame: FrameType, event: str, arg: Any) -> Any:
        file = frame.f_code.co_filename
        if not file.startswith(place) or "site-packages" in file[len(place) :]:  # an environment
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return inside

    before = sys.gettrace()
    with _Operators() as operators:
        sys.settrace(entered)
        try:
            run()
        finally:
            sys.settrace(before)
    out = Counter(operators.counts)
    for code, n in steps.items():
        name = f"{Path(code.co_filename).name}:{code.co_firstlineno} {code.co_name}"
        out[name] += n
    return out


def growth(small: Counter[str], large: Counter[str], most: float) -> list[str]:
    """Counts that grew more than ``most`` times, but for a few steps."""
    return [
        f"{name}: {small[name]} -> {n}"
        for name, n in sorted(large.items())
        if n > most * small[name] + 150
    ]
