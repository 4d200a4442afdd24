# SPDX-License-Identifier: Apache-2.0
"""Pictures of a compression: which patches were kept, which were merged into one token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from .geometry import index_map, patch_boxes
from .tiles import GOLDEN

if TYPE_CHECKING:
    from .report import Report

Kind = Literal["kept", "groups", "scores"]
View = Literal["all", "crops", "thumbnail"]

LONGER_SIDE = 480, 1600
"""At least and at most, in pixels, of a picture whose size is not asked for."""
DIMMED = (70, 76, 88)
"""Colour that dropped patches fade to: neither black nor the white of paper."""
VIRIDIS = np.array(
    [
        (68, 1, 84),
        (72, 40, 120),
        (62, 73, 137),
        (49, 104, 142),
        (38, 130, 142),
        (31, 158, 137),
        (53, 183, 121),
        (110, 206, 88),
        (181, 222, 43),
        (253, 231, 37),
    ],
    dtype=np.float32,
)
"""Ten colours of the map of that name (CC0), evenly spaced: equal steps look equal."""


def viridis(x: np.ndarray) -> np.ndarray:
    """Colours (..., 3) in 0 to 255 of numbers (...) in 0 to 1."""
    at = np.clip(x, 0, 1) * (len(VIRIDIS) - 1)
    return np.stack([np.interp(at, range(len(VIRIDIS)), VIRIDIS[:, c]) for c in range(3)], -1)


def _edges(labels: np.ndarray) -> np.ndarray:
    """Pixels (H, W) whose label differs from that of their right or lower neighbour."""
    edge = np.zeros(labels.shape, dtype=bool)
    edge[:, :-1] |= labels[:, :-1] != labels[:, 1:]
    edge[:-1, :] |= labels[:-1, :] != labels[1:, :]
    return edge


def _canvas(image: Image.Image, size: int | None) -> np.ndarray:
    """The image in RGB, its longer side scaled to ``size`` pixels: (H, W, 3) fp32."""
    image = image.convert("RGB")
    least, most = LONGER_SIDE
    wanted = min(max(*image.size, least), most) if size is None else size
    if wanted != max(image.size):
        scale = wanted / max(image.size)
        target = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        image = image.resize(target, Image.Resampling.LANCZOS)
    return np.asarray(image, dtype=np.float32).copy()


def _labels(
    pixels: np.ndarray, image: Image.Image, boxes: np.ndarray, shown: np.ndarray
) -> np.ndarray:
    """(H, W) which box of the image each pixel of a canvas shows, -1 for none.

    Where boxes overlap, those with more in ``shown`` (N,) are on top, then small ones.
    """
    height, width = pixels.shape[:2]
    boxes = boxes * np.tile([width / image.width, height / image.height], 2)
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return index_map(boxes, (width, height), np.lexsort((-area, shown)))


def _blend(pixels: np.ndarray, colour: Any, alpha: Any) -> None:
    """Mix colours (..., 3) into the pixels (H, W, 3), by alpha (H, W), in place."""
    alpha = np.asarray(alpha, dtype=np.float32)[..., None]
    pixels *= 1 - alpha
    pixels += alpha * np.asarray(colour, dtype=np.float32)


def _image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels.round().clip(0, 255).astype(np.uint8))


def kept_overlay(
    image: Image.Image,
    boxes: np.ndarray,
    kept: Any,
    *,
    size: int | None = None,
    dim: float = 0.6,
    line: float = 0.15,
) -> Image.Image:
    """The image with its kept patches clear and all else dimmed.

    Args:
        image: of any size; boxes: (N, 4) of its patches, in its pixels (`vtc.report.geometry`).
        kept: (N,) how clear each patch is, 0 (dropped) to 1, or bool.
        size: longer side of the result in pixels; None: that of the image, within 480 and 1600.
        dim: how far dropped patches fade, 0 (not at all) to 1 (gone).
        line: opacity of the lines between patches, 0 for none.
    """
    share = np.asarray(kept, dtype=np.float32)
    pixels = _canvas(image, size)
    labels = _labels(pixels, image, boxes, share)
    grey = pixels.mean(-1, keepdims=True)
    clear = np.append(share, 0.0)[labels]  # -1 reads the last entry
    pixels += (grey - pixels) * (1 - clear[..., None]) * 0.6
    _blend(pixels, DIMMED, (1 - clear) * dim)
    if line:
        _blend(pixels, (128, 128, 128), line * (_edges(labels) & (labels >= 0)))
    return _image(pixels)


def _hues(n: int) -> np.ndarray:
    """(n, 3) bright colours, neighbours far apart."""
    hues = (np.arange(n) * GOLDEN % 1)[:, None] * 6 + np.array([0, 4, 2])
    return 255 * np.clip(np.abs(hues % 6 - 3) - 1, 0, 1)


def merge_groups(
    image: Image.Image,
    boxes: np.ndarray,
    group: Any,
    *,
    size: int | None = None,
    fill: float = 0.7,
    dim: float = 0.6,
    outline: Sequence[int] = (255, 255, 255),
) -> Image.Image:
    """The image with the patches of each token in one colour, and outlined.

    The colour is their mean with a tint, so that parts of a group that lie apart can be told from
    others. A patch that is a token by itself stays as it is.

    Args:
        image, boxes, size, dim: as in `kept_overlay`; dropped patches are dimmed.
        group: (N,) number of the token that each patch is part of, -1 where it was dropped.
        fill: opacity of the colours, 0 to see the image under the outlines.
    """
    number = np.asarray(group, dtype=np.int64)
    pixels = _canvas(image, size)
    patch = _labels(pixels, image, boxes, number >= 0)
    labels = np.append(number, -2)[patch]  # outside the patches -2, so that they have a border
    inside = labels >= 0
    several = np.bincount(number[number >= 0], minlength=1) > 1
    merged = inside & several[labels.clip(0)]  # a patch by itself stays as it is
    if merged.any():
        flat = labels[merged]
        count = np.bincount(flat).clip(min=1)
        shown = pixels[merged]
        means = [np.bincount(flat, weights=shown[:, c]) / count for c in range(3)]
        colours = np.stack(means, 1).astype(np.float32)
        colours += 0.35 * (_hues(len(colours)) - colours)
        pixels[merged] = shown * (1 - fill) + colours[flat] * fill
    _blend(pixels, DIMMED, ~inside * dim)
    _blend(pixels, outline, 0.8 * _edges(labels))
    return _image(pixels)


def score_map(
    image: Image.Image,
    boxes: np.ndarray,
    scores: Any,
    *,
    size: int | None = None,
    opacity: float = 0.65,
    legend: bool = True,
) -> Image.Image:
    """The image under a heat map of its patches' scores, dark blue (low) to yellow (high).

    Colours are spread evenly over the ranks of the scores.

    Args:
        image, boxes, size: as in `kept_overlay`.
        scores: (N,), NaN where a patch has none: it stays grey.
        opacity: of the heat map.
        legend: a bar of the colours below the picture, with the lowest score, the median and the
            highest.
    """
    values = np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(values)
    pixels = _canvas(image, size)
    labels = _labels(pixels, image, boxes, known)
    colours = np.zeros((len(values) + 1, 3), dtype=np.float32)
    colours[:-1][known] = viridis(_even(values[known]))
    shown = np.append(known, False)[labels]
    pixels[:] = pixels.mean(-1, keepdims=True)
    _blend(pixels, colours[labels], shown * opacity)
    _blend(pixels, DIMMED, ~shown * 0.5)
    picture = _image(pixels)
    return _with_legend(picture, values[known]) if legend else picture


def _even(values: np.ndarray) -> np.ndarray:
    """Scores as shares of the range from the lowest to the highest."""
    if not len(values):
        return values
    order = np.searchsorted(np.sort(values), values)
    return order / max(len(values) - 1, 1)


def _with_legend(picture: Image.Image, values: np.ndarray) -> Image.Image:
    """The picture with a bar of the colours of those scores below."""
    font, gap, bar = ImageFont.load_default(13), 6, 12
    width = max(picture.width, 200)
    out = Image.new("RGB", (width, picture.height + bar + 2 * gap + 18), "white")
    out.paste(picture)
    strip = viridis(np.linspace(0, 1, max(width - 2 * gap, 1)))[None].repeat(bar, 0)
    out.paste(_image(strip), (gap, picture.height + gap))
    draw = ImageDraw.Draw(out)
    y = picture.height + gap + bar + 2
    for share, x, anchor in ((0, gap, "la"), (0.5, width // 2, "ma"), (1, width - gap, "ra")):
        text = f"{np.quantile(values, share):.2g}" if len(values) else ""
        draw.text((x, y), text, fill="black", font=font, anchor=anchor)
    return out


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
    """The image with what compression did to its visual tokens drawn on it.

    Args:
        report: of a forward on this image, ``model.vtc.report()``.
        image: what the processor got; processor: that processor, which tells where each token lies.
            One that takes further settings with the call: ``functools.partial(processor, ...)``;
            of an encoder alone, any function from an image to pixel values.
        kind: "kept", what was dropped is dimmed; "groups", the patches of one token have one colour
            and an outline; "scores", what tokens were ranked by as a heat map.
        layer: where in the model. None, at the end: a patch is as clear as the share of LLM layers
            that hold it in their KV cache. An int, what that LLM layer ran on (of an encoder alone,
            what that block left), counted from 0. Or a label of ``report.stages(index)``. Scores
            are those of the last step up to there.
        index: which image of the report, over all rows of the batch. Where the model takes tiles
            for images of their own (InternVL, Idefics3, SmolVLM, crops of Gemma 3), the first tile.
        size: longer side of the picture in pixels; None: that of the image, within 480 and 1600.
            The legend of scores comes below that.
        view: of an image in crops and a thumbnail, the tokens to draw. With "all" a pixel is clear
            if any token on it is kept; of those that are, the smallest is drawn.

    Raises:
        ValueError: no processor; a layer, an index, a kind or scores that the report does not have;
            an image that is not the one in the report.
    """
    if processor is None:
        raise ValueError(
            "vtc.overlay needs the processor that made the inputs, to know where patches lie: "
            "vtc.overlay(report, image, processor=processor)"
        )
    check_choice(kind, view)
    patches = patch_boxes(report, image, processor, index)
    stages = [report.stage(index + i, layer) for i in range(patches.entries)]
    drawn = np.ones(len(patches.boxes), dtype=bool)
    if view != "all":
        drawn = patches.thumbnail == (view == "thumbnail")
        if not drawn.any():
            raise ValueError('the image has no thumbnail beside its crops; use view="all"')
    boxes = patches.boxes[drawn]
    if kind == "scores":
        parts = [stage.scores for stage in stages if stage.scores is not None]
        if len(parts) < len(stages):
            raise ValueError(f"{report.method}: no step up to there ranks tokens by a score")
        return score_map(image, boxes, torch.cat(parts).numpy()[drawn], size=size)
    if kind == "groups":
        start, groups = 0, []
        for stage in stages:
            groups.append((stage.owner + start).where(stage.owner >= 0, -1))
            start += len(stage.owner)
        return merge_groups(image, boxes, torch.cat(groups).numpy()[drawn], size=size)
    clear = [stage.kept.float() if stage.share is None else stage.share for stage in stages]
    return kept_overlay(image, boxes, torch.cat(clear).numpy()[drawn], size=size)


def check_choice(kind: str, view: str) -> None:
    """Refuse what `overlay` cannot draw, before anything is computed.

    Raises:
        ValueError: no such kind or view.
    """
    for name, value, known in (("kind", kind, Kind), ("view", view, View)):
        if value not in get_args(known):
            raise ValueError(f'{name} is one of {", ".join(get_args(known))}; got "{value}"')


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
