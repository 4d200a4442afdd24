# SPDX-License-Identifier: Apache-2.0
"""Milliseconds of prompts and decoded tokens, and bytes of KV caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ...method import Chain, Method
from ...session import compressing, observe
from ...transformers_contract import cache_left, giving

Progress = Callable[[str, int, int], None]
"""Called with what is running, steps done and steps in all."""


def synchronize(device: torch.device) -> None:
    """Wait for the accelerator; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cache_bytes(cache: Any) -> int:
    """Bytes that a KV cache really holds: its storages, packed ones too, each counted once."""
    seen: dict[int, int] = {}
    for layer in cache.layers:
        stores = [store for level in getattr(layer, "levels", None) or () for store in level.stores]
        packed = [tensor for store in stores for tensor in store.data.values()]
        for tensor in (layer.keys, layer.values, getattr(layer, "important", None), *packed):
            if tensor is not None and tensor.numel():
                storage = tensor.untyped_storage()
                seen[storage.data_ptr()] = storage.nbytes()
    return sum(seen.values())


@torch.no_grad()
def forward(model: Any, inputs: dict[str, Any]) -> tuple[float, Any]:
    """Milliseconds of one call, and its output."""
    synchronize(model.device)
    start = time.perf_counter()
    out = model(**inputs)
    synchronize(model.device)
    return 1e3 * (time.perf_counter() - start), out


def timed_prefill(model: Any, inputs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """Milliseconds from pixels to the first logits, and bytes of the cache left behind."""
    ms, out = forward(model, {**inputs, "use_cache": True, "logits_to_keep": 1})
    return ms, cache_bytes(cache_left(out))


@torch.no_grad()
def timed_decode(model: Any, token: torch.Tensor, cache: Any, steps: int) -> float:
    """Milliseconds of so many decoding steps behind a prompt, on the cache that it left.

    Args:
        token: (B, 1), fed at every step: which token it is makes no difference to the time, and one
            that the model would choose may be a placeholder of images.
        cache: grows by ``steps``.
    """
    synchronize(model.device)
    start = time.perf_counter()
    for _ in range(steps):
        model(input_ids=token, **giving(model, cache), use_cache=True)
        # generate() waits for every token too, to see whether it ends the answer.
        synchronize(model.device)
    return 1e3 * (time.perf_counter() - start)


def measure(
    model: Any,
    inputs: dict[str, torch.Tensor],
    configurations: Sequence[Method | Chain | None],
    repeats: int,
    tick: Callable[[], None] = lambda: None,
) -> list[dict[str, Any]]:
    """Prefill times and reports of several configurations (None: the stock model), in turns.

    Returns:
        For each configuration its median times, KV bytes and the `vtc.Report` of one forward.
    """
    samples: list[list[dict[str, float]]] = [[] for _ in configurations]
    results: list[dict[str, Any]] = [{} for _ in configurations]
    for round_ in range(repeats + 1):
        for i, method in enumerate(configurations):
            if method is None:
                if round_ == 0:  # for the token counts; never timed with hooks
                    with observe(model) as session:
                        timed_prefill(model, inputs)
                        results[i]["report"] = session.report()
                ms, kv = timed_prefill(model, inputs)
                sample = {"prefill_ms": ms}
            else:
                with compressing(model, method) as session:
                    ms, kv = timed_prefill(model, inputs)
                    if model.device.type == "cuda":  # parts need waits, which slow the whole
                        session.synchronize()
                        timed_prefill(model, inputs)
                    report = session.report()
                results[i]["report"] = report
                parts = {"vision_ms": report.vision_ms, "llm_prefill_ms": report.prefill_ms}
                parts["method_ms"] = report.method_ms
                sample = {"prefill_ms": ms, **{k: v for k, v in parts.items() if v is not None}}
            results[i]["kv_bytes"] = kv
            if round_ > 0:
                samples[i].append(sample)
        tick()
    for result, taken in zip(results, samples):
        for name in ("prefill_ms", "vision_ms", "llm_prefill_ms", "method_ms"):
            values = [s[name] for s in taken if name in s]
            result[name] = statistics.median(values) if values else None
    return results
