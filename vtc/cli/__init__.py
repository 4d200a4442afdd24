# SPDX-License-Identifier: Apache-2.0
"""The command ``vtc``; one module for each group of commands, imported for its registration."""

from . import bench, common, info, overlay, speed
from .common import app

__all__ = ["app", "bench", "common", "info", "overlay", "speed"]
