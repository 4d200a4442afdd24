# SPDX-License-Identifier: Apache-2.0
"""One image, one question: what methods kept of it, and what the model answered."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from ...method import Method
from ...report.overlay import Kind, contact_sheet, overlay
from ...report.report import Report
from ...session import compressing
from ..shared.budgets import seeded, token_budgets
from ..shared.names import BASELINE
from ..shared.prompts import Batch, make_batches, prompt_of
from ..tasks.items import BadItem
from .answering import answer_batch
from .batches import BAD
from .plan import BenchSettings


def example(items: Sequence[Any]) -> Any:
    """An item whose answer has to be found in the picture, if there is one; else the first.

    Raises:
        BadItem: none of the items can be read.
    """
    dull, first = ("yes", "no", "0", "none"), None
    for i in range(len(items)):
        try:
            item = items[i]
            item.image.load()
        except BAD:
            continue
        if item.answer not in dull:
            return item
        first = first or item
    if first is None:
        raise BadItem("no image can be read")
    return first


@torch.no_grad()
def answered(
    model: Any, processor: Any, image: Image.Image, question: str, method: Method, length: int
) -> tuple[str, Report]:
    """The answer of any supported model under a method, greedy, and the report of its prompt.

    Args:
        length: tokens of the longest answer.
    """
    inputs = processor(
        text=[prompt_of(processor, question)], images=[image], return_tensors="pt"
    ).to(model.device, model.dtype)
    with compressing(model, method) as session:
        ids = model.generate(**inputs, do_sample=False, max_new_tokens=length)
        report = session.report()
    new = ids[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(new, skip_special_tokens=True)[0].strip(), report


def steps_of(report: Report) -> list[tuple[str, int]]:
    """`Report.stages` of all images together: those of one may be tiles to the model."""
    every = range(len(report.kept))
    labels = dict.fromkeys(label for i in every for label, _ in report.stages(i))
    return [(k, sum(int(report.stage(i, k).kept.sum()) for i in every)) for k in labels]


def sheet_of_stages(
    report: Report, image: Image.Image, columns: int, *, size: int | None = None, **how: Any
) -> Image.Image:
    """Every step that changed the tokens of the image of a report, side by side.

    Args:
        size: longer side of each picture, 360 pixels when None; how: as for `vtc.overlay`.

    Raises:
        ValueError: no step did.
    """
    stages = steps_of(report)
    if not stages:
        raise ValueError(f"{report.method} left all tokens where they were: no steps to draw")
    size = 360 if size is None else size
    tiles = [
        (overlay(report, image, layer=label, size=size, **how), f"{label}\n{n} tokens")
        for label, n in stages
    ]
    return contact_sheet(tiles, columns=columns, width=tiles[0][0].width)


def show_kept(
    model: Any,
    processor: Any,
    item: Any,
    total: int,
    settings: BenchSettings,
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
