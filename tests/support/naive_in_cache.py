# SPDX-License-Identifier: Apache-2.0
"""Naive loops of methods in the KV cache, row by row."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mini_llava as mini
import torch
from torch import Tensor

import vtc
from vtc.cache.codecs import Affine, Packing, Ternary
from vtc.methods.vidkv import VidKV
from vtc.transformers_contract import cache_left, giving

ROWS = [1, 2, 1]
CLOSE: dict[str, float] = dict(atol=1e-5, rtol=1e-5)


def positioned(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the positions that generate() passes: a row has its own, padded or not."""
    positions = inputs["attention_mask"].cumsum(1) - 1
    return {**inputs, "position_ids": positions.clamp(min=0)}


def rows_alone(inputs: dict[str, Tensor], images: list[int]) -> list[dict[str, Tensor]]:
    """Each row of a batch without its padding and mates."""
    out, image = [], 0
    for r, n in enumerate(images):
        real = inputs["attention_mask"][r].bool()
        out.append(
            {
                "input_ids": inputs["input_ids"][r : r + 1, real],
                "pixel_values": inputs["pixel_values"][image : image + n],
            }
        )
        image += n
    return out


def decode(model: Any, inputs: dict, cache: Any, tokens: Tensor) -> Tensor:
    """Logits (B, S, V) of given tokens (B, S), fed one by one."""
    mask, out = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])), []
    for i in range(tokens.shape[1]):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        step = model(
            input_ids=tokens[:, i : i + 1],
            attention_mask=mask,
            position_ids=mask.cumsum(1)[:, -1:] - 1,
            **giving(model, cache),
        )
        out.append(step.logits[:, -1])
    return torch.stack(out, 1)


def some_tokens(batch: int, steps: int) -> Tensor:
    return torch.randint(4, 60, (batch, steps), generator=torch.Generator().manual_seed(7))


Choose = Callable[[int, Tensor, Tensor, Tensor], Tensor | None]
"""(layer, x (T, D), attention maps (H, T, T) of that layer on all tokens, visual (T,)) -> (T,)."""


