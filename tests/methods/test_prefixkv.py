# SPDX-License-Identifier: Apache-2.0
"""`prefixkv` by itself."""

from __future__ import annotations

from typing import Any

import mini_llava as mini
import pytest
import torch
from naive_in_cache import (
    CASES,
    CLOSE,
    ROWS,
    column_sums,
    decode,
    positioned,
    rows_alone,
    some_tokens,
)
from torch import Tensor

import vtc
from vtc.benchmarks.support.masked_oracle import masked
from vtc.methods.prefixkv import PrefixKV, allocate, prefix_counts
from vtc.transformers_contract import cache_left, giving

SHARES = [[0.5, 0.2, 0.1, 0.05, 0.05, 0.04, 0.03, 0.01, 0.01, 0.01], [0.1] * 10]


@pytest.mark.parametrize("p, counts", [(0.55, [2, 6]), (0.75, [3, 8]), (0.85, [4, 9])])
def test_prefixkv_golden(p: float, counts: list[int]) -> None:
    mass = torch.tensor(SHARES, dtype=torch.float64)
    assert prefix_counts(mass, p).tolist() == counts
    total = torch.tensor([sum(counts)])
    assert allocate(mass[None], torch.full((1, 2), 10), total)[0].tolist() == counts


def allocate_by_hand(mass: list[list[float]], allowed: list[int], total: int) -> list[int]:
    """Raise p step by step over all shares at which some layer gets one more slot."""
    curves = []
    for layer in mass:
        sums, so_far = [], 0.0
        for value in sorted(layer, reverse=True):
            so_far += value / sum(layer)
            sums.append(so_far)
        curves.append(sums)

    def counts(p: float) -> list[int]:
        return [
            min(a, sum(share < p for share in sums) + 1)
            for sums, a in zip(curves, allowed, strict=True)
        ]

    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(counts(middle)) <= total else (low, middle)
    return counts(low)


def test_allocation_is_the_limit_of_the_bisection() -> None:
    g = torch.Generator().manual_seed(0)
    mass = torch.rand(4, 6, 40, generator=g) ** 4
    allowed = torch.randint(5, 41, (4, 6), generator=g)
    total = torch.tensor([30, 60, 90, 1000])
    got = allocate(mass, allowed, total)
    assert got.sum(1).tolist() == torch.minimum(total, allowed.sum(1)).tolist()
    for b in range(3):
        want = allocate_by_hand(mass[b].double().tolist(), allowed[b].tolist(), int(total[b]))
        assert got[b].tolist() == want
    ties = allocate(torch.ones(1, 3, 8), torch.full((1, 3), 8), torch.tensor([7]))
    assert ties.tolist() == [[3, 2, 2]]


def kept_columns(cache: Any, r: int, skip: int) -> list[list[int]]:
    """For each layer the slots that row r holds, counted from its first token."""
    out = []
    for layer in cache.layers:
        columns = layer.columns(torch.device("cpu"))[r]
        there = ~layer.padded("filler", torch.device("cpu"))[r] & (columns >= skip)
        out.append(sorted((columns[there] - skip).tolist()))
    return out


@pytest.mark.parametrize("pad, attention", CASES)
@torch.no_grad()
def test_prefixkv_keeps_the_prefix(pad: str | None, attention: str) -> None:
    images = ROWS if pad else [1, 1, 1]
    inputs = mini.prompt(images, batch=3, pad=pad)
    model = vtc.wrap(mini.build(attention=attention, gain=9), PrefixKV(keep_tokens=5))
    cache = cache_left(model(**inputs, use_cache=True))
    stock = mini.build(attention="eager", gain=9)
    uneven = False
    for r, row in enumerate(rows_alone(inputs, images)):
        visual = (row["input_ids"][0] == mini.IMAGE).nonzero()[:, 0].tolist()
        sums = [c.tolist() for c in column_sums(stock, row)]
        mass = [[c[j] for j in visual] for c in sums]
        counts = allocate_by_hand(mass, [len(visual)] * 5, 5 * 5 * images[r])
        assert sum(counts) == 25 * images[r]
        uneven |= len(set(counts)) > 1
        first = int(inputs["attention_mask"][r].long().argmax())
        for c, count, held in zip(sums, counts, kept_columns(cache, r, first), strict=True):
            best = sorted(visual, key=lambda j: (-c[j], j))[:count]
            text = set(range(row["input_ids"].shape[1])) - set(visual)
            assert set(held) & set(range(row["input_ids"].shape[1])) == text | set(best)
    assert uneven, "every layer the same: no teeth"


def hide(cache: Any, length: int) -> dict[int, Tensor]:
    """By layer the (B, length) columns that a compressed cache still holds."""
    alive = {}
    for i, layer in enumerate(cache.layers):
        columns = layer.columns(torch.device("cpu"))
        there = ~layer.padded("filler", columns.device)
        alive[i] = torch.zeros(len(columns), length, dtype=torch.bool).scatter(1, columns, there)
    return alive


