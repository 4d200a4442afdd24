# SPDX-License-Identifier: Apache-2.0
"""Places of visual tokens in an image, found by asking the processor itself.

Processors resize, crop, pad and cut tiles, each by rules of its own that change from release to
release. So none of those rules stands here: the processor is run on three images of the same size,
black, white and one whose red and green channels grow with x and y. What it makes of them tells for
every pixel of every tile whether it shows the image or padding, and which place of the image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

GOLDEN = 0.6180339887498949
"""Its multiples fill (0, 1) evenly: brightness between two levels, as an average over lines."""
FEW = 6
"""Too few pixels for a ramp. Of an edge of the image as short as that, a tile shows all."""


@dataclass(frozen=True)
class Tile:
    """One picture that the encoder gets.

    Attributes:
        size: its (height, width) in pixels.
        box: what it shows, in pixels of the image; padding reaches beyond the image, and a tile of
            padding alone shows an empty box.
    """

    size: tuple[int, int]
    box: Box

    def shows_all(self, size: tuple[int, int]) -> bool:
        """Whether it shows the whole of an image of ``size`` (width, height), to a pixel or two."""
        left, top, right, bottom = self.box
        return max(left, top) < 2 and right > size[0] - 2 and bottom > size[1] - 2

    def cells(self, rows: int, columns: int, edge: float) -> np.ndarray:
        """(rows * columns, 4) boxes in the image of a grid of squares of ``edge`` tile pixels."""
        left, top, right, bottom = self.box
        across, down = (right - left) / self.size[1], (bottom - top) / self.size[0]
        return grid_boxes(
            (left, top, left + columns * edge * across, top + rows * edge * down), rows, columns
        )


def grid_boxes(box: Box, rows: int, columns: int) -> np.ndarray:
    """(rows * columns, 4) left, top, right, bottom of the cells of an even grid over a box."""
    left, top, right, bottom = box
    x, y = np.linspace(left, right, columns + 1), np.linspace(top, bottom, rows + 1)
    cells = [
        np.broadcast_to(edge, (rows, columns))
        for edge in (x[None, :-1], y[:-1, None], x[None, 1:], y[1:, None])
    ]
    return np.stack(cells, -1).reshape(-1, 4)


# ---- what the processor makes of an image --------------------------------------------------------


def _runner(processor: Any) -> tuple[Callable[[Image.Image], Any], Any]:
    """Function from an image to pixel values as for a prompt, and the image processor or None."""
    from ..transformers_contract import required  # imports transformers

    ours = "vtc/report/tiles.py"
    ProcessorMixin = required("transformers", "ProcessorMixin", ours)
    ImageProcessingMixin = required(
        "transformers.image_processing_base", "ImageProcessingMixin", ours
    )
    inside = processor.func if isinstance(processor, functools.partial) else processor
    if isinstance(inside, ProcessorMixin):
        # The whole processor, as it has settings for its image processor.
        token = getattr(inside, "boi_token", None) or getattr(inside, "image_token", "")
        return (
            lambda image: processor(text=[token], images=[image], return_tensors="pt"),
            inside.image_processor,  # type: ignore[attr-defined]
        )
    if isinstance(inside, ImageProcessingMixin):
        return lambda image: processor(images=[image], return_tensors="pt"), inside
    if callable(inside):
        return processor, None
    raise ValueError(
        "processor must be the processor or image processor of the model, or a function from an "
        f"image to pixel values; got {type(processor).__name__}"
    )


def _pictures(output: Any, tool: Any) -> list[np.ndarray]:
    """The tiles (3, H, W) in what a processor made of one image."""
    from ..transformers_contract import PIXELS

    pixels = PIXELS.of(output) if hasattr(output, "keys") else output
    if hasattr(output, "keys") and "image_grid_thw" in output:  # Qwen: patches, group by group
        _, rows, columns = output["image_grid_thw"][0].tolist()
        fold, patch = tool.merge_size, tool.patch_size
        x = pixels.reshape(rows // fold, columns // fold, fold, fold, 3, -1, patch, patch)
        x = x[:, :, :, :, :, 0].permute(4, 0, 2, 5, 1, 3, 6)
        return [x.reshape(3, rows * patch, columns * patch).float().numpy()]
    if pixels.dim() not in (3, 4, 5):
        raise ValueError(
            f"cannot tell where patches lie: the processor gives pixels of {pixels.dim()} "
            "dimensions; pass a function from an image to pixel values (tiles, 3, height, width)"
        )
    return list(pixels.reshape(-1, *pixels.shape[-3:]).float().numpy())


def _ramp(length: int, lines: int) -> np.ndarray:
    """(lines, length) uint8 that grows from 0 to 255, exactly on average over the lines."""
    exact = ((np.arange(length) + 0.5) / length * 255 * 256).astype(np.uint16)
    dither = (np.arange(1, lines + 1) * GOLDEN % 1 * 256).astype(np.uint16)
    return ((exact[None] + dither[:, None]) >> 8).astype(np.uint8)


def _line(place: np.ndarray, seen: np.ndarray, length: int) -> tuple[float, float] | None:
    """Start and step of the line along which a tile shows an edge of the image.

    Args:
        place: (n,) pixel of the image at the centre of each pixel of the tile.
        seen: (n,) bool, False on padding; length: of the edge of the image.

    Returns:
        None where the tile shows too little to tell.

    Raises:
        ValueError: they are not on a line.
    """
    at = np.flatnonzero(seen)
    x, y = at + 0.5, place[at]
    if len(at) < FEW:
        return None
    if length < FEW:
        step = length / len(at)
        return -at[0] * step, step
    step, start = np.polyfit(x, y, 1)
    wrong = np.abs(start + step * x - y).max()
    if step <= 0 or wrong > max(2.0, 0.02 * length):
        raise ValueError(
            "cannot tell where patches lie: the processor does more to an image than to resize, "
            "crop, pad and cut it"
        )
    return start, step


def _box(ramp: np.ndarray, full: np.ndarray, size: tuple[int, int]) -> Box:
    """Box of an image of ``size`` that a tile shows.

    Args:
        ramp: (3, H, W) the tile of the third image over that of the black one; full: the same of
            the white one, next to 0 on padding.
    """
    seen = (full > 0.5 * full.max((1, 2), keepdims=True)).all(0) & (full > 1e-3).all(0)
    if not seen.any():
        return 0.0, 0.0, 0.0, 0.0
    lines, middles = [], []
    for channel, length in enumerate(size):  # along x, then along y
        count = seen.sum(channel)
        # Weighed, as padding may have been mixed in at the border of the image.
        part, whole = ((x[channel] * seen).sum(channel) for x in (ramp, full))
        place = np.divide(part, whole, out=np.zeros(len(count)), where=count > 0) * length
        lines.append(_line(place, count > 0, length))
        x = np.flatnonzero(count) + 0.5
        middles.append((x.mean(), place[count > 0].mean()))
    known = [line for line in lines if line is not None]
    if not known:
        return 0.0, 0.0, 0.0, 0.0  # next to nothing
    out = []
    for line, (x, y), n in zip(lines, middles, seen.shape[::-1], strict=True):
        # A strip beside padding: only what keeps proportions pads, so both steps are the same.
        step = known[0][1] if line is None else line[1]
        start = y - step * x if line is None else line[0]
        out.append((float(start), float(start + step * n)))
    (left, right), (top, bottom) = out
    return left, top, right, bottom


def tiles(processor: Any, size: tuple[int, int]) -> list[Tile]:
    """The tiles that a processor makes of an image of ``size`` (width, height), in its order.

    Args:
        processor: of the model (a `functools.partial` of it to add arguments of the call), its
            image processor, or a function from an image to pixel values ([tiles,] 3, H, W).

    Raises:
        ValueError: it does something else than to resize, crop, pad and cut an image.
    """
    run, tool = _runner(processor)
    width, height = size
    flat = np.zeros((height, width), np.uint8)
    growing = np.stack([_ramp(width, height), _ramp(height, width).T, flat], -1)
    probes = [Image.new("RGB", size, shade) for shade in ("black", "white")]
    probes.append(Image.fromarray(growing))
    black, white, ramps = (_pictures(run(probe), tool) for probe in probes)
    out = []
    for low, high, ramp in zip(black, white, ramps, strict=True):
        out.append(Tile(low.shape[1:], _box(ramp - low, high - low, size)))
    if not any(tile.box[2] > tile.box[0] for tile in out):
        raise ValueError("cannot tell where patches lie: the processor shows nothing of the image")
    return out
