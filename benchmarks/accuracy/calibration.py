# SPDX-License-Identifier: Apache-2.0
"""`vtc.calibrate` put to the test: what it promised, and what held-out questions lost.

One question about each of some images calibrates, without its answer. Then the accuracy on
questions about other images is measured at every budget of the curve. The loss of a budget is the
accuracy of the stock model less that of the compressed one, on the same questions.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from ...errors import UnsupportedError
from ...method import Method
from ...session import compressing
from ...tuning.calibrate import GRID, Point, calibrate
from ..measure.timing import Progress
from ..metrics.scores import metric
from ..metrics.statistics import bootstrap
from ..shared.budgets import seeded
from ..shared.prompts import Batch, make_batches
from ..shared.provenance import describe_model, header
from ..tasks.items import BadItem, Questions
from .answering import answer_batch
from .encoder_cache import EncoderCache, leaves_encoder_alone


@dataclass(frozen=True)
class CalibrationSettings:
    """How calibration is tried.

    Attributes:
        methods: registered names.
        samples: images that calibrate; held_out: questions about others, 0 for none.
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
    """Some questions of a task as batches, read when their turn comes.

    As `vtc.calibrate` reads it, it gives the inputs of the model. With an encoder, what is done
    with a batch while it is the current one encodes its images once.
    """

    def __init__(
        self, model: Any, processor: Any, task: Questions, chosen: Sequence[int], size: int
    ) -> None:
        self.model, self.processor, self.task = model, processor, task
        self.chosen = [list(chosen[i : i + size]) for i in range(0, len(chosen), size)]
        self.encoder: EncoderCache | None = None

    def batches(self) -> Iterator[Batch]:
        """The batches; the questions of one image lie together."""
        for i, chosen in enumerate(self.chosen):
            items = [self.task[j] for j in chosen]
            (batch,) = make_batches(self.processor, items, len(items))
            with nullcontext() if self.encoder is None else self.encoder.remembered(i):
                yield batch

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (batch.inputs(self.model) for batch in self.batches())

    def __len__(self) -> int:
        return len(self.chosen)


def split(
    task: Questions, samples: int, held_out: int, seed: int
) -> tuple[list[int], list[int], list[dict[str, str]]]:
    """One question about each of the first images, and questions about the images behind them.

    Returns:
        Positions of both in the task, and what could not be read ("where" and "why").

    Raises:
        ValueError: too few images or questions.
    """
    groups: dict[Hashable, list[int]] = {}
    for i, key in enumerate(task.image_keys()):
        groups.setdefault(key, []).append(i)
    rng = random.Random(f"calibration/{seed}")
    first: list[int] = []
    rest: list[int] = []
    skipped: list[dict[str, str]] = []
    for group in groups.values():
        try:
            task[group[0]]
        except BadItem as error:
            where, _, why = str(error).partition(": ")
            skipped.append({"where": where, "why": why})
            continue
        if len(first) < samples:
            first.append(rng.choice(group))
        elif len(rest) < held_out:
            rest += group[: held_out - len(rest)]
        else:
            break
    if len(first) < samples or len(rest) < held_out:
        raise ValueError(
            f"{task.name} has {len(groups)} images, {len(skipped)} of them unreadable, which "
            f"leaves {len(rest)} questions about others than the first {samples}; ask for fewer "
            f"samples than {samples} or fewer held-out questions than {held_out}"
        )
    return first, rest, skipped


def run(
    model: Any,
    processor: Any,
    task: Questions,
    settings: CalibrationSettings,
    command: str = "",
    progress: Progress = lambda text, done, total: None,
    save: Callable[[dict[str, Any]], Any] = lambda result: None,
) -> dict[str, Any]:
    """Calibrate each method and measure what its curve loses.

    Args:
        model: a LLaVA-type model, not wrapped; processor: its processor.
        save: called with the result whenever a method is done, for what is left after Ctrl-C.

    Returns:
        The result, ready for JSON; one row for each method, with its curve and held-out points.

    Raises:
        ValueError: too few images or questions.
    """
    began = time.perf_counter()
    first, rest, skipped = split(task, settings.samples, settings.held_out, settings.seed)
    samples = Prompts(model, processor, task, first, settings.batch_size)
    held = _HeldOut(Prompts(model, processor, task, rest, settings.batch_size), settings)
    methods = [seeded(name, None, settings.seed) for name in settings.methods]
    result: dict[str, Any] = {
        **header("calibration", model.device, command),
        "task": task.name,
        "metric": task.metric,
        "images": len(set(held.images)),
        "settings": asdict(settings),
        "model": describe_model(model),
        "skipped": skipped,
        "problems": [{"where": where, "why": why} for where, why in task.problems],
        "finished": False,
        "rows": [],
    }
    for name, method in zip(settings.methods, methods):
        row: dict[str, Any] = {"method": name, "error": None}
        for prompts in (samples, held.prompts):  # each with a memory of its own
            alone = leaves_encoder_alone(method)
            prompts.encoder = EncoderCache.of(model, [method]) if alone else None
        try:
            found = calibrate(
                model,
                samples,
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
            row["held_out"] = held.measure(method, found.curve, progress) if rest else []
        result["rows"].append(row)
        result["seconds"] = round(time.perf_counter() - began, 1)
        save(result)
    result["finished"] = True
    save(result)
    return result


class _HeldOut:
    """The held-out questions, and what budgets lose on them."""

    def __init__(self, prompts: Prompts, settings: CalibrationSettings) -> None:
        self.prompts, self.settings = prompts, settings
        keys = prompts.task.image_keys()
        self.images = [keys[i] for chosen in prompts.chosen for i in chosen]

    def measure(
        self, method: Method, curve: Sequence[Point], progress: Progress
    ) -> list[dict[str, Any]]:
        """A row for each point of the curve, in its order."""
        score = metric(self.prompts.task.metric).score
        plans = [None, *(replace(method, keep_ratio=point.keep_ratio) for point in curve)]
        answers: list[list[str]] = [[] for _ in plans]
        scores: list[list[float]] = [[] for _ in plans]
        steps = len(self.prompts) * len(plans)
        for i, batch in enumerate(self.prompts.batches()):
            for j, plan in enumerate(plans):
                progress(f"{method.name}, held-out questions", i * len(plans) + j, steps)
                got = self._answers(batch, plan)
                answers[j] += got
                scores[j] += [score(a, item.answers) for a, item in zip(got, batch.items)]
        stock = np.array(scores[0])
        rows = []
        for point, got, taken in zip(curve, answers[1:], map(np.array, scores[1:])):
            low, high = bootstrap(taken, self.images, self.settings.seed)
            loss_low, loss_high = bootstrap(stock - taken, self.images, self.settings.seed)
            rows.append(
                {
                    "keep_ratio": point.keep_ratio,
                    "accuracy": float(taken.mean()),
                    "accuracy_low": low,
                    "accuracy_high": high,
                    "stock_accuracy": float(stock.mean()),
                    "loss": float((stock - taken).mean()),
                    "loss_low": loss_low,
                    "loss_high": loss_high,
                    "agreement": float(np.mean([a == b for a, b in zip(got, answers[0])])),
                }
            )
        return rows

    def _answers(self, batch: Batch, method: Method | None) -> list[str]:
        model, length = self.prompts.model, self.settings.max_new_tokens
        with nullcontext() if method is None else compressing(model, method):
            return answer_batch(model, self.prompts.processor, batch, length)
