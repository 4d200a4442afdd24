# SPDX-License-Identifier: Apache-2.0
"""The command ``vtc``; one module for each group of commands, imported for its registration."""

from . import bench, common, demo, info, overlay, report, retrieval, speed, tune
from .common import app

__all__ = [
    "app",
    "bench",
    "common",
    "demo",
    "info",
    "overlay",
    "report",
    "retrieval",
    "speed",
    "tune",
]