@pytest.mark.parametrize("scope", ["visual", "all"])
@torch.no_grad()
def test_prefixkv_second_turn(scope: Any) -> None:
    """Slots that the first turn evicted are masked in the second; the budget is that of both."""
    method = PrefixKV(keep_ratio=0.4, scope=scope)
    first, second = (mini.prompt(1, batch=2, seed=s) for s in (1, 2))
    length = first["input_ids"].shape[1]
    both = torch.ones(2, 2 * length, dtype=torch.long)
    model = vtc.wrap(mini.build(), method)
    cache = cache_left(model(**first, use_cache=True))
    alive = hide(cache, length)
    again = {**second, "attention_mask": both}
    got = model(**again, **giving(model, cache), use_cache=True).logits
    assert cache.get_seq_length() == 2 * length
    after = hide(cache, 2 * length)
    for r in range(2):
        total = sum(int(after[i][r].sum()) for i in range(5))
        text = 2 * (length - mini.PATCHES) * 5
        budget = text + 5 * 2 * round(0.4 * mini.PATCHES)
        assert total == (budget if scope == "visual" else round(0.4 * 5 * 2 * length))
        assert all(bool((after[i][r, :length] <= alive[i][r]).all()) for i in range(5))
    tokens = some_tokens(2, 3)
    held = decode(model, {"input_ids": both}, cache, tokens[:, :1])
    vtc.unwrap(model)
    layers = model.model.language_model.layers
    full = cache_left(model(**first, use_cache=True))
    with masked(layers, alive):
        want = model(**again, **giving(model, full), use_cache=True).logits
    torch.testing.assert_close(got, want, **CLOSE)
    with masked(layers, after):
        want = decode(model, {"input_ids": both}, full, tokens[:, :1])
    torch.testing.assert_close(held, want, **CLOSE)


@torch.no_grad()
def test_prefixkv_pays_while_decoding() -> None:
    """The published form: one slot, 25 before the end of the kept prompt, when one is owed."""
    images, share, steps = [2, 3, 2], 0.6, 12
    inputs, tokens = positioned(mini.prompt(images, pad="left")), some_tokens(3, 12)
    model = vtc.wrap(mini.build(), PrefixKV(keep_ratio=share, scope="all"))
    cache = cache_left(model(**inputs, use_cache=True))
    length = inputs["input_ids"].shape[1]
    starts = [int(m.long().argmax()) for m in inputs["attention_mask"]]
    lists = [kept_columns(cache, r, starts[r]) for r in range(3)]
    prompt = [length - s for s in starts]
    kept = [[len(layer) for layer in row] for row in lists]
    assert [sum(k) for k in kept] == [round(share * 5 * n) for n in prompt]
    assert all(
        0 in layer and n - 1 in layer for row, n in zip(lists, prompt, strict=True) for layer in row
    )
    assert len({k for row in kept for k in row}) > 2
    wants, gots, stock = [], [], mini.build()
    full = cache_left(stock(**inputs, use_cache=True))
    mask, paid = inputs["attention_mask"], 0
    for s in range(steps):
        alive = {}
        for i in range(5):
            alive[i] = torch.zeros(3, length + s, dtype=torch.bool)
            for r in range(3):
                alive[i][r, [c + starts[r] for c in lists[r][i]]] = True
        with masked(stock.model.language_model.layers, alive):
            wants.append(
                decode(
                    stock, {"input_ids": mask, "attention_mask": mask}, full, tokens[:, s : s + 1]
                )
            )
        gots.append(
            decode(model, {"input_ids": mask, "attention_mask": mask}, cache, tokens[:, s : s + 1])
        )
        mask = torch.cat([mask, mask.new_ones(3, 1)], 1)
        for r in range(3):
            for i in range(5):
                held, n, k = lists[r][i], prompt[r], kept[r][i]
                held.append(n + s)
                if len(held) - (n + s + 1) * k / n >= 1 - 1e-9:
                    held.pop(k - 25 if k - 25 >= 1 else len(held) // 2)
                    paid += 1
            assert kept_columns(cache, r, starts[r]) == lists[r]
    assert paid > 20
    torch.testing.assert_close(torch.cat(gots, 1), torch.cat(wants, 1), **CLOSE)


@torch.no_grad()
def test_prefixkv_calibration() -> None:
    model = mini.build()
    samples = [mini.prompt(1, batch=1, seed=s) for s in range(3)]
    found = []
    for sample in samples:
        with vtc.compressing(model, PrefixKV(keep_ratio=0.5)):
            cache = cache_left(model(**sample, use_cache=True))
        found.append([(24 - len(c)) / mini.PATCHES for c in kept_columns(cache, 0, 0)])
    method = PrefixKV.calibrate(model, samples, keep_ratio=0.5)
    assert method.ratios == pytest.approx([sum(f) / 3 for f in zip(*found, strict=True)])
    assert not method.has_budget
    vtc.wrap(model, method)
    cache = cache_left(model(**samples[0], use_cache=True))
    forgot = [24 - len(c) for c in kept_columns(cache, 0, 0)]
    assert forgot == [round(16 * r) for r in method.ratios]
    vtc.unwrap(model)
    with pytest.raises(ValueError, match="3 layers, the model has 5"):
        vtc.wrap(model, PrefixKV(ratios=(0.1, 0.2, 0.3)))(**samples[0], use_cache=True)


def test_prefixkv_parameters() -> None:
    for wrong in (
        dict(scope="text"),
        dict(scope="all", keep_tokens=4),
        dict(start=-1),
        dict(ratios=(0.5,), keep_ratio=0.5),
        dict(ratios=(1.0,)),
    ):
        with pytest.raises(ValueError):
            PrefixKV(**wrong)  # type: ignore[arg-type]
