# SPDX-License-Identifier: Apache-2.0
"""Readers of grid sizes from the arguments of ``get_image_features`` and its like for videos."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

Grids = Callable[[dict[str, Any]], list[list[tuple[int, int]]]]
"""Type of `GridSites.images`."""


def _tiles(name: str, patch: int, call: dict[str, Any]) -> list[list[tuple[int, int]]]:
    tiles, _, height, width = call[name].shape
    return [[(height // patch, width // patch)]] * tiles


def _sized(patch: int, call: dict[str, Any]) -> list[list[tuple[int, int]]]:
    if call.get("image_sizes") is None:
        raise ValueError("this model needs image_sizes, as its processor gives them")
    return [[(int(h) // patch, int(w) // patch)] for h, w in call["image_sizes"]]


def _frames(patch: int, call: dict[str, Any]) -> list[list[tuple[int, int]]]:
    pixels = next(x for x in call.values() if isinstance(x, Tensor) and x.dim() == 5)
    videos, frames, _, height, width = pixels.shape
    return [[(height // patch, width // patch)] * frames] * videos


def tile_grids(name: str, patch: int) -> Grids:
    """`GridSites.images` for pixel values (tiles, 3, H, W) in the argument ``name``."""
    return partial(_tiles, name, patch)


def sized_grids(patch: int) -> Grids:
    """`GridSites.images` for images whose (height, width) stand in ``image_sizes``."""
    return partial(_sized, patch)


def frame_grids(patch: int) -> Grids:
    """`GridSites.images` for videos (videos, frames, 3, H, W), whatever the argument's name."""
    return partial(_frames, patch)
