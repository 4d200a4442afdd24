# SPDX-License-Identifier: Apache-2.0
"""Pictures of a compression: which patches were kept, which were merged into one token."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .reduction import Reduction

if TYPE_CHECKING:
    from .report import Report

Kind = Literal["kept", "groups", "scores"]
View = Literal["all", "crops", "thumbnail"]
Fit = Literal["stretch", "crop"]
"""How the processor makes its square: squeezes the whole image, or crops the centre."""


def visible_box(
    size: tuple[int, int], grid: tuple[int, int], fit: Fit = "stretch"
) -> tuple[float, float, float, float]:
    """The part of an image (width, height) under the patch grid: left, top, right, bottom."""
    width, height = size
    if fit == "stretch":
        return 0.0, 0.0, float(width), float(height)
    if fit != "crop":
        raise ValueError(f'fit is "stretch" or "crop"; got {fit!r}')
    rows, cols = grid
    patch = min(width / cols, height / rows)
    left, top = (width - patch * cols) / 2, (height - patch * rows) / 2
    return left, top, left + patch * cols, top + patch * rows


def patch_map(size: tuple[int, int], grid: tuple[int, int], fit: Fit = "stretch") -> np.ndarray:
    """Patch index under each pixel of an image (width, height).

    Returns:
        (height, width) int64, in raster order of the grid (rows, columns); -1 where the model does
        not look.
    """
    width, height = size
    rows, cols = grid
    left, top, right, bottom = visible_box(size, grid, fit)
    x = np.floor((np.arange(width) + 0.5 - left) / (right - left) * cols).astype(np.int64)
    y = np.floor((np.arange(height) + 0.5 - top) / (bottom - top) * rows).astype(np.int64)
    inside = ((y >= 0) & (y < rows))[:, None] & ((x >= 0) & (x < cols))[None, :]
    return np.where(inside, y[:, None] * cols + x[None, :], -1)


def _edges(labels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose label differs from that of their right or lower neighbour."""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1, :] |= labels[:-1, :] != labels[1:, :]
    return edge


def _canvas(image: Image.Image, size: int | None) -> Image.Image:
    """The image in RGB, with its longer side scaled to ``size`` pixels."""
    image = image.convert("RGB")
    if size is None:
        return image
    scale = size / max(image.size)
    target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(target, Image.Resampling.BICUBIC)


def _blend(pixels: np.ndarray, where: np.ndarray, colour: Sequence[int], alpha: float) -> None:
    """Mix a colour into the pixels (H, W, 3) where the mask (H, W) is True, in place."""
    pixels[where] = pixels[where] * (1 - alpha) + np.asarray(colour, dtype=pixels.dtype) * alpha


def kept_overlay(
    image: Image.Image,
    grid: tuple[int, int],
    kept: Iterable[int],
    *,
    fit: Fit = "stretch",
    size: int | None = None,
    dim: float = 0.7,
    line: float = 0.25,
) -> Image.Image:
    """The image with its kept patches clear and all others dimmed.

    Args:
        image: of any size; grid: (rows, columns) of its patches.
        kept: indices of the kept patches in raster order.
        fit: how the processor fits the image to the grid. What a crop cuts off is dimmed too.
        size: longer side of the result in pixels; the size of the image when None.
        dim: how far dropped patches fade to white, 0 (not at all) to 1 (gone).
        line: opacity of the patch grid, 0 for none.

    Raises:
        ValueError: a patch index outside the grid.
    """
    index = np.asarray(list(kept), dtype=np.int64)
    total = grid[0] * grid[1]
    if index.size and (index.min() < 0 or index.max() >= total):
        raise ValueError(f"patch indices must lie in 0..{total - 1} for a grid of {grid}")
    canvas = _canvas(image, size)
    patches = patch_map(canvas.size, grid, fit)
    alive = np.zeros(total + 1, dtype=bool)  # the last entry answers for -1, outside the grid
    alive[index] = True
    pixels = np.asarray(canvas, dtype=np.float32).copy()
    _blend(pixels, ~alive[patches], (255, 255, 255), dim)
    if line:
        _blend(pixels, _edges(patches) & (patches >= 0), (128, 128, 128), line)
    return Image.fromarray(pixels.round().astype(np.uint8))


