# SPDX-License-Identifier: Apache-2.0
"""Packed layers of the KV cache, against codecs written by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from naive_in_cache import NaiveRow
from torch import Tensor
from transformers import DynamicCache

import vtc
from vtc.cache.codecs import Affine, MixedKeys, Packing, Ternary
from vtc.cache.pruned import cache_bytes, pruned_layer
from vtc.cache.quantized import pack_layer


def real_slots(layer: Any, r: int, skip: int) -> tuple[Tensor, Tensor]:
    """Keys and values (H, n, d) of row r in the order of its tokens."""
    columns = layer.columns(torch.device("cpu"))[r]
    there = (~layer.padded("filler", columns.device)[r] & (columns >= skip)).nonzero()[:, 0]
    there = there[columns[there].argsort()]
    keys, values = layer.unpacked()
    return keys[r][:, there], values[r][:, there]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_layer_by_hand(dtype: torch.dtype) -> None:
    """Ragged rows, importance, packing in three rounds, reordering; bytes to the last one."""
    g = torch.Generator().manual_seed(0)
    batch, heads, dim, length, group = 3, 2, 12, 75, 8
    skip = [0, 30, 62]
    cache = DynamicCache()

    def fresh(n: int) -> tuple[Tensor, Tensor]:
        return tuple(torch.randn(batch, heads, n, dim, generator=g).to(dtype) for _ in range(2))  # type: ignore[return-value]

    keys, values = fresh(length)
    cache.update(keys, values, 0)
    layer: Any = pruned_layer(cache, 0, batch, torch.device("cpu"))
    valid = torch.arange(length) >= torch.tensor(skip)[:, None]
    rank = torch.randn(batch, length, generator=g)
    important = (rank > 0.6) & valid
    ask = Packing(
        keys=MixedKeys(), values=Ternary(), window=16, due=8, group=group,
        values_high=Affine(2), important=important, rank=rank,
    )  # fmt: skip
    rows = [
        NaiveRow(keys[r, :, s:].clone(), values[r, :, s:].clone(), group, ask)
        for r, s in enumerate(skip)
    ]
    before = cache_bytes(cache)
    layer = pack_layer(cache, 0, ask, valid)
    for r, s in enumerate(skip):
        flagged = {int(t) - s for t in important[r].nonzero()[:, 0]}
        rows[r].pack(8, flagged, rank[r, s:].tolist())
    assert [row.packed for row in rows] == [56, 24, 0] == layer.counts.tolist()

    def check(order: list[int]) -> None:
        assert layer.get_seq_length() == length
        for r, source in enumerate(order):
            for got, want in zip(
                real_slots(layer, r, skip[source]),
                (rows[source].keys, rows[source].values),
                strict=True,
            ):
                torch.testing.assert_close(got.float(), want.float(), atol=1e-5, rtol=1e-5)

    check([0, 1, 2])
    held, full = cache_bytes(cache)
    stores = [s for level in layer.levels for s in level.stores]
    exact = sum(t.nbytes for s in stores for t in s.data.values()) + layer.important.nbytes
    assert held == exact + layer.keys.nbytes + layer.values.nbytes < before[0]
    assert full == before[1] == 2 * keys.nbytes
    assert all(t.untyped_storage().nbytes() == t.nbytes for s in stores for t in s.data.values())

    for step in range(40):
        k, v = fresh(1)
        out_keys, _ = cache.update(k, v, 0)
        length += 1
        assert out_keys.shape[2] == layer.physical_length()
        for r in range(batch):
            rows[r].add(k[r], v[r])
            rows[r].pack(16)
        empty = torch.zeros(batch, layer.physical_length(), dtype=torch.bool)
        later = Packing(
            keys=MixedKeys(), values=Ternary(), window=16, due=16, group=group,
            values_high=Affine(2), important=empty, rank=torch.zeros_like(empty).float(),
        )  # fmt: skip
        there = ~layer.padded("filler", torch.device("cpu"))
        there &= layer.columns(torch.device("cpu")) >= torch.tensor(skip)[:, None]
        pack_layer(cache, 0, later, there)
        if step % 13 == 0:
            check([0, 1, 2])
    check([0, 1, 2])
    assert layer.counts.tolist() == [row.packed for row in rows] and min(layer.counts) > 0

    cache.reorder_cache(torch.tensor([2, 0, 0]))
    check([2, 0, 0])
    cache.batch_repeat_interleave(2)
    check([2, 2, 0, 0, 0, 0])
    cache.batch_select_indices(torch.tensor([3, 1]))
    check([0, 2])
    cache.crop(-5)
    length -= 5
    for row in rows:
        row.keys, row.values = row.keys[:, :-5], row.values[:, :-5]
    check([0, 2])
    with pytest.raises(vtc.UnsupportedError, match="packed"):
        cache.crop(-40)
    check([0, 2])
    with pytest.raises(vtc.UnsupportedError, match="evict"):
        layer.evict(vtc.Reduction.identity(2, layer.physical_length()))
    cache.reset()
    assert cache.get_seq_length() == 0 and layer.packed == 0


def packed_cache(length: int, ask: Packing, valid: Tensor | None = None) -> tuple[Any, Tensor]:
    """A cache of one layer, packed, and its keys (2, 2, length, 12), which are the values too."""
    x = torch.randn(2, 2, length, 12, generator=torch.Generator().manual_seed(0))
    cache = DynamicCache()
    cache.update(x, x, 0)
    pruned_layer(cache, 0, 2, torch.device("cpu"))
    pack_layer(cache, 0, ask, valid)
    return cache, x


def test_layers_with_too_little_to_pack_stay_as_they_are() -> None:
    """Too few slots, or enough of them with too few tokens in any row."""
    ask = Packing(keys=Affine(2), values=Affine(2), window=8, group=8)
    cache, x = packed_cache(15, ask)
    assert torch.equal(cache.layers[0].keys, x) and not hasattr(cache.layers[0], "levels")
    valid = torch.arange(20) >= torch.tensor([[6], [5]])
    cache, x = packed_cache(20, ask, valid)
    (layer,) = cache.layers
    assert layer.packed == 0 and layer.packed_bytes() == 0
    more = torch.randn(2, 2, 1, 12)
    keys, values = cache.update(more, more, 0)
    assert torch.equal(keys, torch.cat([x, more], 2)) and torch.equal(keys, values)
    pack_layer(cache, 0, ask, torch.cat([valid, torch.ones(2, 1, dtype=torch.bool)], 1))
    assert layer.counts.tolist() == [0, 8]


def test_no_token_is_important_unless_the_method_says_so() -> None:
    low = Packing(keys=Affine(2), values=Affine(2), window=8, group=8)
    both = dataclasses.replace(low, keys_high=Affine(4), values_high=Affine(4))
    (want, _), (got, _) = packed_cache(32, low), packed_cache(32, both)
    for a, b in zip(want.layers[0].unpacked(), got.layers[0].unpacked(), strict=True):
        assert torch.equal(a, b)
    assert got.layers[0].packed == 24 and not got.layers[0].important.any()


def test_packed_layers_are_cropped_to_a_length() -> None:
    """As transformers did before 5.13: a positive number is the length to keep."""
    ask = Packing(keys=Affine(2), values=Affine(2), window=8, group=8)
    (one, _), (two, _) = packed_cache(32, ask), packed_cache(32, ask)
    one.layers[0].crop(28)
    two.layers[0].crop(-4)
    for a, b in zip(one.layers[0].unpacked(), two.layers[0].unpacked(), strict=True):
        assert torch.equal(a, b) and a.shape[2] == 28
    with pytest.raises(vtc.UnsupportedError, match="cannot crop 8 tokens: they reach back"):
        one.layers[0].crop(20)
