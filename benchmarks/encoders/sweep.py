# SPDX-License-Identifier: Apache-2.0
"""Every method at every budget on the same images: what retrieval and classification share.

* Images are read once. Each batch goes through the stock model and through every configuration
  before the next is read, so an interrupted run has all of them on the same images.
* Time: the first batch, from preprocessed pixels to the output. Stock model, without any hook of
  ours, and configurations take turns; the first round is a warm-up and is not counted. Medians.
* A configuration that leaves the output of the first batch as it is changes nothing on this model.
  It gets the reason instead of figures.
* An image that cannot be read is left out, counted and named.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ...errors import UnsupportedError
from ...method import Method
from ...session import compressing, observe
from ..measure.timing import Progress, synchronize
from ..shared.budgets import seeded, token_budgets
from ..shared.names import BASELINE
from ..tasks.items import BadItem, Item, Questions
from .towers import READS, ImageModel

SHARES = (Fraction(1, 2), Fraction(1, 3), Fraction(2, 9))
SAME = 1e-5
"""Outputs that differ by less, relative to the largest entry, are equal but for rounding."""


@dataclass(frozen=True)
class Settings:
    """How a sweep runs.

    Attributes:
        methods: registered names; the uncompressed model always runs.
        keep: budgets, shares of the patches or counts.
        batch_size: images encoded together, also where time is measured.
        repeats: timed rounds after one warm-up; 0 measures no time.
        seed: of the bootstrap and of methods that draw at random.
    """

    methods: tuple[str, ...]
    keep: tuple[Fraction | int, ...] = SHARES
    batch_size: int = 16
    repeats: int = 5
    seed: int = 0


@dataclass
class SweepRow:
    """One method at one budget; tokens are patches, those in front of them not counted.

    Attributes:
        flops_share: FLOPs of the image encoder, as a share of the stock model's.
        encode_ms: milliseconds of one batch; encode_ratio: over the stock model's.
        error: why there are no figures.
    """

    method: str
    stages: list[str]
    asked_tokens: int | None
    parameters: str = ""
    final_tokens: float | None = None
    flops_share: float | None = None
    encode_ms: float | None = None
    encode_ratio: float | None = None
    error: str | None = None


R = TypeVar("R", bound=SweepRow)


@dataclass
class Swept(Generic[R]):
    """Findings of a sweep.

    Attributes:
        rows: the stock model first.
        outputs: for each row what was kept of its output, (N, ...) on the CPU, None where there is
            an error.
        answers: of each of the N images that were read, its captions or its class.
        beside: what the caller computed beside each batch.
        skipped: "where" and "why" of the images that could not be read.
        visual_tokens: patches of an image; timed_images: images of the timed batch.
        finished: False if it was interrupted.
    """

    rows: list[R]
    visual_tokens: int
    timed_images: int
    outputs: list[Tensor | None] = field(default_factory=list)
    answers: list[tuple[str, ...]] = field(default_factory=list)
    beside: list[Any] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    finished: bool = True


@dataclass
class _Run(Generic[R]):
    """A row and the method that fills it; None is the stock model."""

    row: R
    method: Method | None = None
    times: list[float] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)

    def encode(self, model: ImageModel, pixels: Tensor) -> tuple[Tensor, float]:
        """Output (B, D) fp32 on the CPU, and milliseconds."""
        how: Any = nullcontext() if self.method is None else compressing(model.vision, self.method)
        with how:
            synchronize(model.device)
            start = time.perf_counter()
            output = model.encode(pixels)
            synchronize(model.device)
            ms = 1e3 * (time.perf_counter() - start)
        return _finite(output), ms


def _finite(output: Tensor) -> Tensor:
    """The output in fp32 on the CPU.

    Raises:
        ValueError: it has a NaN or is infinite, as half precision may make it.
    """
    if not output.isfinite().all():
        raise ValueError(f"its output has NaN or infinity in {output.dtype}; float32 may do")
    return output.float().cpu()


def sweep(
    model: ImageModel,
    items: Questions,
    settings: Settings,
    row_type: Callable[..., R],
    progress: Progress | None = None,
    keep: Callable[[Tensor], Tensor] = lambda output: output,
    beside: Callable[[Sequence[Item]], Any] = lambda batch: None,
) -> Swept[R]:
    """Encode all images with the stock model and with each method at each budget.

    Args:
        items: ``items[i]`` raises `BadItem` for an image that cannot be read.
        row_type: `SweepRow` or a subclass, whose further fields the caller fills.
        keep: what to keep of an output (B, D), fp32.
        beside: called once with the items of each batch.

    Raises:
        ValueError: an unknown method, no image can be read, or the stock model makes NaN of them.
        KeyboardInterrupt: no batch was done yet.
    """
    tell = progress or (lambda text, done, total: None)
    skipped: list[dict[str, str]] = []
    batches = _batches(items, settings.batch_size, skipped)
    batch = next(batches, None)
    if batch is None:
        why = f"; the first is {skipped[0]['where']}: {skipped[0]['why']}" if skipped else ""
        raise ValueError(f"none of {len(items)} images can be read{why}")

    pixels = model.pixels([item.image for item in batch])
    with observe(model.vision) as session:
        stock = _finite(model.encode(pixels))
        total = round(session.report().visual_tokens)
    runs = _plan(model, settings, total, row_type)
    found = Swept([run.row for run in runs], total, len(batch), skipped=skipped)
    steps = settings.repeats + 1 + -(-len(items) // settings.batch_size)
    tell("warm-up", 0, steps)
    _warm_up(model, pixels, stock, runs)
    done = 1
    for _ in range(settings.repeats):
        tell("timing", done, steps)
        for run in _alive(runs):
            run.times.append(run.encode(model, pixels)[1])
        done += 1
    for run in _alive(runs):
        if run.times:
            run.row.encode_ms = statistics.median(run.times)
            run.row.encode_ratio = run.row.encode_ms / statistics.median(runs[0].times)

    try:
        while batch is not None:
            tell("images", done, steps)
            pixels = model.pixels([item.image for item in batch])
            for run in _alive(runs):
                try:
                    run.outputs.append(keep(run.encode(model, pixels)[0]))
                except ValueError as error:
                    run.row.error = str(error)
            found.beside.append(beside(batch))
            found.answers += [item.answers for item in batch]
            done += 1
            batch = next(batches, None)
    except KeyboardInterrupt:
        if not found.answers:
            raise
        found.finished = False
    n = len(found.answers)  # some runs may have seen a batch more
    found.outputs = [None if run.row.error else torch.cat(run.outputs)[:n] for run in runs]
    return found


def _alive(runs: Sequence[_Run[R]]) -> list[_Run[R]]:
    return [run for run in runs if run.row.error is None]


def _batches(items: Questions, size: int, skipped: list[dict[str, str]]) -> Iterator[list[Item]]:
    """The readable ones of every ``size`` items; the others are noted in ``skipped``."""
    for start in range(0, len(items), size):
        batch = []
        for i in range(start, min(start + size, len(items))):
            try:
                batch.append(items[i])
            except BadItem as error:
                where, _, why = str(error).partition(": ")
                skipped.append({"where": where, "why": why or where})
        if batch:
            yield batch


def _plan(
    model: ImageModel, settings: Settings, total: int, row_type: Callable[..., R]
) -> list[_Run[R]]:
    """Runs, the stock model first; a method that is refused has one row that says why."""
    runs = [_Run(row_type(BASELINE, [], total, final_tokens=total, flops_share=1.0))]
    for name in settings.methods:
        plain = seeded(name, None, settings.seed)
        stages: list[str] = sorted(plain.stages)
        try:
            with compressing(model.vision, plain):
                pass
        except UnsupportedError as error:
            runs.append(_Run(row_type(name, stages, None, error=str(error))))
            continue
        for tokens, keep in token_budgets(settings.keep, total).items():
            method = seeded(name, keep, settings.seed)
            runs.append(_Run(row_type(name, stages, tokens, parameters=str(method)), method))
    return runs


def _warm_up(model: ImageModel, pixels: Tensor, stock: Tensor, runs: Sequence[_Run[R]]) -> None:
    """One round: tokens and FLOPs of each configuration, and which of them do not work here.

    Args:
        stock: output of the uncompressed model.
    """
    for run in runs:
        if run.method is None:  # the stock model, or one that is refused
            continue
        try:
            with compressing(model.vision, run.method) as session:
                output = _finite(model.encode(pixels))
                report = session.report()
        except ValueError as error:  # this budget is out of the method's reach
            run.row.error = str(error)
            continue
        run.row.final_tokens = report.final_tokens
        run.row.flops_share = report.flops_all / report.flops_all_full
        if (output - stock).abs().max() < SAME * stock.abs().max():
            run.row.error = (
                f"changes nothing here: {type(model.vision).__name__} reads {READS[model.reads]}, "
                f"which {run.method.name} leaves as it is"
            )
