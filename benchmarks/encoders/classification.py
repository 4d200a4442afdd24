# SPDX-License-Identifier: Apache-2.0
"""Top-1 and top-5 accuracy of compressed image encoders, and agreement with the stock model.

A classifier answers with its own outputs, a two-tower model by the class whose texts are nearest
(zero-shot): a class is the mean of its prompts' embeddings. Intervals are 95 % by bootstrap over
the images. Agreement, the share of images that get the class that the stock model gives them,
needs no labels.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..measure.timing import Progress
from ..metrics.statistics import bootstrap
from ..shared.columns import WHOLE, between, number
from ..tasks.galleries import ClassFolder
from .sweep import Settings, SweepRow, Swept, sweep
from .tables import COLUMNS as SWEEP_COLUMNS
from .tables import result_of
from .towers import Classifier, TwoTower

TEMPLATES = ("a photo of a {}.",)


@dataclass
class ClassificationRow(SweepRow):
    """Accuracy of one method at one budget, and agreement with the stock model."""

    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    top5: float | None = None
    agreement: float | None = None


def zero_shot(
    model: TwoTower, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> Classifier:
    """A two-tower model as a classifier of ``names``.

    Args:
        templates: prompts in which ``{}`` stands for the name.

    Raises:
        ValueError: a template without ``{}``.
    """
    for template in templates:
        if template.count("{}") != 1:
            raise ValueError(f'a template has one {{}} for the class name; got "{template}"')
    prompts = [[template.replace("{}", name) for template in templates] for name in names]
    means = torch.stack([model.encode_texts(p).float().mean(0) for p in prompts])
    weights = F.normalize(means, dim=-1)
    return Classifier(
        model.name,
        model.vision,
        model.reads,
        model.transform,
        lambda pixels: model.encode(pixels).float() @ weights.T,
        len(names),
    )


def best(logits: Tensor) -> Tensor:
    """The five highest outputs (B, 5), highest first, of logits (B, classes); ties to the lower."""
    return logits.argsort(dim=1, descending=True, stable=True)[:, :5]


def score(row: ClassificationRow, said: Tensor, labels: Sequence[int], seed: int) -> None:
    """Fill in a row's accuracy from the best outputs (N, 5) and the right ones."""
    hits = said == torch.tensor(labels)[:, None]
    right = hits[:, 0].double().numpy()
    row.accuracy = float(right.mean())
    row.accuracy_low, row.accuracy_high = bootstrap(right, range(len(labels)), seed)
    row.top5 = hits.any(1).double().mean().item()


def run(
    model: Classifier,
    task: ClassFolder,
    columns: dict[str, int],
    settings: Settings,
    progress: Progress | None = None,
    command: str = "",
) -> dict[str, Any]:
    """Benchmark all methods and budgets on a folder of classes.

    Args:
        columns: the output of ``model`` for each class folder.

    Returns:
        The result, ready for JSON; the uncompressed model is the first row.

    Raises:
        ValueError: an unknown method, or no image can be read.
    """
    began = time.perf_counter()
    found: Swept[ClassificationRow] = sweep(
        model, task, settings, ClassificationRow, progress, keep=best
    )
    labels = [columns[answer[0]] for answer in found.answers]
    stock = found.outputs[0]
    for row, said in zip(found.rows, found.outputs):
        if said is not None and stock is not None:
            score(row, said, labels, settings.seed)
            row.agreement = (said[:, 0] == stock[:, 0]).double().mean().item()
    return {
        **result_of("classification", model, task, settings, found, began, command),
        "classes": len(task.classes),
        "outputs": model.classes,
    }


COLUMNS = (
    *SWEEP_COLUMNS,
    between("top-1 % [95 %]", "accuracy", ends=WHOLE),
    number("top-5 %", "top5", 1, 100),
    number("same %", "agreement", 1, 100),
)
