# SPDX-License-Identifier: Apache-2.0
"""Zero-TPrune: worked examples, naive loops, the attention that Hugging Face itself returns."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import mini_llava
import pytest
import torch
from mini import DEPTH, ENCODERS, GRID, images
from torch import Tensor

import vtc
from vtc.methods.mustdrop import MustDrop
from vtc.methods.zero_tprune import (
    RATIOS,
    ZeroTPrune,
    across_heads,
    first_votes,
    most_similar,
    page_rank,
)
from vtc.reduction import Reduction
from vtc.registry import resolve
from vtc.views.projections import Projections
from vtc.views.vision import VisionView

A = torch.tensor(
    [[0.5, 0.3, 0.1, 0.1], [0.2, 0.6, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25], [0.1, 0.7, 0.1, 0.1]]
)
LIMIT = [0.2773, 0.4874, 0.1176, 0.1176]


# ---- the stages --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "cls, votes, want",
    [
        (False, 1, [0.2625, 0.4625, 0.1375, 0.1375]),
        (False, 2, [0.2719, 0.4869, 0.1206, 0.1206]),
        (False, 60, LIMIT),
        (True, 0, [0.4, 0.2, 0.2, 0.2]),
        (True, 1, [0.31, 0.43, 0.13, 0.13]),
        (True, 2, [0.2865, 0.4745, 0.1195, 0.1195]),
        (True, 60, LIMIT),
    ],
)
def test_weighted_page_rank(cls: bool, votes: int, want: list[float]) -> None:
    got = page_rank(A, first_votes(4, cls), votes)
    torch.testing.assert_close(got, torch.tensor(want), rtol=0, atol=6e-5)
    assert got.sum() == pytest.approx(1)


def test_heads_by_hand() -> None:
    """Root mean square; a flat head and a spike do not count; all do if none passes."""
    mild = torch.tensor([0.4, 0.3, 0.2, 0.1])  # variance at mean 1: 0.2
    other = torch.tensor([0.2, 0.3, 0.1, 0.4])
    flat, spike = torch.full((4,), 0.25), torch.tensor([1.0, 0.0, 0.0, 0.0])
    rms = ((mild**2 + other**2) / 2).sqrt()
    got = across_heads(torch.stack([mild, flat, spike, other])[None])[0]
    torch.testing.assert_close(got, rms)
    only = across_heads(torch.stack([flat, spike])[None])[0]
    torch.testing.assert_close(only, ((flat**2 + spike**2) / 2).sqrt())
    # As written, no distribution over 197 tokens can pass, so all heads count.
    s = torch.rand(1, 6, 197).softmax(2)
    s[:, 0] = torch.eye(197)[3]
    torch.testing.assert_close(across_heads(s, scale=False), (s**2).mean(1).sqrt())
    assert not torch.allclose(across_heads(s), (s**2).mean(1).sqrt())


def naive_similar(x: Tensor, importance: Tensor, r: int) -> set[int]:
    order = sorted(range(len(x)), key=lambda i: (-float(importance[i]), i))
    b, a = order[: len(x) - len(x) // 2], order[len(x) - len(x) // 2 :]
    edge = {i: max(float(x[i] @ x[j]) for j in b) for i in a}
    return set(sorted(a, key=lambda i: (-edge[i], i))[:r])


@pytest.mark.parametrize("n, r", [(8, 3), (9, 4), (15, 2), (5, 0)])
def test_most_similar(n: int, r: int) -> None:
    torch.manual_seed(n)
    x = torch.nn.functional.normalize(torch.randn(3, n, 6), dim=2)
    importance = torch.rand(3, n)
    got = most_similar(x, importance, r)
    for row in range(3):
        assert set(got[row].tolist()) == naive_similar(x[row], importance[row], r)
    if n == 9:  # the smaller half is the less important one
        assert importance.gather(1, got).max() < importance.median(1).values.max()


def view(layer: int, prefix: int = 1, batch: int = 2, n: int = 15, depth: int = 12) -> VisionView:
    g = torch.Generator().manual_seed(layer)
    q, k = 1.5 * torch.randn(2, batch, 6, prefix + n, 8, generator=g)
    return VisionView(
        x=torch.randn(batch, prefix + n, 48, generator=g),
        layer=layer,
        depth=depth,
        prefix=prefix,
        has_cls=prefix > 0,
        size=torch.ones(batch, prefix + n),
        total=n,
        grid=(3, n // 3),
        projections=Projections(lambda rows: q[:, :, rows], lambda: k, 8**-0.5),
    )


def naive(m: ZeroTPrune, a: Tensor, key: Tensor, prefix: int, cls: bool, plan: tuple) -> list[int]:
    """One image in plain loops: a (H, T, T), key (H, T, d); the patches that stay."""
    similar, left, votes = plan
    heads, tokens, _ = a.shape

    def importance(alive: list[int], times: int) -> dict[int, float]:
        per_head = []
        for h in range(heads):
            sub = [[float(a[h, i, j]) for j in alive] for i in alive]
            sub = [[w / sum(row) for w in row] for row in sub]
            s = [math.sqrt(len(alive)) if cls and i == 0 else 1.0 for i in range(len(alive))]
            s = [w / sum(s) for w in s]
            for _ in range(times):
                s = [sum(s[i] * sub[i][j] for i in range(len(alive))) for j in range(len(alive))]
            per_head.append(s)
        passing = []
        for s in per_head:
            scaled = [w * len(s) for w in s]
            mean = sum(scaled) / len(s)
            if m.v_min <= sum((w - mean) ** 2 for w in scaled) / len(s) <= m.v_max:
                passing.append(s)
        passing = passing or per_head
        return {
            t: math.sqrt(sum(s[i] ** 2 for s in passing) / len(passing))
            for i, t in enumerate(alive)
        }

    n = tokens - prefix
    first = importance(list(range(tokens)), 1)
    x = torch.nn.functional.normalize(key.transpose(0, 1).flatten(1)[prefix:], dim=1)
    r = min(similar, n - left, n // 2)
    gone = naive_similar(x, torch.tensor([first[prefix + i] for i in range(n)]), r)
    alive = [i for i in range(n) if i not in gone]
    if len(alive) > left:
        rank = importance([*range(prefix), *(prefix + i for i in alive)], votes)
        alive = sorted(sorted(alive, key=lambda i: (-rank[prefix + i], i))[:left])
    return alive


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("start", [None, "uniform"])
def test_one_layer_against_loops(prefix: int, start: Any) -> None:
    m = ZeroTPrune(keep_tokens=4, similar=2, start=start)
    for layer, plan in m.schedule(15, 12).items():
        v = view(layer, prefix)
        got = m.on_vision_layer(v)
        assert got is not None and got.count == prefix + plan[1]
        assert torch.equal(got.keep[:, :prefix], torch.arange(prefix).expand(2, -1))
        for row in range(2):
            cls = prefix > 0 and start is None
            want = naive(m, v.attention[row], v.projections.key()[row], prefix, cls, plan)
            assert (got.keep[row, prefix:] - prefix).tolist() == want


def test_options_matter() -> None:
    """Each switch changes some choice."""

    def kept(**kwargs: Any) -> list:
        m = ZeroTPrune(keep_tokens=5, **kwargs)
        return [m.on_vision_layer(view(i, 1, 8)).keep.tolist() for i in (0, 2, 5, 8)]

    stock = kept()
    for kwargs in (
        dict(start="uniform", iterations=(1,) * 5),
        dict(vhf_scale="none"),
        dict(v_max=0.2),
        dict(similarity="mean"),
        dict(similar=0.4),
        dict(iterations=(1,) * 5),
    ):
        assert kept(**kwargs) != stock, kwargs


def test_heads_in_turn_are_all_heads() -> None:
    v = view(0)
    later = Reduction.from_merge(torch.tensor([0, 2, 2, *range(3, 16)]).expand(2, -1))
    for reduction in (None, later):
        v.projections.later = reduction
        for most, heads in ((1 << 24, [4, 2]), (2 * 2 * 16**2, [2, 2, 2]), (1, [1] * 6)):
            parts = [p.folded_attention() for p in v.projections.by_heads(most)]
            assert [p.shape[1] for p in parts] == heads
            torch.testing.assert_close(torch.cat(parts, 1), v.projections.folded_attention())


# ---- schedules ---------------------------------------------------------------------------------


def test_deit_small() -> None:
    """The preset: block by block, and the cost that the specification computed for it."""
    m = ZeroTPrune.paper("deit-s", 66)
    assert not m.has_budget
    assert m.counts(196) == [(186, 186), (176, 158), (148, 118), (108, 76), (66, 66)]
    plan = m.schedule(196, 12)
    assert plan == {
        0: (10, 186, 30),
        2: (10, 158, 5),
        5: (10, 118, 5),
        8: (10, 76, 1),
        10: (10, 66, 1),
    }
    n, flops = 196, 0
    for block in range(12):
        t = n + 1
        flops += 4 * t * 384**2 + 2 * t**2 * 384 + 2 * t * 384 * 1536
        n = plan[block][1] if block in plan else n
    assert flops / 1e9 == pytest.approx(3.06, abs=0.005)
    with pytest.raises(vtc.UnsupportedError, match="deit-s"):
        ZeroTPrune.paper("deit-s", 7)


@pytest.mark.parametrize("depth", [1, 2, 3, 5, 12, 23, 24])
@pytest.mark.parametrize("n", [16, 196, 576])
def test_budgets_are_met(n: int, depth: int) -> None:
    for k in {1, 2, n // 9, n // 4, n // 2, n - 1, n}:
        m = ZeroTPrune(keep_tokens=k)
        plan = m.schedule(n, depth)
        left = [plan[b][1] for b in sorted(plan)]
        assert max(plan) < depth and left[-1] == k
        assert all(a >= b for a, b in zip([n, *left], left, strict=False))
        assert all(similar >= 0 and votes >= 1 for similar, _, votes in plan.values())


def test_budget_keeps_the_shape() -> None:
    """The budget that the shape leads to anyway gives its counts."""
    m = ZeroTPrune(keep_tokens=66, similar=10)
    assert m.counts(196) == ZeroTPrune(ratios=RATIOS, similar=10).counts(196)
    other = ZeroTPrune(keep_ratio=0.5, layers=(2, 6), ratios=(0.5, 0.9), iterations=(9, 2))
    assert other.has_budget
    counts = other.counts(100)
    assert counts[-1][1] == 50 and 100 - counts[0][1] > 4 * (counts[0][1] - 50)


def test_clip_large_depths() -> None:
    assert sorted(ZeroTPrune().schedule(576, 23)) == [1, 5, 11, 16, 20]
    assert max(ZeroTPrune(layers=(12,), iterations=(1,)).schedule(576, 23)) == 22


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(layers=()), "ascending"),
        (dict(layers=(3, 1), iterations=(1, 1)), "ascending"),
        (dict(layers=(0, 1), iterations=(1, 1)), "from 1"),
        (dict(of=10), "behind the 10 blocks"),
        (dict(ratios=(0.5,)), "one for each of 5"),
        (dict(ratios=(0.5, 0.5, 0, 1, 1)), "shares"),
        (dict(ratios=(1.0,) * 5, similar=0), "nothing would be pruned"),
        (dict(iterations=(1, 2)), "one for each"),
        (dict(iterations=(1, 2, 0, 1, 1)), "at least 1"),
        (dict(similar=-1), "count of patches"),
        (dict(similar=1.5), "count of patches"),
        (dict(v_min=0.8), "v_min <= v_max"),
        (dict(v_min=float("nan")), "v_min is a variance"),
        (dict(v_max="0.7"), "v_max is a variance"),
        (dict(iterations=(1, 2, 1.5, 1, 1)), "iterations are votes"),
        (dict(iterations=(1, 2, "3", 1, 1)), "iterations are votes"),
        (dict(start="random"), "start is .*got"),
        (dict(vhf_scale="max"), "vhf_scale is .*got"),
        (dict(similarity="sum"), "similarity is .*got"),
        (dict(keep_ratio=2.0), "keep_ratio"),
    ],
)
def test_errors(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        ZeroTPrune(**kwargs)


def test_a_variance_may_be_above_one() -> None:
    method = ZeroTPrune(v_min=0.5, v_max=2.5)
    assert (method.v_min, method.v_max) == (0.5, 2.5)


# ---- in models ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("layer", [1, 3])
def test_hugging_face_attention_says_the_same(layer: int) -> None:
    """The maps and keys of a stock CLIP, through the loops above."""
    model, pixels = ENCODERS["hf-clip-eager"](), images(3)
    keys: list[Tensor] = []
    block = (
        model.vision_model.encoder.layers[layer - 1]
        if hasattr(model, "vision_model")
        else model.encoder.layers[layer - 1]
    )
    handle = block.self_attn.k_proj.register_forward_hook(lambda m, a, out: keys.append(out))
    maps = model(pixels, output_attentions=True).attentions[layer - 1]
    handle.remove()
    m = ZeroTPrune(layers=(layer,), of=DEPTH, iterations=(4,), keep_tokens=20, ratios=(0.5,))
    vtc.wrap(model, m)
    model(pixels)
    kept = model.vtc.vision.state.reduction.keep
    heads = maps.shape[1]
    for row in range(3):
        key = keys[0][row].unflatten(1, (heads, -1)).transpose(0, 1)
        plan = m.schedule(GRID * GRID, DEPTH)[layer - 1]
        assert plan[0] > 0 and plan[1] == 20
        assert kept[row].tolist() == naive(m, maps[row], key, 1, True, plan)


@torch.no_grad()
def test_class_token_is_optional() -> None:
    model, pixels = ENCODERS["timm-siglip"](), images()
    vtc.wrap(model, "zero-tprune", keep_ratio=0.5)
    model(pixels)
    vtc.unwrap(model)
    with pytest.raises(vtc.UnsupportedError, match=r"\[CLS\]"):
        vtc.wrap(model, "zero-tprune", start="cls")


@torch.no_grad()
def test_preset_in_a_model_of_another_depth() -> None:
    model, pixels = ENCODERS["timm-vit"](), images()
    vtc.wrap(model, ZeroTPrune(ratios=RATIOS, similar=3))
    model(pixels)
    report = model.vtc.report()
    assert report.asked is None
    want = ZeroTPrune(ratios=RATIOS, similar=3).counts(GRID * GRID)[-1][1]
    assert report.final_tokens == want < 32


@torch.no_grad()
@pytest.mark.parametrize("name", ["zero-tprune", "tome", "pitome"])
def test_ragged_rows_are_refused(name: str) -> None:
    """Behind MustDrop, which merges as many windows of each image as pass."""
    model, inputs = mini_llava.build(), mini_llava.prompt([1, 2], pad="right")
    (later,) = resolve(name, keep_tokens=3)
    ragged = MustDrop(merge_threshold=0.25, window=2, keep_tokens=3)
    vtc.wrap(model, vtc.chain(ragged, later))
    with pytest.raises(vtc.UnsupportedError, match=f"let {name} finish.*batch_coupled=True"):
        model(**inputs)
    vtc.unwrap(model)
    vtc.wrap(model, vtc.chain(replace(ragged, batch_coupled=True), later))
    model(**inputs)
    assert [len(k) for k in model.vtc.report().kept] == [3, 3, 3]


@torch.no_grad()
def test_behind_a_method_that_merges_in_the_same_block() -> None:
    model = mini_llava.build()
    vtc.wrap(model, vtc.chain(vtc.methods()["tome"](keep_tokens=11), ZeroTPrune(keep_tokens=5)))
    model(**mini_llava.prompt(1))
    assert model.vtc.report().final_tokens == 5
