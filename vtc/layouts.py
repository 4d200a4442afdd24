# SPDX-License-Identifier: Apache-2.0
"""Layouts: where the tokens of one image or video lie in flat order."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Region:
    """A rectangle of patches of one image that methods see as an image of its own.

    Attributes:
        image: which image.
        grid: (rows, columns) of its patches.
        patches: (n,) which of the image's P patches, in raster order.
        blended: its patches are blends of the encoder's, from a resampled canvas.
    """

    image: int
    grid: tuple[int, int]
    patches: Tensor
    blended: bool = False


@dataclass(frozen=True)
class CropLayout:
    """The P patches of one image in flat order: thumbnail, then the canvas row by row.

    Attributes:
        size: (height, width) of the image in pixels.
        side: (rows, columns) of patches of a crop.
        crops: (rows, columns) of crops, without the thumbnail; (0, 0) where it is alone.
        canvas: (rows, columns) of patches of the canvas of all crops, without padding.
        length: flat rows, newlines included.
        rows: (P,) flat row of each patch.
        crop: (P,) crop each patch lies in, 0 for the thumbnail, then in raster order.
        place: (P,) where it lies in that crop's grid; of a resampled canvas, the nearest patch.
        source: (S,) the encoder's patches, crop * N + patch, of thumbnail and canvas; another
            number than P only where the canvas is resampled from ``full`` (rows, columns).
    """

    size: tuple[int, int]
    side: tuple[int, int]
    crops: tuple[int, int]
    canvas: tuple[int, int]
    length: int
    rows: Tensor
    crop: Tensor
    place: Tensor
    source: Tensor
    full: tuple[int, int]

    @property
    def thumbnail(self) -> int:
        """Patches of the thumbnail, which come first."""
        return prod(self.side)

    @property
    def frames(self) -> list[int] | None:
        """Tokens of each frame; None as this is no video."""
        return None

    @property
    def resampled(self) -> bool:
        """Whether the canvas was too large and shrunk bilinearly."""
        return self.full != self.canvas

    def regions(self, image: int = 0) -> list[Region]:
        """Thumbnail and crops without padding, or the whole canvas where it is resampled."""
        index = torch.arange(len(self.rows))
        out = [Region(image, self.side, index[: self.thumbnail])]
        if self.resampled:
            return [*out, Region(image, self.canvas, index[self.thumbnail :], True)]
        for crop in range(1, prod(self.crops) + 1):
            here = index[self.crop == crop]
            if len(here):  # padding alone otherwise
                y, x = self.place[here] // self.side[1], self.place[here] % self.side[1]
                grid = (int(y[-1] - y[0]) + 1, int(x[-1] - x[0]) + 1)
                out.append(Region(image, grid, here))
        return out

    def lift(self, x: Tensor) -> Tensor:
        """x (S, ...) of the encoder's patches at ``source``, on the P patches."""
        return resize(x, self.thumbnail, self.full, self.canvas) if self.resampled else x


def resize(x: Tensor, first: int, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """x (first + rows * columns, ...) with the grid behind the first rows resized bilinearly."""
    canvas = x[first:].reshape(*grid, -1).permute(2, 0, 1)[None]
    small = F.interpolate(canvas, to, mode="bilinear")[0].permute(1, 2, 0)
    return torch.cat([x[:first], small.reshape(-1, *x.shape[1:])])


@dataclass(frozen=True)
class GridLayout:
    """The tokens of one image in flat order: one grid behind the other, each in raster order.

    Attributes:
        patches: (rows, columns) of encoder patches of each grid.
        grids: (rows, columns) of LLM tokens of each grid.
        newlines: rows behind those of the tokens.
        video: whether the grids are frames of a video.
    """

    patches: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...]
    newlines: int = 0
    video: bool = False

    @property
    def tokens(self) -> int:
        """Tokens of the image."""
        return sum(map(prod, self.grids))

    @property
    def length(self) -> int:
        """Flat rows of the image, newlines included."""
        return self.tokens + self.newlines

    @property
    def frames(self) -> list[int] | None:
        """Tokens of each frame of a video; None for an image."""
        return list(map(prod, self.grids)) if self.video else None

    @property
    def encoded(self) -> int:
        """Patches of the image in the encoder."""
        return sum(map(prod, self.patches))
