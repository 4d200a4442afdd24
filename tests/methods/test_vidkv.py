# SPDX-License-Identifier: Apache-2.0
"""`vidkv` by itself."""

from __future__ import annotations

import math

import mini_llava as mini
import pytest
import torch
from naive_in_cache import (
    CASES,
    ROWS,
    VIDKV,
    NaiveRow,
    decode,
    packed_by_hand,
    positioned,
    rows_alone,
    some_tokens,
)

import vtc
from vtc.cache.codecs import Affine, MixedKeys, Packing, Ternary
from vtc.methods.fastv import FastV
from vtc.methods.vidkv import VidKV, relevance
from vtc.transformers_contract import cache_left, giving


def test_relevance() -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
    text = torch.tensor([[[1.0, 1.0], [3.0, 0.0], [9.0, 9.0]]])
    valid = torch.tensor([[True, True, False]])
    assert relevance(x, text, valid).tolist() == [[2.0, 1.0]]


@pytest.mark.parametrize("pad, attention", CASES[:3])
@torch.no_grad()
def test_vidkv_by_hand(pad: str | None, attention: str) -> None:
    images = ROWS if pad else [1, 1, 1]
    inputs, tokens = positioned(mini.prompt(images, batch=3, pad=pad)), some_tokens(3, 20)
    stock = mini.build(attention=attention)
    plain = decode(stock, inputs, cache_left(stock(**inputs, use_cache=True)), tokens)
    model = vtc.wrap(mini.build(attention=attention), VIDKV)
    cache = cache_left(model(**inputs, use_cache=True))
    report = model.vtc.report()
    held = [
        layer.keys.nbytes + layer.values.nbytes + layer.packed_bytes() for layer in cache.layers
    ]
    assert report.kv_bytes == sum(held)
    length = inputs["input_ids"].shape[1]
    assert report.kv_bytes_full == 5 * 2 * 3 * 2 * 12 * 4 * length
    assert report.kv_bytes < 0.6 * report.kv_bytes_full
    got = decode(model, inputs, cache, tokens)
    ask = Packing(keys=MixedKeys(), values=Ternary(), window=8, group=8, values_high=Affine(2))
    for r, row in enumerate(rows_alone(inputs, images)):
        ids = row["input_ids"][0]
        visual = ids == mini.IMAGE
        x = stock.get_input_embeddings()(ids)
        x[visual] = torch.cat(list(stock.get_image_features(row["pixel_values"]).pooler_output))
        score = x @ x[~visual].mean(0)
        score = score.masked_fill(~visual, -torch.inf).tolist() + [-math.inf] * tokens.shape[1]
        best = sorted(range(len(ids)), key=lambda j: (-score[j], j))[
            : round(0.2 * int(visual.sum()))
        ]
        chosen = (set(best), score)
        want, layers = packed_by_hand(stock, row, tokens[r], ask, 8, lambda i, c=chosen: c)  # type: ignore[misc]
        torch.testing.assert_close(got[r], want, atol=1e-4, rtol=1e-4)
        assert cache.layers[0].counts[r] == layers[0].packed > 16
    assert (got - plain).abs().max() > 0.01, "no teeth"


@torch.no_grad()
def test_vidkv_after_pruning() -> None:
    """The codes of what a method in the LLM left; generation in every way runs."""
    inputs, tokens = mini.prompt(2, batch=1), some_tokens(1, 2)
    fastv, vidkv = vtc.methods()["fastv"](keep_tokens=8), VidKV(window=8, group=8, protect=0)
    model = vtc.wrap(mini.build(), vtc.chain(fastv, vidkv))
    cache = cache_left(model(**inputs, use_cache=True))
    got = decode(model, inputs, cache, tokens)
    assert [layer.counts.item() for layer in cache.layers] == [32, 32, 16, 16, 16]
    vtc.unwrap(model)
    vtc.wrap(model, fastv)
    cache = cache_left(model(**inputs, use_cache=True))
    ask = Packing(keys=MixedKeys(), values=Ternary(), window=8, group=8)
    for layer in cache.layers:
        NaiveRow(layer.keys[0], layer.values[0], 8, ask).pack(8)
    torch.testing.assert_close(got, decode(model, inputs, cache, tokens), atol=1e-4, rtol=1e-4)
    vtc.unwrap(model)


@torch.no_grad()
def test_vidkv_protects_what_is_left_first() -> None:
    """No token that FastV dropped is important while a packed one that stays is not."""
    chain = vtc.chain(FastV(keep_tokens=8), VidKV(window=8, group=8, protect=0.5))
    model, teeth = vtc.wrap(mini.build(), chain), 0
    for seed in range(6):
        inputs = mini.prompt(ROWS, pad="left", seed=seed)
        cache = cache_left(model(**inputs, use_cache=True))
        visual, last = inputs["input_ids"] == mini.IMAGE, cache.layers[-1]
        there = ~last.padded("filler", visual.device)
        left = torch.zeros_like(visual).scatter(1, last.columns(visual.device), there) & visual
        for layer in cache.layers[:2]:
            columns = layer.columns(visual.device)[:, : layer.packed]
            packed = torch.arange(layer.packed) < layer.counts[:, None]
            image, stays = (x.gather(1, columns) & packed for x in (visual, left))
            for r in range(len(visual)):
                high = layer.important[r]
                gone = image[r] & ~stays[r]
                assert not (high & gone).any() or high[stays[r]].all()
                teeth += int(high.any() and gone.any())
    assert teeth


@torch.no_grad()
def test_second_turn_reads_the_codes() -> None:
    """The second prompt attends to what the stock model would see if its cache held the codes."""
    method = VidKV(window=8, group=8, protect=0)
    one, two = mini.prompt(1, batch=1, seed=1), mini.prompt(1, batch=1, seed=2)
    two["attention_mask"] = torch.ones(1, 48, dtype=torch.long)
    model = vtc.wrap(mini.build(), method)
    cache = cache_left(model(**one, use_cache=True))
    got = model(**two, **giving(model, cache), use_cache=True).logits
    assert cache.layers[0].counts.item() == 40
    vtc.unwrap(model)
    cache = cache_left(model(**one, use_cache=True))
    ask = Packing(keys=MixedKeys(), values=Ternary(), window=8, group=8)
    for layer in cache.layers:
        NaiveRow(layer.keys[0], layer.values[0], 8, ask).pack(8)
    want = model(**two, **giving(model, cache), use_cache=True).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


def test_vidkv_parameters() -> None:
    assert not VidKV().has_budget and VidKV(protect=0).stages == {"cache"}
    VidKV(keep_ratio=1.0)
    for wrong in (dict(keep_ratio=0.5), dict(keep_tokens=64)):
        with pytest.raises(ValueError, match="saves bits"):
            VidKV(**wrong)  # type: ignore[arg-type]
    for wrong in (
        dict(key_share=2),
        dict(protect=-1),
        dict(gamma=1.5),
        dict(group=10),
        dict(window=-1),
    ):
        with pytest.raises(ValueError):
            VidKV(**wrong)  # type: ignore[arg-type]
