# SPDX-License-Identifier: Apache-2.0
"""`zipvl` by itself."""

from __future__ import annotations

import math
from typing import Any

import mini_llava as mini
import pytest
import torch
from naive_in_cache import (
    CASES,
    ROWS,
    Choose,
    against_hand,
    column_sums,
    decode,
    packed_by_hand,
    positioned,
    rows_alone,
    some_tokens,
)
from torch import Tensor

import vtc
from vtc.cache.codecs import Affine, Packing
from vtc.methods.zipvl import ZipVL, probe_rows, token_budget
from vtc.transformers_contract import cache_left


@pytest.mark.parametrize("tau, p", [(0.96, 5), (0.975, 5), (0.5, 2)])
def test_zipvl_golden(tau: float, p: int) -> None:
    a = torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.03, 0.02]])
    assert token_budget(a, tau, torch.ones(1), torch.zeros(1)).tolist() == [p]
    text = torch.full((1,), 1.0)  # as much again on text
    assert token_budget(a, tau, 1 + text, text).item() <= p


def test_probe_rows() -> None:
    real = torch.ones(3, 400, dtype=torch.bool)
    real[1, :100] = False
    real[2, :330] = False
    rows, alive = probe_rows(real)
    assert alive.sum(1).tolist() == [128, 128, 70]
    for r, first in enumerate((0, 100, 330)):
        mine = set(rows[r, alive[r]].tolist())
        assert set(range(max(first, 336), 400)) <= mine <= set(range(first, 400))
        alone = probe_rows(real[r : r + 1, first:])
        assert mine == {c + first for c in alone[0][alone[1]].tolist()}
    assert set(probe_rows(real[:1], seed=1)[0][0].tolist()) != set(rows[0].tolist())


def zipvl_by_hand(k: int | None, tau: float, recent: int | None = None) -> Choose:
    def choose(i: int, x: Tensor, maps: Tensor, visual: Tensor) -> Tensor:
        n = len(x)
        first = 0 if recent is None else n - recent
        a = [sum(float(maps[:, c, j].mean()) for c in range(first, n)) for j in range(n)]
        seen = [sum(c >= j for c in range(first, n)) for j in range(n)]
        image = [j for j in range(n) if visual[j]]
        count = k * (len(image) // mini.PATCHES) if k is not None else 0
        if k is None:
            mass = sum(a[j] for j in range(n) if not visual[j])
            for value in sorted((a[j] for j in image), reverse=True):
                count, mass = count + 1, mass + value
                if mass >= tau * (n - first):
                    break
        best = sorted(image, key=lambda j: (-a[j] / seen[j], j))[:count]
        return ~visual | torch.tensor([j in best for j in range(n)])

    return choose


@pytest.mark.parametrize("pad, attention", CASES)
@torch.no_grad()
def test_zipvl_by_hand(pad: str | None, attention: str) -> None:
    against_hand(ZipVL(keep_tokens=6), zipvl_by_hand(6, 0), pad, attention)
    against_hand(ZipVL(tau=0.8), zipvl_by_hand(None, 0.8), pad, attention)
    few = ZipVL(tau=0.7, recent=5, random=0)
    against_hand(few, zipvl_by_hand(None, 0.7, recent=5), pad, attention)


def test_zipvl_parameters() -> None:
    assert not ZipVL().has_budget and ZipVL(keep_ratio=0.5).has_budget
    assert ZipVL().stages == {"bypass"} and ZipVL(kv="mixed").stages == {"cache"}
    for wrong in (dict(tau=0), dict(recent=0), dict(random=-1), dict(kv="no"), dict(group=12)):
        with pytest.raises(ValueError):
            ZipVL(**wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tau or a budget"):
        ZipVL(tau=0.9, keep_ratio=0.5)
    assert ZipVL().share == 0.975 and ZipVL(tau=0.9).share == 0.9
    with pytest.raises(ValueError, match="set tau"):
        ZipVL(kv="mixed", keep_ratio=0.5)


@torch.no_grad()
def test_zipvl_mixed_by_hand() -> None:
    inputs, tokens = positioned(mini.prompt(ROWS, pad="left")), some_tokens(3, 4)
    tau = 0.6
    model = vtc.wrap(mini.build(), ZipVL(kv="mixed", tau=tau, group=8))
    cache = cache_left(model(**inputs, use_cache=True))
    assert model.vtc.report().kv_bytes < 0.45 * model.vtc.report().kv_bytes_full
    got = decode(model, inputs, cache, tokens)
    stock = mini.build(attention="eager")
    codecs = dict(keys=Affine(2), values=Affine(2), keys_high=Affine(4), values_high=Affine(4))
    ask = Packing(**codecs, window=0, group=8)  # type: ignore[arg-type]
    high = set()
    for r, row in enumerate(rows_alone(inputs, ROWS)):
        sums = [s.tolist() for s in column_sums(stock, row)]

        def important(i: int, sums: Any = sums) -> tuple[set[int], list[float]]:
            a, n = sums[i], len(sums[i])
            rank = [math.inf if j in (0, n - 1) else a[j] / (n - j) for j in range(n)]
            p, mass = 0, 0.0
            for value in sorted(a, reverse=True):
                p, mass = p + 1, mass + value
                if mass >= tau * n:
                    break
            return set(sorted(range(n), key=lambda j: (-rank[j], j))[:p]), rank

        want, layers = packed_by_hand(stock, row, tokens[r], ask, 100, important)
        torch.testing.assert_close(got[r], want, atol=1e-4, rtol=1e-4)
        assert [layer.counts[r] for layer in cache.layers] == [layer.packed for layer in layers]
        high |= {int(layer.important[r].sum()) for layer in cache.layers}
    assert len(high) > 1
    long = model.generate(
        **inputs, max_new_tokens=120, do_sample=False, return_dict_in_generate=True
    )
    counts = cache_left(long).layers[2].counts
    assert (counts > torch.tensor([layer.shape[0] for layer in inputs["attention_mask"]])).all()
