# SPDX-License-Identifier: Apache-2.0
"""Peak of allocated bytes, and attention kernels, of a call."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from ...hooks.attention_rows import PREFIX

ATTENTION = ("aten::_scaled_dot_product_", "flash_attn")
"""How the names of fused attention operators begin."""


@dataclass
class Allocations:
    """Findings of `watched`.

    Attributes:
        peak: bytes of tensors held at once, at most, beyond those of before (weights, inputs); None
            where that cannot be measured.
        kernels: fused attention operators that ran, sorted; empty for eager attention.
    """

    peak: int | None = None
    kernels: tuple[str, ...] = ()


@contextmanager
def watched(device: torch.device, found: Allocations) -> Iterator[None]:
    """Watch the allocations and kernels of what runs inside; not for timing.

    On a GPU the peak is that of torch's CUDA allocator (``torch.cuda.max_memory_allocated``), on a
    CPU it is summed up from every allocation and release that torch's profiler sees. Memory that
    libraries take past torch's allocators is in neither.
    """
    from torch.profiler import ProfilerActivity, profile

    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it writes of GPUs that are not there
    on_cpu, base = device.type == "cpu", 0
    if device.type == "cuda":
        gc.collect()  # else what is released inside may have been allocated before
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        base = torch.cuda.memory_allocated(device)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=on_cpu) as profiler:
        yield
    result: Any = profiler.profiler
    events = result.kineto_results.events()
    names = {event.name() for event in events}
    found.kernels = tuple(sorted(name for name in names if name.startswith(ATTENTION)))
    if device.type == "cuda":
        found.peak = torch.cuda.max_memory_allocated(device) - base
    if on_cpu:
        changes = [event for event in events if event.name() == "[memory]"]
        held = peak = 0
        for event in sorted(changes, key=lambda event: event.start_ns()):
            held += event.nbytes()
            peak = max(peak, held)
        found.peak = peak


def weights_bytes(model: Any) -> int:
    """Bytes of parameters and buffers, each storage counted once."""
    storages = [t.untyped_storage() for t in (*model.parameters(), *model.buffers())]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def attention_of(model: Any) -> dict[str, str]:
    """The attention implementation of every part of the model that has a choice, by its class.

    What `vtc.hooks.attention_rows` puts in front, to read queries and keys, calls the stock one and
    counts as it.
    """
    found = {}
    for module in model.modules():
        chosen = getattr(getattr(module, "config", None), "_attn_implementation", None)
        if chosen is not None and hasattr(module, "set_attn_implementation"):
            found[type(module).__name__] = chosen.removeprefix(PREFIX)
    return found
