# SPDX-License-Identifier: Apache-2.0
"""`mod` by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mini_llava as mini
import pytest
import torch
from naive_in_cache import CASES, ROWS, Choose, against_hand
from torch import Tensor

import vtc
from vtc.methods.mod import HeuristicMoD, MoD, Routers, best_of_each


def test_best_of_each() -> None:
    g = torch.Generator().manual_seed(0)
    score = torch.randint(0, 6, (2, 12), generator=g).float()
    image = torch.tensor([[0] * 4 + [1] * 3 + [2] * 5, [0] * 5 + [1] * 4 + [7] * 3])
    valid = torch.tensor([[True] * 12, [True] * 9 + [False] * 3])
    keep = torch.tensor([[2, 1, 3], [1, 4, 0]])
    got = best_of_each(score, image, keep, valid)
    for b in range(2):
        want = set()
        for i in range(3):
            mine = [j for j in range(12) if valid[b, j] and image[b, j] == i]
            want |= set(sorted(mine, key=lambda j: (-float(score[b, j]), j))[: int(keep[b, i])])
        assert set(got[b].nonzero()[:, 0].tolist()) == want


def mod_by_hand(layers: tuple[int, ...], score: Callable, k: int = 3) -> Choose:
    seen: dict[int, Tensor] = {}

    def choose(i: int, x: Tensor, maps: Tensor, visual: Tensor) -> Tensor | None:
        seen[i] = maps
        if i not in layers:
            return None
        scores = score(i, x, seen.get(i - 1))
        keep = ~visual
        image = visual.nonzero()[:, 0].split(mini.PATCHES)
        for columns in image:  # 20 % of each
            best = sorted(columns.tolist(), key=lambda j: (-float(scores[j]), j))[:k]
            keep[best] = True
        return keep

    return choose


@pytest.mark.parametrize("pad, attention", CASES)
@torch.no_grad()
def test_mod_by_hand(pad: str | None, attention: str) -> None:
    g = torch.Generator().manual_seed(1)
    routers = {i: torch.randn(48, generator=g) for i in (0, 2, 4)}
    routed = mod_by_hand((0, 2, 4), lambda i, x, before: x @ routers[i])
    against_hand(MoD(routers=routers), routed, pad, attention)
    attended = mod_by_hand((1, 3), lambda i, x, before: before[:, -1].mean(0))
    against_hand(HeuristicMoD(), attended, pad, attention)


@torch.no_grad()
def test_mod_reads_routers(tmp_path: Any) -> None:
    from safetensors.torch import save_file

    weights = {
        "layers.1.router.weight": torch.randn(1, 48),
        "layers.3.router.weight": torch.ones(48),
    }
    save_file({**weights, "layers.1.router.bias": torch.ones(1)}, tmp_path / "routers.safetensors")
    method = MoD(routers=str(tmp_path / "routers.safetensors"))
    assert (
        sorted(method.routers) == [1, 3] and str(method) == "mod(routers=<routers of layers 1, 3>)"
    )
    inputs = mini.prompt(1)
    model = vtc.wrap(mini.build(), method)
    got = model(**inputs).logits
    vtc.unwrap(model)
    vtc.wrap(model, MoD(routers={1: weights["layers.1.router.weight"][0], 3: torch.ones(48)}))
    assert torch.equal(model(**inputs).logits, got)
    assert model.vtc.report().tokens_per_layer == [16, 3, 16, 3, 16]
    vtc.unwrap(model)

    with pytest.raises(vtc.UnsupportedError, match="routers"):
        vtc.wrap(model, "mod")
    with pytest.raises(vtc.UnsupportedError, match="5 layers"):
        vtc.wrap(model, MoD(routers={9: torch.ones(48)}))
    with pytest.raises(ValueError, match="no router weights"):
        Routers.read({"weight": torch.ones(48)})
    with pytest.raises(ValueError, match="two router weights"):
        Routers.read({"a.1.b": torch.ones(4), "c.1.d": torch.ones(4)})
    with pytest.raises(ValueError, match="no router for layers"):
        MoD(routers={1: torch.ones(48)}, layers=(2,))
    with pytest.raises(ValueError, match="neighbours"):
        HeuristicMoD(layers=(1, 2))
    with pytest.raises(ValueError, match="48 dimensions"):
        vtc.wrap(model, MoD(routers={1: torch.ones(4)}))(**inputs)


@torch.no_grad()
def test_mod_by_transition() -> None:
    """Another router, another choice; the budget is the same."""
    inputs = mini.prompt(ROWS, pad="left")
    model = mini.build()
    out = []
    for router in ("attention", "ttv"):
        vtc.wrap(model, HeuristicMoD(router=router, keep_tokens=5))
        out.append(model(**inputs).logits)
        counts = model.vtc.report().tokens_per_layer
        assert counts[1] == counts[3] == pytest.approx(5 * 4 / 3)
        vtc.unwrap(model)
    assert not torch.allclose(*out, atol=1e-2)
