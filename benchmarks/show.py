# SPDX-License-Identifier: Apache-2.0
"""One example image, one question: what each method kept of it, and what it answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from ..method import Method
from ..pictures import Kind, contact_sheet, overlay
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
    tiles = [(item.image, f"{BASELINE}\n{answer}")]
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
    kind: Kind = "groups" if method.merges else "kept"
    picture = overlay(report, item.image, processor=processor, kind=kind, size=size)
    return picture, f"{method.name}, {report.final_tokens:g} tokens\n{answer}"