def merge_groups(
    image: Image.Image,
    grid: tuple[int, int],
    reduction: Reduction | Sequence[int],
    *,
    row: int = 0,
    fit: Fit = "stretch",
    size: int | None = None,
    fill: float = 1.0,
    dim: float = 0.7,
    outline: Sequence[int] = (255, 255, 255),
) -> Image.Image:
    """The image with each group of merged patches filled with its mean colour and outlined.

    Args:
        image: of any size; grid: (rows, columns) of its patches.
        reduction: of the patches (B, rows * columns), or the slot of each patch, -1 where dropped.
        row: which image of the reduction.
        fit, size, dim: as in `kept_overlay`; dropped patches are dimmed.
        fill: opacity of the mean colour, 0 to see the image under the outlines.

    Raises:
        ValueError: the reduction is not one of this grid.
    """
    source = reduction.group[row].tolist() if isinstance(reduction, Reduction) else reduction
    group = np.asarray(list(source), dtype=np.int64)
    if group.size != grid[0] * grid[1]:
        raise ValueError(f"{group.size} patches do not fill a grid of {grid[0]} x {grid[1]}")
    canvas = _canvas(image, size)
    # A pixel outside the grid gets -2, so that the border of the grid is outlined as well.
    labels = np.append(group, -2)[patch_map(canvas.size, grid, fit)]
    pixels = np.asarray(canvas, dtype=np.float32).copy()

    inside = labels >= 0
    if inside.any():
        flat = labels[inside]
        count = np.bincount(flat).clip(min=1)
        mean = np.stack(
            [np.bincount(flat, weights=pixels[inside][:, c]) / count for c in range(3)], axis=1
        ).astype(np.float32)
        pixels[inside] = pixels[inside] * (1 - fill) + mean[flat] * fill
    _blend(pixels, ~inside, (255, 255, 255), dim)
    _blend(pixels, _edges(labels), outline, 0.8)
    return Image.fromarray(pixels.round().astype(np.uint8))


def overlay(
    report: Report,
    image: Image.Image,
    *,
    processor: Any = None,
    kind: Kind = "kept",
    layer: int | str | None = None,
    index: int = 0,
    size: int | None = None,
    view: View = "all",
) -> Image.Image:
    """The image with what compression did to its patches drawn on it.

    Args:
        report: of a forward on this image, ``model.vtc.report()``.
        image: what the prompt showed.
        processor: the processor that made the inputs, which tells where each patch lies.
        kind: "kept", dropped patches are dimmed; "groups", patches merged into one token have one
            colour and an outline; "scores", what they were ranked by as a heat map.
        layer: when: None, at the end; an int, what that LLM layer (of an encoder alone: that block)
            ran on, from 0; or a label of ``report.stages(index)``.
        index: which image of the report, over all rows of the batch.
        size: longer side of the picture in pixels; that of the image when None.
        view: of an image in crops and a thumbnail, what is drawn.

    Raises:
        ValueError: no processor; a layer, index or kind that the report does not have; an image
            that is not the one in the report.
    """
    if processor is None:
        raise ValueError("vtc.overlay needs processor=..., which tells where each patch lies")
    if not 0 <= index < len(report.alive):
        raise ValueError(f"index {index}: the report has {len(report.alive)} images")
    stages = report.alive[index]
    kept = report.kept[index]
    if isinstance(layer, str):
        if layer not in stages:
            raise ValueError(f'no step "{layer}"; the steps are {", ".join(stages) or "none"}')
        kept = stages[layer].nonzero()[:, 0]
    elif layer is not None:
        past = [x for k, x in stages.items() if not k.startswith("LLM") or int(k[10:]) <= layer]
        kept = past[-1].nonzero()[:, 0] if past else range(report.grid[0] * report.grid[1])
    tool = getattr(processor, "image_processor", processor)
    fit: Fit = "crop" if getattr(tool, "do_center_crop", False) else "stretch"
    if kind == "scores":
        scores = report.scores(index, layer)
        if scores is None:
            raise ValueError(f"{report.method} did not rank tokens by a score")
    if kind == "groups" and report.reduction is not None:
        return merge_groups(image, report.grid, report.reduction, row=index, fit=fit, size=size)
    return kept_overlay(image, report.grid, kept, fit=fit, size=size)


def contact_sheet(
    tiles: Sequence[tuple[Image.Image, str]], *, columns: int = 4, title: str = "", width: int = 260
) -> Image.Image:
    """Captioned pictures side by side on white.

    Args:
        tiles: (picture, caption) pairs; a caption may have several lines.
        columns: pictures in a row; width: of each in pixels; title: a line above all.
    """
    font, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    gap, line = 12, 17
    columns = max(1, min(columns, len(tiles)))
    pictures = [(p.resize((width, max(1, round(p.height * width / p.width)))), c) for p, c in tiles]
    tall = max((p.height for p, _ in pictures), default=0)
    lines = max((c.count("\n") + 1 for _, c in pictures), default=0)
    cell = tall + lines * line + gap
    head = 2 * gap + line if title else gap
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (gap + columns * (width + gap), head + rows * cell + gap), "white")
    draw = ImageDraw.Draw(sheet)
    if title:
        draw.text((gap, gap), title, fill="black", font=bold)
    for i, (picture, caption) in enumerate(pictures):
        x, y = gap + (i % columns) * (width + gap), head + (i // columns) * cell
        sheet.paste(picture, (x, y))
        draw.multiline_text((x, y + tall + 4), caption, fill="black", font=font, spacing=3)
    return sheet
