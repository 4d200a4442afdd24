# SPDX-License-Identifier: Apache-2.0
"""Invariants of a wrapped model that the test files of all families check."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from vtc.benchmarks.support.masked_oracle import Alive, compare
from vtc.transformers_contract import cache_left, giving

CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def dropped_is_masked(
    model: Any,
    result: Callable[[Any, dict], tuple],
    inputs: dict,
    stock: tuple,
    drops: bool,
    name: str,
) -> Alive:
    """Invariants 3 and 4 of a wrapped model; which tokens entered each layer.

    Args:
        result: (model, inputs) -> prefill logits, those of greedy steps or None, cache lengths.
        stock: what it gave before the model was wrapped.
        drops: whether the method takes tokens from the prefill, so that its logits must change.
        name: for the messages.
    """
    (got, steps, lengths), (want, want_steps, _), alive = compare(
        model, lambda: result(model, inputs)
    )
    real = inputs["attention_mask"].bool()
    seen = real & alive[len(alive) - 1]
    torch.testing.assert_close(got[seen], want[seen], **CLOSE, msg=name)
    if drops:
        assert (got[seen] - stock[0][seen]).abs().max() > 1e-3, f"{name}: nothing changed, no teeth"
    if steps is not None:
        torch.testing.assert_close(steps, want_steps, **CLOSE, msg=name)
        assert (steps[:, 1:] - stock[1][:, 1:]).abs().max() > 1e-3, f"{name}: no teeth"
    # As long as the longest row without its padding, or as the row with padding.
    for i, length in enumerate(lengths):
        held = alive.cached[real.shape[1]][i] if alive.cached else alive[i]
        assert (held & real).sum(1).max() <= length <= held.sum(1).max()
    return alive


def greedy_loop(model: Any, inputs: dict, steps: int = 5, cache: Any = None) -> tuple:
    """A manual decoding loop without position ids, as people write it for unpadded batches."""
    out = model(**inputs, use_cache=True, **giving(model, cache))
    logits, cache = [out.logits[:, -1]], cache_left(out)
    for _ in range(steps):
        out = model(input_ids=logits[-1].argmax(-1)[:, None], **giving(model, cache))
        logits.append(out.logits[:, -1])
    return torch.stack(logits, 1), cache
