# SPDX-License-Identifier: Apache-2.0
"""The masked oracle: nothing is removed, the same tokens are hidden by the attention mask instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc.decoder import DecoderEngine


@contextmanager
def recording(engine: DecoderEngine) -> Iterator[dict[int, Tensor]]:
    """Collect the (B, L) logical tokens that are alive in each layer of the first prefill."""
    alive: dict[int, Tensor] = {}
    stock = engine._reduce

    def reduce(i: int, st: Any, hidden: Tensor, cache: Any, kwargs: dict[str, Any]) -> Tensor:
        hidden = stock(i, st, hidden, cache, kwargs)
        if i not in alive:
            mask = torch.ones(hidden.shape[0], st.length, dtype=torch.bool)
            if st.local is not None:
                there = torch.ones_like(st.local, dtype=torch.bool)
                if st.filler is not None:
                    there = ~st.filler
                # Padding that was dropped on the way is masked by Hugging Face anyway.
                mask = torch.zeros_like(mask).scatter(1, st.local, there)
            alive[i] = mask
        return hidden

    engine._reduce = reduce  # type: ignore[method-assign]
    try:
        yield alive
    finally:
        del engine._reduce


@contextmanager
def masked(layers: nn.ModuleList, alive: dict[int, Tensor], start: int = 0) -> Iterator[None]:
    """Run a stock decoder with the dead tokens masked from the layer on where they were dropped.

    Args:
        alive: by layer, (B, L) bool for the L columns from ``start`` on.
    """

    def hook(i: int) -> Callable[..., Any]:
        def mask_dead(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            hidden, kwargs = args[0], dict(kwargs)
            if i == 0:
                hidden = hidden.nan_to_num(0.0)
            batch, q_len = hidden.shape[:2]
            cache = kwargs.get("past_key_values")
            past = cache.layers[i].get_seq_length() if cache and i < len(cache.layers) else 0
            dead = torch.zeros(batch, past + q_len, dtype=torch.bool)
            there = alive[i].repeat_interleave(batch // alive[i].shape[0], 0)
            if past + q_len < start + there.shape[1]:
                return (hidden, *args[1:]), kwargs
            dead[:, start : start + there.shape[1]] = ~there
            dead = dead[:, None, None, :]
            mask = kwargs.get("attention_mask")
            if mask is None:
                mask = torch.ones(q_len, past + q_len, dtype=torch.bool).tril(past)
                mask = mask.expand(batch, 1, -1, -1)
            if mask.dtype == torch.bool:
                mask = mask & ~dead
            else:
                mask = mask.masked_fill(dead, torch.finfo(mask.dtype).min)
            kwargs["attention_mask"] = mask
            return (hidden, *args[1:]), kwargs

        return mask_dead

    handles = [
        layer.register_forward_pre_hook(hook(i), with_kwargs=True) for i, layer in enumerate(layers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def compare(model: nn.Module, run: Callable[[], Any]) -> tuple[Any, Any, dict[int, Tensor]]:
    """Results of ``run`` on a wrapped model, and of the same with its drops turned into masks.

    The encoder side stays installed in both, so merged features are the same; only the LLM differs.

    Returns:
        (dropped, masked, alive tokens of each layer).
    """
    engine = model.vtc.decoder
    with recording(engine) as alive:
        dropped = run()
    engine.remove()
    try:
        with masked(engine.sites.decoder.layers, alive):
            hidden = run()
    finally:
        engine.install()
    return dropped, hidden, alive
