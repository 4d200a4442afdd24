# SPDX-License-Identifier: Apache-2.0
"""Whole calls with an encoder, or the language model of a LLaVA, compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ...method import Method
from ...session import wrap
from ..measure.timing import forward
from .rounds import STOCK, Run, describe, facts, row_of, time_rounds
from .settings import SpeedSettings
from .shapes import Prompt, Shape

WARMUP = 3
"""Compiled, recorded as a CUDA graph, and one to be sure."""


def compare_compiled(
    part: dict[str, Any],
    shape: Shape,
    prompt: Prompt,
    methods: list[Method],
    settings: SpeedSettings,
    tick: Callable[[str], None] = lambda text: None,
) -> None:
    """Time prefills under ``torch.compile(mode="reduce-overhead")``; fills the part's rows.

    It replays a CUDA graph and spares the launches. Hooks that come after a compiled call are not
    seen, so each method has a model of its own.
    """
    stock = Run(STOCK, None, {})
    runs = [stock, *(Run(str(method), method, {}) for method in methods)]
    models: dict[str, Any] = {}

    def prepare(run: Run) -> None:
        model = models[run.name] = shape.build(settings.device, settings.weights)
        torch.manual_seed(settings.seed)
        run.inputs = shape.inputs(model, prompt)
        if run.method is None:
            describe(part, model, run.inputs)
        else:
            wrap(model, run.method)
        forward(model, run.inputs)  # transformers registers hooks of its own in the first call
        if run.method is not None:
            run.row |= facts(model.vtc.report())
        inner = model if shape.encoder else model.get_decoder()
        inner.compile(mode="reduce-overhead", fullgraph=True)

    def take(run: Run) -> dict[str, float]:
        torch.compiler.cudagraph_mark_step_begin()
        return {"ttft_ms": forward(models[run.name], run.inputs)[0]}

    try:
        for run in runs:
            run.attempt(lambda run=run: prepare(run))  # type: ignore[misc]
        time_rounds(runs, take, settings.rounds, WARMUP, settings.seed, part["order"], tick)
    finally:
        part["rows"] = [row_of(run, stock) for run in runs]
