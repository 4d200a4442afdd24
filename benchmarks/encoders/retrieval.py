# SPDX-License-Identifier: Apache-2.0
"""Image-text retrieval with compressed image encoders: recall@1, 5 and 10, both ways.

Recall as CLIP reports it: a query counts if any of its positives is among the k most similar, so an
image with five captions has five chances. Intervals are 95 % by bootstrap over the images; the
captions of one image are drawn together, and the gallery stays whole.

Captions longer than the text tower takes are cut. Recall falls as the gallery grows: compare with
published figures at the same number of images (Karpathy's splits have 1000 of Flickr30k and 5000 of
COCO).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..measure.timing import Progress
from ..metrics.scores import hits_at_k
from ..metrics.statistics import bootstrap
from ..shared.columns import WHOLE, between, number
from ..tasks.items import Item, Questions
from .sweep import Settings, SweepRow, Swept, sweep
from .tables import COLUMNS as SWEEP_COLUMNS
from .tables import result_of
from .towers import TwoTower

KS = (1, 5, 10)
DIRECTIONS = {"image_to_text": "i->t", "text_to_image": "t->i"}
CHUNK = 256
"""Queries that are ranked at once."""

Recalls = dict[str, dict[str, float]]
"""Direction -> k, as a string -> value."""


@dataclass
class RetrievalRow(SweepRow):
    """Recall of one method at one budget, with both ends of its 95 % interval."""

    recall: Recalls = field(default_factory=dict)
    recall_low: Recalls = field(default_factory=dict)
    recall_high: Recalls = field(default_factory=dict)


def ranked_hits(queries: Tensor, gallery: Tensor, positives: Sequence[Sequence[int]]) -> Tensor:
    """Whether a positive of each query is among its k most similar, (Q, len(KS)) bool.

    Args:
        queries: (Q, D) and gallery: (G, D) of unit length.
        positives: the gallery's rows that are right, for each query.
    """
    parts = []
    for start in range(0, len(queries), CHUNK):
        end = start + CHUNK
        hits = hits_at_k(queries[start:end] @ gallery.T, positives[start:end], KS)
        parts.append(torch.stack([hits[k] for k in KS], 1))
    return torch.cat(parts)


def score(
    row: RetrievalRow, images: Tensor, texts: Tensor, owners: Sequence[int], seed: int
) -> None:
    """Fill in a row's recall.

    Args:
        images: (N, D); texts: (M, D), of unit length.
        owners: the image that each text describes; every image has one or more.
    """
    captions: list[list[int]] = [[] for _ in range(len(images))]
    for text, image in enumerate(owners):
        captions[image].append(text)
    both = {
        "image_to_text": (ranked_hits(images, texts, captions), range(len(images))),
        "text_to_image": (ranked_hits(texts, images, [(image,) for image in owners]), owners),
    }
    for direction, (hits, groups) in both.items():
        for i, k in enumerate(KS):
            right = hits[:, i].double().numpy()
            low, high = bootstrap(right, groups, seed)
            for table, value in (
                (row.recall, float(np.mean(right))),
                (row.recall_low, low),
                (row.recall_high, high),
            ):
                table.setdefault(direction, {})[str(k)] = value


def run(
    model: TwoTower,
    task: Questions,
    settings: Settings,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Benchmark all methods and budgets on pairs of images and captions.

    Args:
        task: items whose ``answers`` are captions.

    Returns:
        The result, ready for JSON; the uncompressed model is the first row.

    Raises:
        ValueError: an unknown method, or no image can be read.
    """

    began = time.perf_counter()

    def texts_of(batch: Sequence[Item]) -> Tensor:
        captions = [caption for item in batch for caption in item.answers]
        size = settings.batch_size
        parts = [captions[i : i + size] for i in range(0, len(captions), size)]
        return torch.cat([model.encode_texts(part).float().cpu() for part in parts])

    found: Swept[RetrievalRow] = sweep(
        model, task, settings, RetrievalRow, progress, beside=texts_of
    )
    owners = [i for i, captions in enumerate(found.answers) for _ in captions]
    texts = torch.cat(found.beside)[: len(owners)].to(model.device)
    for row, images in zip(found.rows, found.outputs):
        if images is not None:
            score(row, images.to(model.device), texts, owners, settings.seed)
    return {
        **result_of("retrieval", model, task, settings, found, began, command),
        "captions": len(owners),
    }


COLUMNS = SWEEP_COLUMNS + tuple(
    between(f"{short} @1 [95 %]", ("recall", direction, "1"), ends=WHOLE)
    if k == 1
    else number(f"{short} @{k}", ("recall", direction, str(k)), 1, 100)
    for direction, short in DIRECTIONS.items()
    for k in KS
)