def by_hand(
    model: Any, inputs: dict[str, Tensor], tokens: Tensor, choose: Choose, over: str
) -> tuple[Tensor, Tensor, list[int]]:
    """Prefill logits (T, V), step logits (S, V) and KV lengths of one row, in plain loops."""
    lm, config = model.model.language_model, model.config.text_config
    heads, kv, dim = config.num_attention_heads, config.num_key_value_heads, lm.layers[0]
    dim = dim.self_attn.head_dim
    ids = inputs["input_ids"][0]
    visual = ids == mini.IMAGE
    x = model.get_input_embeddings()(ids)
    features = torch.cat(list(model.get_image_features(inputs["pixel_values"]).pooler_output))
    x[visual] = features.flatten(0, -2)
    frequency = 10000.0 ** (-torch.arange(0, dim, 2).float() / dim)

    def rope(t: Tensor, positions: Tensor) -> Tensor:
        angle = positions[:, None].float() * frequency
        cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
        a, b = t[..., : dim // 2], t[..., dim // 2 :]
        return t * cos + torch.cat([-b, a], -1) * sin

    def heads_of(name: str, layer: Any, u: Tensor) -> Tensor:
        return getattr(layer.self_attn, name)(u).unflatten(1, (-1, dim)).transpose(0, 1)

    def maps(q: Tensor, k: Tensor, q_at: Tensor, k_at: Tensor) -> Tensor:
        k = k.repeat_interleave(heads // kv, 0)
        scores = q @ k.transpose(1, 2) / math.sqrt(dim)
        return scores.masked_fill(k_at[None, None] > q_at[None, :, None], -torch.inf).softmax(-1)

    held: list[tuple[Tensor, Tensor, Tensor]] = []

    def run(x: Tensor, at: Tensor, visual: Tensor, first: bool) -> Tensor:
        for i, layer in enumerate(lm.layers):
            u = layer.input_layernorm(x)
            q, k = (rope(heads_of(n, layer, u), at) for n in ("q_proj", "k_proj"))
            v = heads_of("v_proj", layer, u)
            here = torch.ones(len(x), dtype=torch.bool)
            if first:
                chosen = choose(i, x, maps(q, k, at, at), visual)
                here = here if chosen is None else chosen
                held.append((k[:, here], v[:, here], at[here]))
            else:
                past = held[i]
                held[i] = (
                    torch.cat([past[0], k], 1),
                    torch.cat([past[1], v], 1),
                    torch.cat([past[2], at]),
                )
            keys, values, k_at = held[i]
            mixed = maps(q[:, here], keys, at[here], k_at)
            mixed = mixed @ values.repeat_interleave(heads // kv, 0)
            y = x.clone()
            y[here] = x[here] + layer.self_attn.o_proj(mixed.transpose(0, 1).flatten(1))
            after = y + layer.mlp(layer.post_attention_layernorm(y))
            x = torch.where(here[:, None], after, x) if over == "layer" else after
        return model.lm_head(lm.norm(x))

    prefill = run(x, torch.arange(len(x)), visual, True)
    lengths = [h[0].shape[1] for h in held]
    steps = []
    for i, token in enumerate(tokens):
        x = model.get_input_embeddings()(token[None])
        steps.append(run(x, torch.tensor([len(ids) + i]), torch.zeros(1).bool(), False)[0])
    return prefill, torch.stack(steps), lengths


def against_hand(method: vtc.Method, choose: Choose, pad: str | None, attention: str) -> None:
    """A batch with ragged rows, prefill and five steps, row by row against the loops above."""
    images = ROWS if pad else [1, 1, 1]
    inputs, tokens = positioned(mini.prompt(images, batch=3, pad=pad)), some_tokens(3, 5)
    stock = mini.build(attention=attention)
    want = [
        by_hand(stock, row, tokens[r], choose, method.bypass)
        for r, row in enumerate(rows_alone(inputs, images))
    ]
    plain = stock(**inputs, use_cache=True)
    model = vtc.wrap(mini.build(attention=attention), method)
    out = model(**inputs, use_cache=True)
    layers = cache_left(out).layers
    # A short row takes its padding along to fill up.
    longest = [max(w[2][i] for w in want) for i in range(5)]
    padding = [max(w[2][i] + int((~m.bool()).sum()) for w, m in zip(
        want, inputs["attention_mask"], strict=True)) for i in range(5)]  # fmt: skip
    for i, layer in enumerate(layers):
        assert longest[i] <= layer.keys.shape[2] <= padding[i]
    steps = decode(model, inputs, cache_left(out), tokens)
    for r, (prefill, step, _) in enumerate(want):
        real = inputs["attention_mask"][r].bool()
        torch.testing.assert_close(out.logits[r, real], prefill, atol=1e-4, rtol=1e-4)
        assert (out.logits[r, real] - plain.logits[r, real]).abs().max() > 1e-2, "no teeth"
        if pad != "right":
            torch.testing.assert_close(steps[r], step, atol=1e-4, rtol=1e-4)


CASES = [(None, "sdpa"), ("left", "sdpa"), ("left", "eager"), ("right", "sdpa")]


def column_sums(stock: Any, row: dict[str, Tensor]) -> list[Tensor]:
    """(T,) attention each slot gets in each layer, from eager maps."""
    return [a[0].mean(0).sum(0) for a in stock(**row, output_attentions=True).attentions]


def affine_by_hand(x: Tensor, bits: int) -> Tensor:
    """(n, d), channel by channel."""
    out = torch.empty_like(x)
    for c in range(x.shape[1]):
        low, high = x[:, c].min(), x[:, c].max()
        scale, zero = ((high - low) / (2**bits - 1)).half().float(), low.half().float()
        q = ((x[:, c] - zero) / scale).round().clamp(0, 2**bits - 1) if scale > 0 else 0
        out[:, c] = q * scale + zero
    return out


def ternary_by_hand(x: Tensor, gamma: float) -> Tensor:
    out = torch.zeros_like(x)
    for c in range(x.shape[1]):
        large = x[:, c].abs() > gamma * x[:, c].abs().mean()
        scale = x[large, c].abs().mean().half().float()
        out[large, c] = x[large, c].sign() * scale
    return out


def mixed_by_hand(x: Tensor, share: float) -> Tensor:
    """Through the full complex transform, both halves of it."""
    ranges = (x.max(0).values - x.min(0).values).tolist()
    order = sorted(range(len(ranges)), key=lambda c: (-ranges[c], c))
    wide = sorted(order[: round(share * len(order))])
    rest = sorted(set(order) - set(wide))
    out = torch.empty_like(x)
    out[:, wide] = affine_by_hand(x[:, wide], 2)
    if rest:
        f = torch.fft.fft(x[:, rest], norm="ortho")
        parts = []
        for part in (f.real, f.imag):
            part = part.where(part.abs() > 1e-7, 0.0)  # imaginary parts that are zero
            parts.append(part.sign() * part.abs().mean(0).half().float())
        out[:, rest] = torch.fft.ifft(torch.complex(*parts), norm="ortho").real
    return out


class NaiveRow:
    """One row of one layer by hand: a list of tokens, those packed so far replaced by their
    codes."""

    def __init__(self, keys: Tensor, values: Tensor, group: int, ask: Packing) -> None:
        self.keys, self.values, self.group, self.ask = keys, values, group, ask  # (H, n, d)
        self.packed = 0

    def add(self, keys: Tensor, values: Tensor) -> None:
        self.keys = torch.cat([self.keys, keys], 1)
        self.values = torch.cat([self.values, values], 1)

    def pack(self, due: int, important: set[int] = frozenset(), rank: Any = None) -> None:  # type: ignore[assignment]
        ready = self.keys.shape[1] - self.packed - self.ask.window
        n = ready // self.group * self.group
        if ready < due or n <= 0:
            return
        new = range(self.packed, self.packed + n)
        wanted = [t for t in new if t in important]
        count = -(-len(wanted) // self.group) * self.group
        fill = (
            sorted((t for t in new if t not in important), key=lambda t: (-rank[t], t))
            if rank
            else []
        )
        high = sorted((wanted + fill)[:count] if len(wanted) < count else wanted)
        low = [t for t in new if t not in high]
        for x, low_codec, high_codec in (
            (self.keys, self.ask.keys, self.ask.keys_high),
            (self.values, self.ask.values, self.ask.values_high),
        ):
            parts = (
                [(list(new), low_codec)]
                if high_codec is None
                else [(low, low_codec), (high, high_codec)]
            )
            for tokens, codec in parts:
                for g in range(0, len(tokens), self.group):
                    these = tokens[g : g + self.group]
                    for h in range(x.shape[0]):
                        x[h, these] = by_codec(codec, x[h, these].float()).to(x.dtype)
        self.packed += n


def by_codec(codec: Any, x: Tensor) -> Tensor:
    if isinstance(codec, Affine):
        return affine_by_hand(x, codec.bits)
    return (
        ternary_by_hand(x, codec.gamma)
        if isinstance(codec, Ternary)
        else mixed_by_hand(x, codec.share)
    )


def packed_by_hand(
    stock: Any, row: dict[str, Tensor], tokens: Tensor, ask: Packing, due: int,
    important: Callable[[int], tuple[set[int], list[float]]],
) -> tuple[Tensor, list[NaiveRow]]:  # fmt: skip
    """Step logits (S, V) of one row on a stock cache whose old tokens are replaced by their
    codes."""
    cache = cache_left(stock(**row, use_cache=True))
    layers, out = [], []
    for i, layer in enumerate(cache.layers):
        layers.append(NaiveRow(layer.keys[0], layer.values[0], ask.group, ask))
        layers[-1].pack(ask.group, *important(i))
    for token in tokens:
        out.append(stock(input_ids=token.view(1, 1), **giving(stock, cache)).logits[0, -1])
        for i, (by_hand_, layer) in enumerate(zip(layers, cache.layers, strict=True)):
            by_hand_.keys, by_hand_.values = layer.keys[0], layer.values[0]
            by_hand_.pack(due, *important(i))
    return torch.stack(out), layers


VIDKV = VidKV(window=8, group=8, protect=0.2)
