# SPDX-License-Identifier: Apache-2.0
"""Every method at every budget on the same questions, with the uncompressed model beside it.

What is measured, and how:

* Accuracy: greedy answers to padded batches. The image encoder runs once for each image, not once
  for each question. Methods that do not change it share its output; of blocks that they look into,
  the attention runs again on its remembered input.
* Time: one prompt with one image (batch 1), from pixels to the logits of the first answer token.
  The stock model, without any hook of ours, takes its turn among the methods in every round; the
  first round is a warm-up and is not counted. Medians are reported.
* KV bytes: the storage that the cache of that prompt holds.
* Nothing is estimated: what was not measured is None.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from ..errors import UnsupportedError
from ..matching import match
from ..method import Method, resolve
from ..wrapping import compressing, observe
from .budgets import SHARES, seeded, token_budgets
from .encoder import Encoder, leaves_encoder_alone
from .environment import describe_model, machine, versions
from .prompts import Batch, answer_batch, image_key, make_batches
from .timing import Progress, measure, timed_prefill


@dataclass(frozen=True)
class Settings:
    """How a benchmark runs.

    Attributes:
        methods: registered names.
        keep: budgets, shares of the visual tokens or counts; the uncompressed model always runs.
        flops: instead of budgets, the share of the LLM's FLOPs (visual tokens) that every method is
            tuned to with `vtc.match`; one that cannot reach it says so in its row.
        batch_size: questions answered together; max_new_tokens: length of an answer.
        repeats: timed forwards of each configuration after one warm-up; 0 measures no time.
        seed: of the bootstrap and of methods that draw at random.
    """

    methods: tuple[str, ...]
    keep: tuple[Fraction | int, ...] = SHARES
    flops: float | None = None
    batch_size: int = 20
    max_new_tokens: int = 6
    repeats: int = 7
    seed: int = 0


@dataclass
class Row:
    """One method at one budget. Times in milliseconds; shares and ratios are of the stock model."""

    method: str
    stages: list[str]
    asked_tokens: int | None
    parameters: str = ""
    final_tokens: float | None = None
    average_tokens: float | None = None
    flops_g: float | None = None
    flops_share: float | None = None
    flops_all_g: float | None = None
    flops_all_share: float | None = None
    prefill_ms: float | None = None
    prefill_ratio: float | None = None
    vision_ms: float | None = None
    llm_prefill_ms: float | None = None
    method_ms: float | None = None
    kv_bytes: int | None = None
    kv_share: float | None = None
    accuracy: float | None = None
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    agreement: float | None = None
    blank_accuracy: float | None = None
    accuracy_by_kind: dict[str, float] = field(default_factory=dict)
    error: str | None = None


BASELINE = "uncompressed"


def evaluate(
    model: Any,
    processor: Any,
    batches: Sequence[Batch],
    score: Callable[[str, str], float],
    max_new_tokens: int,
    tick: Callable[[], None] = lambda: None,
    encoder: Encoder | None = None,
) -> tuple[list[str], np.ndarray]:
    """Answers and their scores, in the order of the batches."""
    answers: list[str] = []
    for i, batch in enumerate(batches):
        with nullcontext() if encoder is None else encoder.remembered(i):
            answers += answer_batch(model, processor, batch, max_new_tokens)
        tick()
    items = [item for batch in batches for item in batch.items]
    scores = [float(score(a, item.answer)) for a, item in zip(answers, items)]
    return answers, np.asarray(scores)


def bootstrap(
    scores: np.ndarray, groups: Sequence[Any], seed: int, draws: int = 2000
) -> tuple[float, float]:
    """95 % interval of the mean score, drawing images rather than questions.

    Questions about one image stand and fall together, so they are drawn together.
    """
    names = {g: i for i, g in enumerate(dict.fromkeys(groups))}
    index = np.asarray([names[g] for g in groups])
    total, count = np.bincount(index, weights=scores), np.bincount(index)
    pick = np.random.default_rng(seed).integers(0, len(total), (draws, len(total)))
    means = total[pick].sum(1) / count[pick].sum(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def plan(
    model: Any, inputs: dict[str, torch.Tensor], total: int, settings: Settings
) -> list[tuple[Row, Method | None]]:
    """A row for each configuration to run, and its method; None where it cannot be made.

    Methods that take no budget run once, as they come.
    """
    plans: list[tuple[Row, Method | None]] = []
    for name in settings.methods:
        plain = seeded(name, None, settings.seed)
        stages: list[str] = sorted(plain.stages)
        budgets = token_budgets(settings.keep, total) if settings.flops is None else {None: None}
        for tokens, keep in budgets.items():
            row, method = Row(name, stages, tokens), None
            try:
                if settings.flops is None:
                    method = seeded(name, keep, settings.seed)
                else:
                    how: dict[str, Any] = {"model": model, "inputs": inputs, "which": "llm"}
                    how["tolerance"] = max(0.01, 1 / total)  # no finer than a token
                    (method,) = resolve(match([plain], flops=settings.flops, **how)[name])
            except ValueError as error:  # out of reach, or it takes no budget
                row.error = str(error)
            plans.append((row, method))
        if settings.flops is None and plans[-1][1] is None:
            del plans[-len(budgets) :]
            plans.append((Row(name, stages, None), plain))
    for row, method in plans:
        row.parameters = "" if method is None else str(method)
    return plans


def run(
    model: Any,
    processor: Any,
    task: str,
    items: Sequence[Any],
    score: Callable[[str, str], float],
    settings: Settings,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Benchmark all methods and budgets on one task.

    Args:
        model: a LLaVA-type model, not wrapped; processor: its processor.
        items: with image, question, answer and kind; score: (prediction, answer) -> 0..1.

    Returns:
        The result, ready for JSON: task, settings, versions, machine and one row for each
        configuration, the uncompressed model first.

    Raises:
        ValueError: no items, or an unknown method.
    """
    if not items:
        raise ValueError(f'task "{task}" gave no questions')
    began = time.perf_counter()
    batches = make_batches(processor, items, settings.batch_size)
    ordered = [item for batch in batches for item in batch.items]
    groups = [image_key(item.image) for item in ordered]
    report_progress = progress or (lambda text, done, total: None)

    inputs = make_batches(processor, [ordered[0]], 1)[0].inputs(model)
    with observe(model) as session:
        timed_prefill(model, inputs)
        total = round(session.report().visual_tokens)

    made = plan(model, inputs, total, settings)
    rows = [Row(BASELINE, [], total), *(row for row, _ in made)]
    plans: list[Method | None] = [None, *(method for _, method in made)]
    encoder = Encoder.of(model, [m for m in plans if m is not None])

    steps = len(batches) * (len(plans) + 1) + settings.repeats + 1
    done = 0

    def ticker(text: str) -> Callable[[], None]:
        def tick() -> None:
            nonlocal done
            done += 1
            report_progress(text, min(done, steps), steps)

        report_progress(text, min(done, steps), steps)
        return tick

    def assess(row: Row, label: str, share_encoder: bool) -> list[str]:
        answers, scores = evaluate(
            model,
            processor,
            batches,
            score,
            settings.max_new_tokens,
            ticker(label),
            encoder if share_encoder else None,
        )
        row.accuracy = float(scores.mean())
        row.accuracy_low, row.accuracy_high = bootstrap(scores, groups, settings.seed)
        kinds = np.asarray([str(item.kind) for item in ordered])
        row.accuracy_by_kind = {
            kind: float(scores[kinds == kind].mean()) for kind in sorted(set(kinds.tolist()))
        }
        return answers

    reference = assess(rows[0], BASELINE, True)
    blank = [_blanked(b) for b in batches]
    tick = ticker("blank image")
    _, scores = evaluate(model, processor, blank, score, settings.max_new_tokens, tick)
    rows[0].blank_accuracy, rows[0].agreement = float(scores.mean()), 1.0

    for row, method in zip(rows[1:], plans[1:]):
        label = row.method if row.asked_tokens is None else f"{row.method}, {row.asked_tokens}"
        before = done
        if method is None:
            done += len(batches)
            continue
        try:
            with compressing(model, method):
                answers = assess(row, label, leaves_encoder_alone(method))
        except UnsupportedError as error:
            row.error = str(error)
            done = before + len(batches)
            continue
        same = [a == r for a, r in zip(answers, reference)]
        row.agreement = float(np.mean(same))

    alive = [i for i, row in enumerate(rows) if row.error is None]
    tick = ticker("timing")
    measured = measure(model, inputs, [plans[i] for i in alive], settings.repeats, tick)
    for i, facts in zip(alive, measured):
        _fill(rows[i], facts, measured[0])

    return {
        "task": task,
        "questions": len(items),
        "images": len(set(groups)),
        "visual_tokens": total,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - began, 1),
        "settings": {**asdict(settings), "keep": [str(k) for k in settings.keep]},
        "timing": {
            "prompts": 1,
            "batch": 1,
            "warmup_rounds": 1,
            "rounds": settings.repeats,
            "attention": getattr(model.config, "_attn_implementation", None),
            "prompt_tokens": int(inputs["input_ids"].shape[1]),
        },
        "model": describe_model(model),
        "versions": versions(),
        "machine": machine(model.device),
        "rows": [asdict(row) for row in rows],
    }


