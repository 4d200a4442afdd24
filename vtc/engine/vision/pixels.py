# SPDX-License-Identifier: Apache-2.0
"""The pixels stage: images that are resized in front of the encoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ...adapters.base import Call
from ...method import Method


def image_of(call: Call) -> tuple[int | str, Tensor] | None:
    """Where in a call the images (B, channels, H, W) stand, and the images; None without."""
    args, kwargs = call
    arguments: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
    for place, x in arguments:
        if isinstance(x, Tensor) and x.dim() == 4:
            return place, x
    return None


def with_image(call: Call, place: int | str, pixels: Tensor) -> Call:
    """The same call with other images in this place."""
    args, kwargs = call
    if isinstance(place, str):
        return args, {**kwargs, place: pixels}
    return (*args[:place], pixels, *args[place + 1 :]), kwargs


def wanted_grid(methods: Iterable[Method], grid: tuple[int, int]) -> tuple[int, int]:
    """The patch grid (rows, columns) that methods ask for one after another, where it is ``grid``.

    Raises:
        ValueError: one of them asks for a larger one.
    """
    for m in methods:
        wanted = m.on_pixels(grid)
        if wanted is not None and (wanted[0] > grid[0] or wanted[1] > grid[1]):
            raise ValueError(f"{m.name} asks for a grid of {wanted}, larger than {grid}")
        grid = grid if wanted is None else wanted
    return grid


def resized(pixels: Tensor, edges: tuple[int, int]) -> Tensor:
    """Images (B, channels, H, W) with other edges (height, width)."""
    small = F.interpolate(pixels.float(), edges, mode="bicubic", antialias=True)
    return small.to(pixels.dtype)
