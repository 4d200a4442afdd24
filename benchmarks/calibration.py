# SPDX-License-Identifier: Apache-2.0
"""`vtc.calibrate` put to the test: what it promised, and what held-out questions lost.

One question about each of some images calibrates, without its answer. Then the accuracy on
questions about other images is measured at every budget of the curve. The loss of a budget is the
accuracy of the stock model less that of the compressed one, on the same questions.
"""

from __future__ import annotations

import datetime
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ..calibrating import GRID, Calibration, calibrate
from ..errors import UnsupportedError
from ..wrapping import compressing
from .budgets import seeded
from .encoder import Encoder, leaves_encoder_alone
from .environment import describe_model, machine, versions
from .prompts import Batch, answer_batch, image_key, make_batches
from .runner import bootstrap
from .timing import Progress


@dataclass(frozen=True)
class Settings:
    """How calibration is tried.

    Attributes:
        methods: registered names.
        samples: images that calibrate; held_out: questions about others.
        max_divergence, max_new_tokens, grid, steps: of `vtc.calibrate`.
        batch_size: prompts answered together.
        seed: of the choice of questions, of bounds and intervals, and of methods that draw.
    """

    methods: tuple[str, ...]
    samples: int = 64
    held_out: int = 300
    max_divergence: float = 0.2
    max_new_tokens: int = 6
    grid: tuple[float, ...] = GRID
    steps: int = 4
    batch_size: int = 16
    seed: int = 0


class Prompts:
    """Batches as `vtc.calibrate` reads them; with an encoder, each image is encoded once."""

    def __init__(self, model: Any, batches: Sequence[Batch], encoder: Encoder | None) -> None:
        self.model, self.batches, self.encoder = model, batches, encoder

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        for i, batch in enumerate(self.batches):
            with nullcontext() if self.encoder is None else self.encoder.remembered(i):
                yield batch.inputs(self.model)


def split(items: Sequence[Any], samples: int, held_out: int, seed: int) -> tuple[list, list]:
    """One question about each of the first images, and questions about the images behind them.

    Raises:
        ValueError: too few images or questions.
    """
    groups: dict[str, list[Any]] = {}
    for item in items:
        groups.setdefault(image_key(item.image), []).append(item)
    images = list(groups.values())
    rng = random.Random(f"calibration/{seed}")
    first = [rng.choice(group) for group in images[:samples]]
    rest = [item for group in images[samples:] for item in group][:held_out]
    if len(first) < samples or len(rest) < held_out:
        raise ValueError(
            f"{samples} images to calibrate on and {held_out} questions about others are asked "
            f"for; there are {len(images)} images, with {len(rest)} questions about all but the "
            f"first {samples}"
        )
    return first, rest


def run(
    model: Any,
    processor: Any,
    task: str,
    items: Sequence[Any],
    score: Callable[[Any, str], float],
    settings: Settings,
    progress: Progress = lambda text, done, total: None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
) -> dict[str, Any]:
    """Calibrate each method and measure what its curve loses.

    Args:
        model: a LLaVA-type model, not wrapped; processor: its processor.
        items: with image, question, answer; score: (item, prediction) -> 0..1.
        save: called with the result whenever a method is done, for what is left after Ctrl-C.

    Returns:
        The result, ready for JSON; one row for each method, with its curve and held-out points.
    """
    began = time.perf_counter()
    first, rest = split(items, settings.samples, settings.held_out, settings.seed)
    samples = make_batches(processor, first, settings.batch_size)
    held = make_batches(processor, rest, settings.batch_size)
    ordered = [item for batch in held for item in batch.items]
    groups = [image_key(item.image) for item in ordered]
    methods = [seeded(name, None, settings.seed) for name in settings.methods]
    seen, others = Encoder.of(model, methods), Encoder.of(model, methods)

    def answers(text: str, encoder: Encoder | None) -> tuple[list[str], np.ndarray]:
        found: list[str] = []
        for i, batch in enumerate(held):
            progress(text, i, len(held))
            with nullcontext() if encoder is None else encoder.remembered(i):
                found += answer_batch(model, processor, batch, settings.max_new_tokens)
        return found, np.array([float(score(x, a)) for x, a in zip(ordered, found)])

    def measured(name: str, found: Calibration, alone: bool) -> Iterator[dict[str, Any]]:
        for point in found.curve:
            method = replace(found.method, keep_ratio=point.keep_ratio)  # type: ignore[type-var]
            with compressing(model, method):
                text = f"{name}, {point.keep_ratio:.3f} on held-out questions"
                got, scores = answers(text, others if alone else None)
            loss = stock_scores - scores
            low, high = bootstrap(scores, groups, settings.seed)
            loss_low, loss_high = bootstrap(loss, groups, settings.seed)
            yield {
                "keep_ratio": point.keep_ratio,
                "accuracy": float(scores.mean()),
                "accuracy_low": low,
                "accuracy_high": high,
                "stock_accuracy": float(stock_scores.mean()),
                "loss": float(loss.mean()),
                "loss_low": loss_low,
                "loss_high": loss_high,
                "agreement": float(np.mean([a == b for a, b in zip(got, stock)])),
            }

    stock, stock_scores = answers("uncompressed on held-out questions", others)
    result: dict[str, Any] = {
        "benchmark": "calibration",
        "task": task,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "images": len(set(groups)),
        "settings": asdict(settings),
        "model": describe_model(model),
        "versions": versions(),
        "machine": machine(model.device),
        "finished": False,
        "rows": [],
    }
    for name, method in zip(settings.methods, methods):
        alone = leaves_encoder_alone(method)
        row: dict[str, Any] = {"method": name, "error": None}
        try:
            found = calibrate(
                model,
                Prompts(model, samples, seen if alone else None),
                method,
                settings.max_divergence,
                max_new_tokens=settings.max_new_tokens,
                grid=settings.grid,
                steps=settings.steps,
                seed=settings.seed,
                progress=progress,
            )
        except UnsupportedError as error:
            row["error"] = str(error)
        else:
            row |= {**found.to_dict(), "method": name, "parameters": str(found.method)}
            row["held_out"] = list(measured(name, found, alone))
        result["rows"].append(row)
        result["seconds"] = round(time.perf_counter() - began, 1)
        save(result)
    result["finished"] = True
    save(result)
    return result