def _blanked(batch: Batch) -> Batch:
    """The same questions about images of the processor's mean colour, of the same sizes."""
    pixels = torch.zeros_like(batch.vision["pixel_values"])
    return replace(batch, vision={**batch.vision, "pixel_values": pixels})


def _fill(row: Row, facts: dict[str, Any], baseline: dict[str, Any]) -> None:
    """Copy what was measured into a row."""
    report = facts["report"]
    row.final_tokens, row.average_tokens = report.final_tokens, report.average_tokens
    row.flops_g, row.flops_all_g = _giga(report.flops), _giga(report.flops_all)
    row.flops_share = _over(report.flops, report.flops_full)
    row.flops_all_share = _over(report.flops_all, report.flops_all_full)
    for name in ("prefill_ms", "vision_ms", "llm_prefill_ms", "method_ms"):
        setattr(row, name, facts[name])
    row.prefill_ratio = _over(facts["prefill_ms"], baseline["prefill_ms"])
    row.kv_bytes = facts["kv_bytes"]
    row.kv_share = _over(facts["kv_bytes"], baseline["kv_bytes"])


def _giga(x: float | None) -> float | None:
    return None if x is None else x / 1e9


def _over(a: float | None, b: float | None) -> float | None:
    return None if a is None or not b else a / b


def rows_of(result: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The rows of one method, largest budget first."""
    rows = [r for r in result["rows"] if r["method"] == method and r["error"] is None]
    return sorted(rows, key=lambda r: -(r["asked_tokens"] or 0))
