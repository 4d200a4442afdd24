# SPDX-License-Identifier: Apache-2.0
"""The command ``vtc``; one module for each group of commands, imported for its registration.

They are imported when the command runs, not with this package: a library that is missing or broken
then ends in a sentence (ending.py).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .ending import main

if TYPE_CHECKING:
    from . import bench, common, demo, info, overlay, report, retrieval, speed, tune
    from .common import app

__all__ = [
    "app",
    "bench",
    "common",
    "demo",
    "info",
    "main",
    "overlay",
    "report",
    "retrieval",
    "speed",
    "tune",
]

_COMMANDS = ("bench", "demo", "info", "overlay", "report", "retrieval", "speed", "tune")


def __getattr__(name: str) -> Any:
    if name == "app":  # with every command in it
        for module in _COMMANDS:
            importlib.import_module(f"{__name__}.{module}")
        return importlib.import_module(f"{__name__}.common").app
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
