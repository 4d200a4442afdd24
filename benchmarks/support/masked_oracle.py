# SPDX-License-Identifier: Apache-2.0
"""The masked oracle: no token is removed, the attention mask hides the same ones instead."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vtc.engine.llm.engine import DecoderEngine
from vtc.engine.llm.observer import Observer

from ...transformers_contract import CACHE, MASK, cache_left


class Alive(dict[int, Tensor]):
    """(B, L) logical tokens that are alive in each layer of the first prefill.

    Attributes:
        cached: by logical length of the cache, for each layer the (B, length) columns that it still
            holds behind the cache stage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cached: dict[int, list[Tensor]] = {}


class Recorder(Observer):
    """Collects what is alive in each layer of the first prefill, and in the cache ever after.

    Attributes:
        alive: see `Alive`.
        merged: by layer, the survivors that a merge in the LLM gave a new hidden state: (B, L) bool
            and (B, L, D).
        parts: by layer, (B, L) bool, the tokens that take part in it where some go around it.
    """

    def __init__(self) -> None:
        self.alive = Alive()
        self.merged: dict[int, tuple[Tensor, Tensor]] = {}
        self.parts: dict[int, Tensor] = {}

    def entering(self, i: int, st: Any, given: Tensor, local: Any, hidden: Tensor) -> None:
        if i in self.alive:
            return
        if i > 0 and st.local is not local:
            before = given
            if local is not None:
                before = given.new_zeros(len(given), st.length, given.shape[2])
                before = before.scatter(1, local.unsqueeze(-1).expand_as(given), given)
            index = st.local.unsqueeze(-1).expand_as(hidden)
            changed = (hidden != before.gather(1, index)).any(-1) & st.visual
            where = torch.zeros(before.shape[:2], dtype=torch.bool).scatter(1, st.local, changed)
            if where.any():
                self.merged[i] = where, torch.zeros_like(before).scatter(1, index, hidden)
        mask = torch.ones(hidden.shape[0], st.length, dtype=torch.bool)
        if st.local is not None:
            there = torch.ones_like(st.local, dtype=torch.bool)
            if st.filler is not None:
                there = ~st.filler
            # Padding that was dropped on the way is masked by Hugging Face anyway.
            mask = torch.zeros_like(mask).scatter(1, st.local, there)
        self.alive[i] = mask

    def taking_part(self, i: int, st: Any, hidden: Tensor) -> None:
        part = torch.ones(len(hidden), st.length, dtype=torch.bool)
        if st.bypass is not None:
            filler, index = st.bypass.filler, st.bypass.index
            index = index if st.local is None else st.local.gather(1, index)
            there = torch.ones_like(index, dtype=torch.bool) if filler is None else ~filler
            part = torch.zeros_like(part).scatter(1, index, there)
        self.parts.setdefault(i, part)

    def evicted(self, cache: Any) -> None:
        held = []
        for layer in cache.layers:
            columns = layer.columns(layer.keys.device)
            there = ~layer.padded("filler", columns.device)
            mask = torch.zeros(len(columns), layer.get_seq_length(), dtype=torch.bool)
            held.append(mask.scatter(1, columns, there))
        self.alive.cached.setdefault(held[0].shape[1], held)


@contextmanager
def recording(engine: DecoderEngine) -> Iterator[Recorder]:
    """Let a recorder watch the engine for the length of a block."""
    recorder = Recorder()
    engine.observers.append(recorder)
    try:
        yield recorder
    finally:
        engine.observers.remove(recorder)


