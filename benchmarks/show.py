# SPDX-License-Identifier: Apache-2.0
"""One example image, one question: what each method kept of it, and what it answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ..method import Method
from ..pictures import Fit, contact_sheet, kept_overlay, merge_groups
from ..wrapping import compressing
from .budgets import seeded, token_budgets
from .prompts import Batch, answer_batch, make_batches
from .runner import BASELINE, Settings


def show_kept(
    model: Any,
    processor: Any,
    item: Any,
    total: int,
    settings: Settings,
    path: Path,
    size: int = 336,
) -> Path:
    """Write a sheet with the kept patches (or merged groups) of each method beside the image.

    Args:
        total: visual tokens of the image, uncompressed.
        size: longer side of a picture in pixels.
    """
    (batch,) = make_batches(processor, [item], 1)
    (answer,) = answer_batch(model, processor, batch, settings.max_new_tokens)
    everything = range(1)  # one patch, the whole image: nothing dimmed
    tiles = [(kept_overlay(item.image, (1, 1), everything, size=size), f"{BASELINE}\n{answer}")]
    budgets = list(token_budgets(settings.keep, total).values()) or [total]
    for name in settings.methods:
        try:
            method = seeded(name, budgets[-2:][0], settings.seed)
        except ValueError:  # takes no budget
            continue
        tile = _tile(model, processor, item, batch, method, settings.max_new_tokens, size)
        if tile is not None:
            tiles.append(tile)
    path.parent.mkdir(parents=True, exist_ok=True)
    title = f"{item.question}   ({item.answer})"
    contact_sheet(tiles, title=title, columns=4).save(path)
    return path


def _tile(
    model: Any,
    processor: Any,
    item: Any,
    batch: Batch,
    method: Method,
    length: int,
    size: int,
) -> tuple[Image.Image, str] | None:
    """The picture of one method and its answer; None if it cannot run on this model."""
    try:
        with compressing(model, method) as session:
            (answer,) = answer_batch(model, processor, batch, length)
            report = session.report()
    except ValueError:
        return None
    crops = getattr(processor.image_processor, "do_center_crop", False)
    fit: Fit = "crop" if crops else "stretch"
    if report.layouts:  # the canvas of all crops, which covers the image without padding
        layout = report.layouts[0]
        kept = [i - layout.thumbnail for i in report.kept[0].tolist() if i >= layout.thumbnail]
        picture = kept_overlay(item.image, layout.canvas, kept, fit="stretch", size=size)
    elif method.merges and report.reduction is not None:
        picture = merge_groups(
            item.image, report.grid, report.reduction, fit=fit, size=size, fill=0.85
        )
    else:
        picture = kept_overlay(item.image, report.grid, report.kept[0].tolist(), fit=fit, size=size)
    return picture, f"{method.name}, {report.final_tokens:g} tokens\n{answer}"
