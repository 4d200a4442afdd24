# SPDX-License-Identifier: Apache-2.0
"""Patches in the image: the box of each token, and a map from pixels to tokens."""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt, prod
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .tiles import Tile, grid_boxes, tiles

if TYPE_CHECKING:
    from ..layouts import CropLayout
    from .report import Report


# ---- which token lies where ----------------------------------------------------------------------


@dataclass(frozen=True)
class Patches:
    """Places of the N visual tokens of an image.

    Attributes:
        boxes: (N, 4) left, top, right, bottom in pixels of the image, in the order of the prompt;
            beyond the image where it was padded.
        thumbnail: (N,) bool, tokens of a thumbnail of an image that was also cut into crops.
        entries: how many images of the report these are: more than one where the model takes each
            tile for an image of its own.
    """

    boxes: np.ndarray
    thumbnail: np.ndarray
    entries: int


def patch_boxes(report: Report, image: Image.Image, processor: Any, index: int = 0) -> Patches:
    """Places of the visual tokens of an image in it.

    Args:
        report: of a forward on this image; image: what the processor got.
        processor: as in `tiles`.
        index: which image of the report; of an image in tiles that are images of their own
            (InternVL, Idefics3, SmolVLM, crops of Gemma 3), its first.

    Raises:
        ValueError: the image is not the one in the report, or a video; or nothing is known of how
            the model lays out its tokens.
    """
    if report.kinds[index : index + 1] == ["video"]:
        raise ValueError(f"image {index} of the report is a video; only images can be drawn")
    known, key = report.trace.tiles, (id(processor), image.size)
    if key not in known:  # once for many pictures
        known[key] = processor, tiles(processor, image.size)
    parts = known[key][1]
    if report.layouts is not None:
        layout = _layout(report, image, len(report.stage(index).owner))
        return _of_crops(layout, parts, report.patch)
    cells = [_of_tile(report, part, index + i) for i, part in enumerate(parts)]
    whole = [len(parts) > 1 and part.shows_all(image.size) for part in parts]
    thumbnail = np.repeat(whole, [len(boxes) for boxes in cells])
    return Patches(np.concatenate(cells), thumbnail, len(parts))


WRONG = "give the image, and the processor with the settings, that the report is of"


def _layout(report: Report, image: Image.Image, n: int) -> CropLayout:
    """The layout of an image in crops that has n tokens."""
    for layout in report.layouts or ():
        if layout.size == (image.height, image.width) and len(layout.rows) == n:
            return layout
    sizes = sorted({f"{lay.size[1]} x {lay.size[0]}" for lay in report.layouts or ()})
    raise ValueError(
        f"the image has {image.width} x {image.height} pixels and the report is of one with "
        f"{' or '.join(sizes)}; {WRONG}"
    )


def _of_crops(layout: CropLayout, parts: list[Tile], patch: int) -> Patches:
    """Patches of a thumbnail and a canvas of crops without its padding."""
    crops = 1 + prod(layout.crops)
    if len(parts) < crops:
        raise ValueError(
            f"the processor makes {len(parts)} tiles of the image and the report has {crops}; "
            + WRONG
        )
    cells = np.stack([part.cells(*layout.side, patch) for part in parts[:crops]])
    flat, source = cells.reshape(-1, 4), layout.source.numpy()
    boxes = flat[source]
    if layout.resampled:  # fewer, larger patches over the same canvas
        canvas = boxes[layout.thumbnail :]
        box = (*canvas[:, :2].min(0).tolist(), *canvas[:, 2:].max(0).tolist())
        boxes = np.concatenate([boxes[: layout.thumbnail], grid_boxes(box, *layout.canvas)])
    return Patches(boxes, (layout.crop == 0).numpy() & (crops > 1), 1)


def _of_tile(report: Report, part: Tile, entry: int) -> np.ndarray:
    """Boxes (n, 4) of the tokens of one tile, an image of the report."""
    n, patch = len(report.stage(entry).owner), report.patch
    rows, columns = (edge // patch if patch else 0 for edge in part.size)
    known = {report.grid: report.grid}  # by the grid of patches that of tokens
    if report.grids is not None:
        pairs = (zip(lay.patches, lay.grids, strict=True) for lay in report.grids)
        known = dict(pair for layout in pairs for pair in layout)
    elif report.grid == (0, 0):  # nothing is known but the number of tokens
        side = isqrt(n)
        if side**2 == n and part.size[0] == part.size[1]:
            return part.cells(side, side, part.size[0] / side)
        raise ValueError(f"how this model lays out the {n} tokens of an image is not known")
    grid = known.get((rows, columns))
    if grid is None or prod(grid) != n:
        raise ValueError(
            f"the processor makes a tile of {rows} x {columns} patches of the image, and image "
            f"{entry} of the report has {n} tokens in another grid; {WRONG}"
        )
    return part.cells(*grid, patch * (rows // grid[0]))


def index_map(boxes: np.ndarray, size: tuple[int, int], order: np.ndarray) -> np.ndarray:
    """Index of the box over the centre of each pixel of an image of ``size`` (width, height).

    Args:
        boxes: (N, 4) in pixels; order: (N,) in which they are painted, one over the other.

    Returns:
        (height, width) int64; -1 where there is none.
    """
    width, height = size
    edges = np.ceil(boxes - 0.5).astype(np.int64)
    edges = edges.clip(0, np.array([width, height, width, height]))
    out = np.full((height, width), -1, dtype=np.int64)
    for i in order:
        left, top, right, bottom = edges[i]
        out[top:bottom, left:right] = i
    return out