@contextmanager
def masked(
    layers: nn.ModuleList,
    alive: dict[int, Tensor],
    start: int = 0,
    merged: dict[int, tuple[Tensor, Tensor]] | None = None,
) -> Iterator[None]:
    """Run a stock decoder with the dead tokens masked from the layer on where they were dropped.

    Args:
        alive: by layer, (B, L) bool for the L columns from ``start`` on.
        merged: hidden states to put in at prefill, as `recording` collects them.
    """

    def hook(i: int) -> Callable[..., Any]:
        def mask_dead(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            hidden, kwargs = args[0], dict(kwargs)
            if i == 0:
                hidden = hidden.nan_to_num(0.0)
            if merged is not None and i in merged and hidden.shape[1] == merged[i][0].shape[1]:
                where, value = (t.repeat_interleave(len(hidden) // len(t), 0) for t in merged[i])
                hidden = value.where(where[..., None], hidden)
            batch, q_len = hidden.shape[:2]
            cache = CACHE.of(kwargs)
            past = cache.layers[i].get_seq_length() if cache and i < len(cache.layers) else 0
            dead = torch.zeros(batch, past + q_len, dtype=torch.bool)
            there, first = alive[i], start
            known = [n for n in getattr(alive, "cached", {}) if n <= past]
            if known:  # of the whole cache, earlier turns included
                there, first = alive.cached[max(known)][i], 0  # type: ignore[attr-defined]
            elif past > start and getattr(
                alive, "cached", {}
            ):  # drafts were evicted from, then cut
                there, first = alive.cached[min(alive.cached)][i][:, :past], 0  # type: ignore[attr-defined]
            there = there.repeat_interleave(batch // there.shape[0], 0)
            if past + q_len < first + there.shape[1]:
                return (hidden, *args[1:]), kwargs
            dead[:, first : first + there.shape[1]] = ~there
            dead = dead[:, None, None, :]
            mask = MASK.of(kwargs)
            if mask is None:
                mask = torch.ones(q_len, past + q_len, dtype=torch.bool).tril(past)
                mask = mask.expand(batch, 1, -1, -1)
            if mask.dtype == torch.bool:
                mask = mask & ~dead
            else:
                mask = mask.masked_fill(dead, torch.finfo(mask.dtype).min)
            MASK.put(kwargs, mask)
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


@contextmanager
def bypassing(layers: Any, parts: dict[int, Tensor], over: str) -> Iterator[None]:
    """A stock decoder in which the others are masked and get nothing from a layer at prefill.

    Args:
        over: what they bypass, "layer" or "attention".
    """

    def layer_hook(i: int) -> Callable[..., Any]:
        def back(module: Any, args: tuple[Any, ...], output: Tensor) -> Any:
            if output.shape[1] != parts[i].shape[1]:
                return None
            return output.where(parts[i][..., None], args[0])

        return back

    def attention_hook(i: int) -> Callable[..., Any]:
        def nothing(module: Any, args: tuple[Any, ...], output: tuple[Any, ...]) -> Any:
            if output[0].shape[1] != parts[i].shape[1]:
                return None
            return (output[0] * parts[i][..., None], *output[1:])

        return nothing

    handles = []
    for i, layer in enumerate(layers):
        if over == "layer":
            handles.append(layer.register_forward_hook(layer_hook(i), prepend=True))
        else:
            handles.append(layer.self_attn.register_forward_hook(attention_hook(i), prepend=True))
    try:
        with masked(layers, parts):
            yield
    finally:
        for handle in handles:
            handle.remove()


def logits_and_steps(
    model: Any, inputs: dict[str, Tensor], steps: int = 8
) -> tuple[Tensor, Tensor | None, list[int]]:
    """Prefill logits, greedy step logits (left or no padding only), KV length of each layer."""
    prefill = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in cache_left(prefill).layers]
    if not bool(inputs["attention_mask"][:, -1].all()):
        return prefill.logits, None, lengths
    how = {"max_new_tokens": steps, "do_sample": False}
    out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    return prefill.logits, torch.stack(out.logits, 1), lengths


def compare(model: Any, run: Callable[[], Any]) -> tuple[Any, Any, dict[int, Tensor]]:
    """Results of ``run`` on a wrapped model, and of the same with its drops turned into masks.

    The encoder side stays installed in both, so merged features are the same; only the LLM differs.
    Tokens that bypass a layer are masked in it and get nothing from it.
    What a method merges inside the LLM is put into the masked run at the place where it was merged.

    Returns:
        (dropped, masked, alive tokens of each layer).
    """
    engine = model.vtc.decoder
    layers = engine.sites.decoder.layers
    bypassed = {m.bypass for _, m, _ in engine.bypass_stage.methods}
    with recording(engine) as recorder:
        dropped = run()
    alive, merged = recorder.alive, recorder.merged
    engine.remove()
    try:
        with masked(layers, alive, merged=merged), ExitStack() as stack:
            for over in bypassed:
                stack.enter_context(bypassing(layers, recorder.parts, over))
            hidden = run()
    finally:
        engine.install()
    return dropped, hidden, alive
