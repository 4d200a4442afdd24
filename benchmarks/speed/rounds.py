# SPDX-License-Identifier: Apache-2.0
"""Configurations of one model timed in turns: rounds in random order, their medians and spread."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from ...adapters.locate import locate
from ...method import Method
from ...report.flops import decoder_flops
from ...report.report import Report
from ...session import compressing, observe
from ...transformers_contract import cache_left
from ..measure.allocations import Allocations, attention_of, watched, weights_bytes
from ..measure.timing import cache_bytes, forward, timed_decode
from .shapes import Inputs, text_prompt, visual_tokens

STOCK = "uncompressed"
PAYS = 1.05
"""A method pays where both speed-ups, of the first token and of the whole answer, reach this."""
TIMES = (
    *("ttft_ms", "vision_ms", "method_ms", "llm_prefill_ms"),
    *("decode_ms", "answer_ms", "tokens_per_second"),
)
RATIOS = ("ttft", "decode", "answer")
FACTS = (
    *("visual_tokens", "final_tokens", "flops_g", "flops_share", "promised"),
    *("kv_bytes_held", "kv_bytes_reported", "peak_bytes", "kernels"),
)
DECODED = 2
"""Tokens decoded where memory and kernels are looked at; all others are like the second."""


@dataclass
class Run:
    """One configuration: a method, or the stock model (None), on a prompt.

    Attributes:
        samples: times of each counted round.
        row: what does not vary between rounds; error: why there is nothing, or no more of it.
    """

    name: str
    method: Method | None
    inputs: Inputs
    samples: list[dict[str, float]] = field(default_factory=list)
    row: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def attempt(self, what: Callable[[], None]) -> None:
        """Do it; what goes wrong ends this configuration and no other."""
        try:
            what()
        except Exception as error:
            self.error = reason(error)
        if self.error is not None:  # outside, where the error holds no tensors any more
            free_memory()


def reason(error: Exception) -> str:
    """One line for a table."""
    text = str(error).strip().splitlines() or [""]
    lack = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate" in text[0]
    if lack:
        return f"out of memory: {text[0]}"
    known = isinstance(error, ValueError)  # vtc's own refusals are
    return text[0] if known else f"{type(error).__name__}: {text[0]}"


def free_memory() -> None:
    """Give memory back that nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def time_rounds(
    runs: Sequence[Run],
    time_call: Callable[[Run], dict[str, float]],
    repeats: int,
    warmup: int,
    seed: int,
    orders: list[list[str]],
    tick: Callable[[str], None] = lambda text: None,
) -> None:
    """Time all configurations, in an order shuffled anew every round; warm-up is not counted.

    Args:
        orders: gets, for each round, the names in the order in which they run.
    """
    shuffle = random.Random(seed)
    for round_ in range(warmup + repeats):
        counted = round_ - warmup
        tick("warm-up" if counted < 0 else f"round {counted + 1} of {repeats}")
        order = list(runs)
        shuffle.shuffle(order)
        order = [run for run in order if run.error is None]
        orders.append([run.name for run in order])

        def keep(run: Run, counted: int = counted) -> None:
            sample = time_call(run)
            if counted >= 0:
                run.samples.append(sample)

        for run in order:
            run.attempt(lambda run=run: keep(run))  # type: ignore[misc]


# ---- one configuration, once ---------------------------------------------------------------------


def facts(report: Report) -> dict[str, Any]:
    """Tokens, FLOPs and reported KV bytes of a row."""
    return {
        "visual_tokens": report.visual_tokens,
        "final_tokens": report.final_tokens,
        "flops_g": report.flops_all / 1e9,
        "flops_share": report.flops_all / report.flops_all_full,
        "promised": report.flops_all_full / report.flops_all,
        "kv_bytes_reported": report.kv_bytes,
    }


def parts(report: Report) -> dict[str, float]:
    """Milliseconds of a prefill's parts, as far as they are known."""
    found = {
        "vision_ms": report.vision_ms,
        "method_ms": report.method_ms,
        "llm_prefill_ms": report.prefill_ms,
    }
    return {name: ms for name, ms in found.items() if ms is not None}


def time_call(model: Any, run: Run, decode: int) -> dict[str, float]:
    """Time one prefill and ``decode`` tokens; the parts of the prefill in a pass of their own.

    The stock model is timed without any hook of ours: only its parts are read with `observe`. A
    method's parts need waits on a GPU, which slow the whole; on a CPU they come from the timed
    pass.
    """
    plain = run.method is None
    apart = plain or model.device.type != "cpu"
    sample: dict[str, float] = {}
    with nullcontext() if run.method is None else compressing(model, run.method) as session:
        sample["ttft_ms"], out = forward(model, run.inputs)
        if session is not None and not apart:
            sample |= parts(session.report())
        if decode:
            token, batch = run.inputs["input_ids"][:, -1:], len(run.inputs["input_ids"])
            ms = timed_decode(model, token, cache_left(out), decode)
            sample["decode_ms"] = ms / decode
            sample["answer_ms"] = sample["ttft_ms"] + ms
            sample["tokens_per_second"] = 1e3 * batch * decode / ms
        del out
    if apart and "pixel_values" in run.inputs:
        with observe(model) if run.method is None else compressing(model, run.method) as session:
            session.synchronize()
            forward(model, run.inputs)
            sample |= parts(session.report())
    return sample


