# SPDX-License-Identifier: Apache-2.0
"""Gains of compression in time and memory, on weights that may be random: no answer is read.

One process, one attention kernel, stock model and methods in turns. Every round runs all of them in
an order shuffled anew from the seed; warm-up rounds are not counted. The stock model is timed
without any hook of ours. A result file (``"benchmark": "speed"``) holds

* ``date, command, settings, versions, machine, finished`` as all result files do;
* ``rule``: what "pays" means, in words;
* ``parts``: one for each model and size of prompt, see below;
* ``does_not_pay``: for each method and part where it does not, ``{method, title, shape, batch,
  text_tokens, image_tokens, ttft_speedup, answer_speedup, kv_share, words}``.

A part has

* ``title, shape, batch, text_tokens, images, image_tokens, decode_tokens, dtype, compiled``; tokens
  are those of one row, text_tokens all that are no image tokens; an encoder alone has no text and
  nothing to decode;
* ``attention``: implementation of each part of the model, the same with and without compression;
* ``weights_bytes``: of parameters and buffers, not part of any peak;
* ``order``: for each round, warm-up first, the configurations as they ran;
* ``error``: why there are no rows, else None;
* ``rows``: the stock model ("uncompressed"), the methods, and the stock model on text alone that is
  as long as the shortest prompt left over, which shows what can be had at all.

A row has ``method`` with its parameters, ``error`` (why it was refused or ended, else None) and the
following, which are None where they do not apply or were not measured:

* ``rounds``: counted ones; every time and speed-up is their median under its name, and their 20th
  and 80th percentile under ``name_low`` and ``name_high``;
* ``ttft_ms``: from pixels to the first logits (an encoder alone: its forward), and of that
  ``vision_ms`` (encoder and projector), ``llm_prefill_ms`` and ``method_ms`` (choosing and moving
  tokens, which is part of the other two), in a pass of their own where reading them slows the call;
* ``decode_ms``: a step, one token of every row, on the cache that the prompt left;
  ``tokens_per_second``: of all rows together; ``answer_ms``: ttft_ms and decode_tokens steps;
* ``ttft_speedup, decode_speedup, answer_speedup``: time of the stock model over this one's, taken
  within each round;
* ``pays``: whether both ttft_speedup and answer_speedup reach 1.05 (encoder alone: the first);
* ``flops_share``: FLOPs of the prefill (encoder, projector and LLM) over those of the stock model,
  ``flops_g`` of one row; ``promised``: the speed-up that this promises; ``reached``: the share of
  it that ttft_speedup is;
* ``visual_tokens, final_tokens``: in the prompt and behind the last layer, of one row;
* ``kv_bytes_held``: bytes of the cache's storages after the prompt, ``kv_bytes_reported``: what
  `vtc.Report` says; ``kv_share``: held, over that of the stock model;
* ``peak_bytes``: of tensors allocated at once beyond weights and inputs, in a prefill and two
  decoding steps (`allocations.watched` says how);
* ``kernels``: fused attention operators that ran; ``same_kernels``: those of the stock model.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from ...method import Method
from ..measure.timing import Progress
from ..shared.provenance import header
from .compiled import compare_compiled
from .rounds import (
    PAYS,
    STOCK,
    Run,
    describe,
    free_memory,
    measure_untimed,
    reason,
    row_of,
    text_only,
    time_call,
    time_rounds,
)
from .settings import SpeedSettings
from .shapes import Prompt, Shape
from .tables import losses

RULE = (
    f"a method pays: both the first token and the whole answer come at least {PAYS} times as fast "
    "as from the stock model (medians)"
)


def compare(
    part: dict[str, Any],
    model: Any,
    shape: Shape,
    prompt: Prompt,
    methods: list[Method],
    settings: SpeedSettings,
    tick: Callable[[str], None] = lambda text: None,
) -> None:
    """Time the stock model and methods on one prompt; fills the part's rows, also when stopped."""
    inputs = shape.inputs(model, prompt)
    describe(part, model, inputs)
    decode = part["decode_tokens"]
    stock = Run(STOCK, None, inputs)
    runs = [stock, *(Run(str(method), method, inputs) for method in methods)]

    try:
        tick("tokens and memory")
        for run in runs:
            run.attempt(lambda run=run: measure_untimed(model, run, decode))  # type: ignore[misc]
        text = text_only(model, runs, prompt.batch, part["text_tokens"])
        if text is not None:
            runs.append(text)
            text.attempt(lambda: measure_untimed(model, text, decode))
        time_rounds(
            runs,
            lambda run: time_call(model, run, decode),
            settings.rounds,
            settings.warmup,
            settings.seed,
            part["order"],
            tick,
        )
    finally:
        part["rows"] = [row_of(run, stock) for run in runs]


def new_part(
    shape: Shape, prompt: Prompt, settings: SpeedSettings, compiled: bool
) -> dict[str, Any]:
    """A part without rows."""
    encoder = shape.encoder
    dtype = str(settings.weights).removeprefix("torch.")
    images = "1 image" if prompt.images == 1 else f"{prompt.images} images"
    size = "" if encoder else f", {images}, {prompt.text_tokens} text tokens"
    ending = ", compiled" if compiled else ""
    return {
        "title": f"{shape.title}{size}, batch {prompt.batch}, {dtype}{ending}",
        "shape": shape.name,
        "batch": prompt.batch,
        "text_tokens": 0 if encoder else prompt.text_tokens,
        "images": prompt.images,
        "image_tokens": None,
        "decode_tokens": 0 if encoder or compiled else settings.decoded,
        "dtype": dtype,
        "compiled": compiled,
        "attention": {},
        "weights_bytes": None,
        "order": [],
        "error": None,
        "rows": [],
    }


def run(
    settings: SpeedSettings,
    own: Shape | None = None,
    progress: Progress | None = None,
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    command: str = "",
) -> dict[str, Any]:
    """The comparisons; see the module's docstring for the result.

    Args:
        own: time this loaded model instead of the shapes (`shapes.own`).
        save: called with the result so far behind every part. After Ctrl-C the result is what was
            measured until then, and not ``finished``.
        command: for the result.
    """
    plan = settings.plan(own)
    per_part = 1 + settings.warmup + settings.rounds
    steps, done = sum(len(prompts) for _, prompts, _ in plan) * per_part, 0
    parts: list[dict[str, Any]] = []
    result = {
        **header("speed", settings.device, command),
        "settings": settings.described(),
        "finished": False,
        "rule": RULE,
        "parts": parts,
        "does_not_pay": [],
    }

    def tick(text: str) -> None:
        nonlocal done
        done = min(done + 1, steps)
        if progress is not None:
            progress(f"{parts[-1]['title']}, {text}", done, steps)

    try:
        for shape, prompts, graphs in plan:
            build = functools.partial(shape.build, settings.device, settings.weights)
            built, methods = functools.cache(build), settings.chosen(shape)
            for prompt in prompts:
                parts.append(part := new_part(shape, prompt, settings, graphs))
                torch.manual_seed(settings.seed)
                try:
                    if graphs:  # pragma: no cover (planned on a GPU only)
                        compare_compiled(part, shape, prompt, methods, settings, tick)
                    else:
                        compare(part, built(), shape, prompt, methods, settings, tick)
                except Exception as error:
                    part["error"] = reason(error)
                free_memory()
                done = per_part * len(parts)
                result["does_not_pay"] = losses(parts)
                save(result)
        result["finished"] = True
    except KeyboardInterrupt:
        result["does_not_pay"] = losses(parts)
    return result