def describe(part: dict[str, Any], model: Any, inputs: Inputs) -> None:
    """Fill in what a part says of its model and prompt, measured on them."""
    part.update(attention=attention_of(model), weights_bytes=weights_bytes(model))
    if "input_ids" in inputs:
        visual = visual_tokens(model, inputs)
        text = inputs["input_ids"].shape[1] - visual
        part.update(text_tokens=text, image_tokens=visual)


def measure_untimed(model: Any, run: Run, decode: int) -> None:
    """Facts of a configuration, untimed: tokens, FLOPs, KV bytes, peak memory, kernels."""
    decode = min(decode, DECODED)
    report, kv, before = None, None, attention_of(model)
    seen = Allocations()
    plain = run.method is None
    if plain and "pixel_values" in run.inputs:  # never measured with hooks
        with observe(model) as session:
            forward(model, run.inputs)
            report = session.report()
    with nullcontext() if run.method is None else compressing(model, run.method) as session:
        with watched(model.device, seen):
            _, out = forward(model, run.inputs)
            if session is not None:
                report = session.report()
            cache = cache_left(out)
            if cache is not None:
                kv = cache_bytes(cache)
            if decode:
                timed_decode(model, run.inputs["input_ids"][:, -1:], cache, decode)
        inside = attention_of(model)
    if not before == inside == attention_of(model):
        raise RuntimeError(
            f"{run.name} changed the attention implementation from {before} to {inside}: times "
            "would not compare"
        )
    run.row |= {"peak_bytes": seen.peak, "kernels": seen.kernels, "kv_bytes_held": kv}
    run.row |= {} if report is None else facts(report)


def text_only(model: Any, runs: Sequence[Run], batch: int, text: int) -> Run | None:
    """The stock model on text alone, as long as the shortest prompt that a method leaves.

    FLOPs leave out that the weights must be read however short the prompt; this shows what can be
    had at all. None for an encoder, or where every method failed.
    """
    llm: Any = locate(model).decoder
    left = [run.row["final_tokens"] for run in runs if run.error is None and run.method is not None]
    if llm is None or not left:
        return None
    n = text + round(min(left))
    run = Run(f"({STOCK}, {n} text tokens)", None, text_prompt(model, batch, n))
    shape = (llm.hidden, llm.mlp_width, llm.heads, llm.kv_heads, llm.head_dim)
    flops = decoder_flops([n] * len(llm.decoder.layers), *shape) + llm.hidden * llm.vocab
    stock = runs[0].row.get("flops_g")
    run.row |= {"visual_tokens": 0, "final_tokens": 0, "flops_g": flops / 1e9}
    if stock is not None:
        run.row |= {"flops_share": flops / 1e9 / stock, "promised": 1e9 * stock / flops}
    return run


# ---- many rounds ---------------------------------------------------------------------------------


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median and 80th percentile."""
    low, middle, high = np.percentile(list(values), (20, 50, 80)).tolist()
    return low, middle, high


def row_of(run: Run, stock: Run) -> dict[str, Any]:
    """The row of a result file; what was not measured is None. Keys: module `speed`."""
    row: dict[str, Any] = {"method": run.name, "error": run.error, "rounds": len(run.samples)}
    row |= dict.fromkeys(FACTS) | run.row

    def put(name: str, values: list[float]) -> None:
        low, middle, high = percentiles(values) if values else (None, None, None)
        row.update({name: middle, f"{name}_low": low, f"{name}_high": high})

    for name in TIMES:
        put(name, [sample[name] for sample in run.samples if name in sample])
    for name in RATIOS:
        ms = f"{name}_ms"
        rounds = zip(stock.samples, run.samples)  # of the same round
        put(f"{name}_speedup", [b[ms] / s[ms] for b, s in rounds if ms in b and ms in s])
    gain, promised = row["ttft_speedup"], row["promised"]
    row["reached"] = gain / promised if gain and promised else None
    held, full = row["kv_bytes_held"], stock.row.get("kv_bytes_held")
    row["kv_share"] = held / full if held and full else None
    kernels, usual = row["kernels"], stock.row.get("kernels")
    row["same_kernels"] = None if None in (kernels, usual) else kernels == usual
    gains = [row[f"{name}_speedup"] for name in ("ttft", "answer")]
    known = [g for g in gains if g is not None]
    row["pays"] = None if not known or run.method is None else min(known) >= PAYS
    return row
