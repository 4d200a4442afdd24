# SPDX-License-Identifier: Apache-2.0
"""MustDrop: golden files, naive loops, ragged images, and what is left in the KV cache."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import mini_llava as mini
import pytest
import torch
from golden_files import cases, load
from torch import Tensor

import vtc
from vtc.benchmarks.support.masked_oracle import compare
from vtc.methods._windows import merge_windows, windows_of
from vtc.methods.mustdrop import MustDrop, dual_filter, dual_score
from vtc.reduction import Reduction
from vtc.transformers_contract import cache_left
from vtc.views.cache import CacheView

OFF = dict(merge_threshold=None)
ALIKE = {"clip": 0.25, "siglip": 0.15, "dinov2": 0.05, "vit": 0.05}
LOUD = {t: {"merge_threshold": a, "window": 2} for t, a in ALIKE.items()}
"""By tower: random images merge some of their four windows, not all of them as many."""


# ---- encoding: windows -------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("mustdrop_vision_*.npz", 3))
def test_golden_merging(path: Any) -> None:
    golden = load(path)
    x, window = golden["x"][:, 1:], golden["window"]
    n = x.shape[1]
    side = math.isqrt(n)
    place = torch.arange(n)[None]
    into = merge_windows(x, place, (side, side), window, golden["threshold"])
    reduction = Reduction.from_merge(into)
    theirs = golden["source"][0, 1:, 1:].bool()
    assert reduction.count == len(theirs) < n
    got = reduction.merge(x)[0][0]
    for group, merged, size in zip(
        theirs, golden["merged"][0, 1:], golden["merged_size"][0, 1:], strict=True
    ):
        members = group.nonzero()[:, 0]
        slot = reduction.group[0, members]
        assert (slot == slot[0]).all() and (reduction.group[0] == slot[0]).sum() == len(members)
        assert len(members) == int(size) and reduction.keep[0, slot[0]] == members[-1]
        torch.testing.assert_close(got[slot[0]], merged, rtol=0, atol=1e-5)


def naive_windows(x: Tensor, place: list[int], grid: tuple, window: int, tau: float) -> list:
    """[(score, tokens of a window)] of the windows of one image that pass, the best first."""
    found = []
    for top in range(0, grid[0] - window + 1, window):
        for left in range(0, grid[1] - window + 1, window):
            patches = [(top + i) * grid[1] + left + j for i in range(window) for j in range(window)]
            if not all(p in place for p in patches):
                continue
            tokens = [place.index(p) for p in patches]
            cosines = [
                torch.nn.functional.cosine_similarity(x[a], x[b], dim=0).item()
                for a in tokens
                for b in tokens
                if a != b
            ]
            score = sum(cosines) / len(cosines)
            if score >= tau:
                found.append((score, tokens))
    return sorted(found, key=lambda f: -f[0])


def smooth(batch: int, n: int, seed: int = 0) -> Tensor:
    """Tokens (batch, n, 8) that are more or less alike, differently in each image."""
    g = torch.Generator().manual_seed(seed)
    noise = torch.linspace(0.1, 1.6, batch)[:, None, None]
    return torch.ones(batch, n, 8) + noise * torch.randn(batch, n, 8, generator=g)


@pytest.mark.parametrize("grid, window", [((6, 9), 3), ((7, 8), 3), ((5, 4), 2), ((2, 9), 3)])
@pytest.mark.parametrize("most", [None, 1])
@pytest.mark.parametrize("gone", [0, 3])
def test_merging_against_loops(grid: tuple, window: int, most: int | None, gone: int) -> None:
    n = grid[0] * grid[1]
    place = torch.stack([torch.randperm(n)[: n - gone].sort().values for _ in range(4)])
    x = smooth(4, n - gone, seed=n + gone)
    into = merge_windows(x, place, grid, window, 0.6, most)
    merged = []
    for b in range(4):
        want = list(range(n - gone))
        found = naive_windows(x[b], place[b].tolist(), grid, window, 0.6)[:most]
        for _, tokens in found:
            for t in tokens:
                want[t] = tokens[-1]
        assert into[b].tolist() == want
        merged.append(len(found))
    if grid[0] >= window and not gone:
        assert len(set(merged)) > 1 or most == 1, "every image merges alike: no teeth"
    coupled = merge_windows(x, place, grid, window, 0.6, most, coupled=True)
    removed = (coupled != torch.arange(n - gone)).sum(1)
    assert removed.tolist() == [min(merged) * (window**2 - 1)] * 4


def test_windows_of_a_grid() -> None:
    assert windows_of((4, 7), 3).tolist() == [
        [0, 1, 2, 7, 8, 9, 14, 15, 16],
        [3, 4, 5, 10, 11, 12, 17, 18, 19],
    ]
    assert windows_of((24, 24), 3).shape == (64, 9)
    assert windows_of((2, 2), 3).shape == (0, 9)


def vision_view(x: Tensor, grid: tuple, layer: int = 0, prefix: int = 1, **kwargs: Any) -> Any:
    from vtc.views.vision import VisionView

    front = torch.zeros(len(x), prefix, x.shape[2])
    return VisionView(
        x=torch.cat([front, x], 1),
        layer=layer,
        depth=4,
        prefix=prefix,
        has_cls=True,
        size=torch.ones(len(x), prefix + x.shape[1]),
        total=grid[0] * grid[1],
        grid=grid,
        projections=None,  # type: ignore[arg-type]
        **kwargs,
    )


def test_merging_in_a_view() -> None:
    x = torch.ones(2, 36, 8)
    x[1, 0] = -1  # the first window of the second image is mixed: 7/9 of its pairs are alike
    x[1, 1] = -1
    got = MustDrop(keep_tokens=1).on_vision_layer(vision_view(x, (6, 6), prefix=2))
    assert got is not None and got.counts.tolist() == [2 + 4, 2 + 3 + 9]
    assert got.keep[0].tolist()[:6] == [0, 1, 2 + 14, 2 + 17, 2 + 32, 2 + 35]
    assert got.valid is not None and got.valid[0].tolist() == [True] * 6 + [False] * 8
    assert MustDrop(keep_tokens=1).on_vision_layer(vision_view(x, (6, 6), layer=1)) is None
    assert MustDrop(**OFF).on_vision_layer(vision_view(x, (6, 6))) is None
    coupled = MustDrop(keep_tokens=1, batch_coupled=True)
    both = coupled.on_vision_layer(vision_view(x, (6, 6)))
    assert both is not None and both.valid is None and both.count == 1 + 12
    # A budget is not undercut: 36 - 8 r >= 20 allows two windows.
    limited = MustDrop(keep_tokens=20).on_vision_layer(vision_view(x, (6, 6)))
    assert limited is not None and limited.valid is None and limited.count == 1 + 20
    assert MustDrop(keep_ratio=1.0).on_vision_layer(vision_view(x, (6, 6))) is None
    # Thresholds know no budget.
    free = MustDrop.paper("llava-1.5", 192).on_vision_layer(vision_view(x, (6, 6)))
    assert free is not None and free.counts.tolist() == [5, 13]


def test_padding_of_an_earlier_method() -> None:
    """Slots that are no tokens neither merge nor survive."""
    x = torch.ones(2, 18, 8)
    place = torch.arange(18).repeat(2, 1)
    valid = torch.ones(2, 19, dtype=torch.bool)
    valid[1, -2:] = False
    place[1, -2:] = 0
    v = vision_view(x, (3, 6), places=place, valid=valid)
    got = MustDrop(keep_tokens=1).on_vision_layer(v)
    assert got is not None and got.counts.tolist() == [1 + 2, 1 + 1 + 7]
    assert (got.group[1, -2:] == -1).all()


# ---- prefill: the dual filter ------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("mustdrop_prefill_*.npz", 3))
def test_golden_filter(path: Any) -> None:
    golden = load(path)
    start = golden["prefix_len"]
    end = start + golden["image_len"]
    a = golden["attention"][:, :, end : end + golden["text_len"], start:end].mean(1)
    dropped = dual_filter(a, golden["global_threshold"], golden["individual_threshold"])[0]
    assert (~dropped).nonzero()[:, 0].tolist() == golden["kept"].tolist()


def test_worked_filter() -> None:
    a = torch.tensor([[[0.02, 0.001, 0.1], [0.01, 0.0005, 0.3]]])
    assert dual_filter(a, 0.1, 0.02)[0].tolist() == [False, True, False]  # 0.02 is not below 0.02
    torch.testing.assert_close(
        dual_score(a, 0.1, 0.02)[0], torch.tensor([1.0, 0.05, 15.0]), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("seed", range(4))
def test_score_and_filter_agree(seed: int) -> None:
    a = torch.rand(3, 5, 40, generator=torch.Generator().manual_seed(seed)) ** 6 / 10
    dropped = dual_filter(a, 0.02, 0.03)
    assert dropped.any() and not dropped.all()
    assert torch.equal(dual_score(a, 0.02, 0.03) < 1, dropped)


def key_set(model: Any, pixels: Tensor, ratio: float = 0.08) -> list[list[int]]:
    """By the attention maps of the stock tower."""
    maps = model.model.vision_tower(pixels, output_attentions=True).attentions[-1]
    score = maps[:, :, 0, 1:].mean(1)
    return [
        sorted(range(len(s)), key=lambda i: -s[i])[: math.ceil(ratio * len(s))]
        for s in score.tolist()
    ]


def follow(model: Any, m: MustDrop, inputs: dict, key: set[int], images: int = 1) -> list[list]:
    """The visual tokens that enter each layer, from the maps that the model itself returns."""
    out = model(**inputs, output_attentions=True)
    ids = inputs["input_ids"][0].tolist()
    alive = [i for i, t in enumerate(ids) if t == mini.IMAGE]
    order = {column: i for i, column in enumerate(alive)}
    text = list(range(max(alive) + 1, len(ids)))
    n = len(alive) // images
    entered, stage = [], 0
    for layer, maps in enumerate(out.attentions):
        entered.append([order[c] for c in alive])
        columns = [i for i in range(len(ids)) if i not in order or i in alive]
        assert maps.shape[2] == len(columns), layer
        if layer not in m.decoder_layers(5):
            continue
        a = maps[0].mean(0)
        g, best = {}, {}
        for c in alive:
            votes = [float(a[columns.index(t), columns.index(c)]) for t in text]
            g[c], best[c] = sum(votes), max(votes)
        total = sum(g.values())
        if m.has_budget:
            left = images * m.counts(n)[stage]
            rank = {c: max(g[c] / total / 0.001, best[c] / 0.001) for c in alive}
            alive = sorted(sorted(alive, key=lambda c: (order[c] not in key, -rank[c]))[:left])
        else:
            assert m.theta_global and m.theta_individual
            alive = [
                c
                for c in alive
                if order[c] in key
                or not (g[c] < m.theta_global * total and best[c] < m.theta_individual)
            ]
        stage += 1
    return entered


THRESHOLDS = dict(theta_global=0.03, theta_individual=0.06)
GAIN = 12.0  # attention far enough from uniform for one threshold to split it in every layer


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("how", [THRESHOLDS, dict(keep_tokens=5)])
def test_prefill_against_loops(how: dict, images: int) -> None:
    model = mini.build(attention="eager", gain=GAIN)
    different = set()
    for seed in range(4):
        inputs = mini.prompt(images, batch=1, seed=seed)
        keys = key_set(model, inputs["pixel_values"])
        assert all(len(k) == 2 for k in keys)
        key = {i * mini.PATCHES + k for i, ks in enumerate(keys) for k in ks}
        m = MustDrop(**how, **OFF)
        vtc.wrap(model, m)
        want = follow(model, m, inputs, key, images)
        model(**inputs)
        report = model.vtc.report()
        assert report.tokens_per_layer == [len(w) for w in want]
        assert [i for k in report.kept for i in k] == [w % mini.PATCHES for w in want[-1]] or (
            sum(map(len, report.kept)) == len(want[-1])
        )
        vtc.unwrap(model)
        assert key <= set(want[-1])
        different.add(tuple(map(len, want)))
        assert len(want[-1]) < images * mini.PATCHES
    assert (len(different) > 1) == (how is THRESHOLDS)


@torch.no_grad()
def test_thresholds_alone_and_together() -> None:
    """Rows of a batch keep different numbers; each is what it is alone."""
    model = mini.build(gain=GAIN)
    vtc.wrap(model, MustDrop(**THRESHOLDS, **LOUD["clip"]))
    assert model.vtc.methods[0].has_budget is False
    for pad in ("left", "right"):
        inputs = mini.prompt([1, 2, 1], pad=pad, seed=3)
        together = model(**inputs, use_cache=True)
        assert model.vtc.report().asked is None
        image, kept = 0, []
        for r, n in enumerate([1, 2, 1]):
            real = inputs["attention_mask"][r].bool()
            one = dict(
                input_ids=inputs["input_ids"][r : r + 1, real],
                attention_mask=inputs["attention_mask"][r : r + 1, real],
                pixel_values=inputs["pixel_values"][image : image + n],
            )
            image += n
            alone = model(**one).logits[0]
            kept.append(model.vtc.report().final_tokens)
            torch.testing.assert_close(together.logits[r][real], alone, atol=1e-5, rtol=1e-5)
        assert len(set(kept)) > 1, "rows keep the same number: no teeth"


@torch.no_grad()
@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
@pytest.mark.parametrize("pad", [None, "left"])
@pytest.mark.parametrize("how", [dict(keep_tokens=4), THRESHOLDS])
def test_evicted_is_masked_with_ragged_images(how: dict, pad: str | None, decoder: str) -> None:
    model = mini.build("clip", decoder, "eager" if pad else "sdpa", gain=GAIN)
    inputs = mini.prompt([1, 2] if pad else 1, batch=2, pad=pad, seed=1)
    vtc.wrap(model, MustDrop(**how, **LOUD["clip"]))

    def run() -> tuple[Tensor, Tensor]:
        out = model.generate(
            **inputs,
            max_new_tokens=5,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1), cache_left(out)

    (got, cache), (want, full), _ = compare(model, run)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert all(
        a.keys.shape[2] < b.keys.shape[2] for a, b in zip(cache.layers, full.layers, strict=True)
    )


# ---- ragged images in the encoder --------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("tower", list(mini.TOWERS))
def test_ragged_images_do_not_matter_to_each_other(tower: str) -> None:
    model = mini.build(tower)
    saliency = "cosine" if tower == "siglip" else "cls"
    vtc.wrap(model, MustDrop(keep_tokens=3, saliency=saliency, **LOUD[tower]))
    inputs = mini.prompt(1, batch=6, seed=2)
    together = model(**inputs).logits
    state = model.vtc.vision.state
    assert state.tokens.valid is not None, "all images merge as many windows: no teeth"
    counts = state.reduction.counts.tolist()
    for r in range(6):
        alone = model(**{name: x[r : r + 1] for name, x in inputs.items()}).logits[0]
        mine = model.vtc.vision.state.reduction
        assert (mini.PATCHES if mine is None else mine.count) == counts[r]
        torch.testing.assert_close(together[r], alone, atol=1e-5, rtol=1e-5)
    assert (state.size == 1).all()  # thrown away


@torch.no_grad()
def test_encoder_and_key_set_by_hand() -> None:
    """Stock blocks on short sequences, one image at a time, against what the engine carries."""
    model = mini.build(attention="eager")
    tower = model.model.vision_tower
    blocks = getattr(tower, "vision_model", tower).encoder.layers
    inputs = mini.prompt(1, batch=5, seed=2)
    stock = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[1]
    seen: list[Any] = []

    class WatchedMustDrop(MustDrop):
        def on_features(self, v: Any) -> None:
            super().on_features(v)
            row = v.cls_attention(-1).mean(1)
            seen.extend(zip(v.index, v.features, v.scratch["key"], row, strict=True))

    vtc.wrap(model, WatchedMustDrop(keep_tokens=2, key_ratio=0.2, **LOUD["clip"]))
    model(**inputs)
    vtc.unwrap(model)
    lengths = set()
    for r in range(5):
        x = stock[r]
        found = naive_windows(x[1:], list(range(16)), (4, 4), 2, ALIKE["clip"])
        gone: dict[int, Tensor] = {}
        for _, tokens in found:
            gone |= dict.fromkeys(tokens[:-1])  # type: ignore[arg-type]
            gone[tokens[-1]] = x[1:][tokens].mean(0)
        keep = [i for i in range(16) if gone.get(i, x) is not None]
        rows = [gone.get(i, x[1 + i]) for i in keep]
        h = torch.stack([x[0], *rows])[None]
        for block in blocks[1:3]:
            h = block(h, None)
            h = h[0] if isinstance(h, tuple) else h
        features = h[0, 1:]
        ((key, seen_row),) = [
            (k, row)
            for index, f, k, row in seen
            if index.tolist() == keep and torch.allclose(f, features, atol=1e-4, rtol=1e-4)
        ]
        attn = blocks[3].self_attn
        y = blocks[3].layer_norm1(h)
        q = attn.q_proj(y).unflatten(2, (2, -1)).transpose(1, 2)
        k = attn.k_proj(y).unflatten(2, (2, -1)).transpose(1, 2)
        row = (q[:, :, :1] @ k.transpose(2, 3) * attn.scale).softmax(-1)[0, :, 0, 1:].mean(0)
        torch.testing.assert_close(seen_row, row, atol=1e-5, rtol=1e-4)
        want = row.topk(math.ceil(0.2 * len(keep))).indices.sort().values
        assert key.nonzero()[:, 0].tolist() == want.tolist()
        lengths.add(len(keep))
    assert len(lengths) > 1


@torch.no_grad()
def test_attention_that_takes_no_mask_says_so() -> None:
    """Ragged images need a mask; an encoder whose attention takes none says what to do."""
    model = mini.build()
    vtc.wrap(model, MustDrop(keep_tokens=3, **LOUD["clip"]))
    for site in model.vtc.vision.sites.blocks:
        site.bias = None
    model(**mini.prompt(1, batch=1))
    with pytest.raises(vtc.UnsupportedError, match='attn_implementation="sdpa"'):
        model(**mini.prompt(1, batch=6, seed=2))


@torch.no_grad()
def test_key_set_without_class_token() -> None:
    x = torch.randn(2, 30, 8)
    v: Any = SimpleNamespace(features=x, count=30, scratch={})
    MustDrop(saliency="cosine").on_features(v)
    cosine = torch.nn.functional.cosine_similarity(x, x.mean(1, keepdim=True), dim=2)
    want = torch.zeros(2, 30, dtype=torch.bool).scatter(1, cosine.topk(3, largest=False)[1], True)
    assert torch.equal(v.scratch["key"], want)
    for n, k in ((576, 47), (50, 4), (1, 1), (512, 41)):
        v = SimpleNamespace(features=torch.randn(1, n, 4), count=n, scratch={})
        MustDrop(saliency="cosine").on_features(v)
        assert int(v.scratch["key"].sum()) == k
    with pytest.raises(vtc.UnsupportedError, match=r"\[CLS\]"):
        vtc.wrap(mini.build("siglip"), "mustdrop")


@torch.no_grad()
def test_after_methods_that_removed_patches() -> None:
    """Whatever an earlier method of a chain left, the budget is met and windows are whole."""
    tome, half = vtc.methods()["tome"], vtc.methods()["divprune"](keep_tokens=9)
    for first in (tome(keep_tokens=12), half, vtc.methods()["downsample"](keep_ratio=0.6)):
        model = mini.build()
        alike = isinstance(first, tome)  # takes as many patches of every image
        later = MustDrop(keep_tokens=5, batch_coupled=alike, **LOUD["clip"])
        vtc.wrap(model, vtc.chain(first, later))
        for seed in range(3):  # windows merge in some images and not in others
            model(**mini.prompt(1, batch=4, seed=seed))
            assert model.vtc.report().final_tokens == 5


# ---- decoding: the KV cache --------------------------------------------------------------------


def test_cache_by_hand() -> None:
    flags = torch.tensor([[0, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 0]]).bool()
    end = torch.tensor([[1, 1, 0, 0, 1, 1], [1, 0, 1, 1, 0, 1]]).bool()

    def view(layer: int, **kwargs: Any) -> CacheView:
        kv = torch.zeros(2, 1, 6, 4)
        given: dict[str, Any] = dict(
            keys=kv, values=kv, visual=flags, valid=None, step=0, reaches_end=end
        )
        given |= kwargs
        return CacheView(layer=layer, depth=32, budget=torch.tensor([1, 2]), **given)

    m = MustDrop()
    assert m.on_cache(view(0)) is None and m.on_cache(view(1)) is None
    got = m.on_cache(view(2))
    assert got is not None
    assert got.keep.tolist() == [[0, 1, 4, 5], [0, 2, 3, 5]]
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[0, 0] = False
    got = m.on_cache(view(31, valid=valid))
    assert got is not None and got.valid is not None
    assert got.keep[0, got.valid[0]].tolist() == [1, 4, 5]
    assert m.on_cache(view(5, step=1)) is None
    assert m.on_cache(view(5, reaches_end=None)) is None
    assert m.on_cache(view(5, reaches_end=torch.ones_like(end))) is None
    assert MustDrop(output_aware=False).on_cache(view(5)) is None


@torch.no_grad()
def test_slots_left_in_each_layer() -> None:
    inputs = mini.prompt(1, batch=2)
    text = inputs["input_ids"].shape[1] - mini.PATCHES
    for layers, aware, slots in (
        ((2, 6, 10, 14), True, [5] * 5),
        ((2, 6, 10, 14), False, [16, *MustDrop(keep_tokens=5).counts(16)]),
        ((13, 19), True, [16, 5, 5, 5, 5]),
    ):
        model = mini.build()
        m = MustDrop(keep_tokens=5, layers=layers, output_aware=aware, **OFF)
        vtc.wrap(model, m)
        cache = cache_left(model(**inputs, use_cache=True))
        assert [layer.keys.shape[2] - text for layer in cache.layers] == slots
        report = model.vtc.report()
        assert report.kv_bytes == sum(2 * layer.keys.nbytes for layer in cache.layers)


# ---- settings ----------------------------------------------------------------------------------


def test_layers() -> None:
    m = MustDrop()
    assert m.decoder_layers(32) == (2, 6, 10, 14)
    assert m.decoder_layers(24) == (1, 4, 7, 10)
    assert m.decoder_layers(8) == (0, 1, 2, 3)
    assert m.decoder_layers(5) == (0, 1, 2, 3)
    assert m.decoder_layers(3) == (0, 1)
    assert m.decoder_layers(2) == (0,)
    assert m.captures(24) == (23,)
    assert MustDrop(saliency="cosine").captures(24) == ()


@torch.no_grad()
def test_a_shallow_decoder_reaches_the_budget() -> None:
    import mini_llava

    config = mini_llava._text["num_hidden_layers"]
    try:
        for depth in (2, 3):
            mini_llava._text["num_hidden_layers"] = depth
            model = mini.build()
            vtc.wrap(model, "mustdrop", keep_tokens=5)
            model(**mini.prompt(1))
            assert model.vtc.report().final_tokens == 5
    finally:
        mini_llava._text["num_hidden_layers"] = config


def test_budgets() -> None:
    for n in (16, 576, 2880):
        for k in (1, n // 9, n // 4, n):
            counts = MustDrop(keep_tokens=k).counts(n)
            assert len(counts) == 4 and counts[-1] == k
            assert sorted(counts, reverse=True) == counts
    assert MustDrop(keep_ratio=0.25).counts(576) == [407, 288, 204, 144]
    assert MustDrop(keep_tokens=100, schedule=(0.5, 0.25, 0.1)).counts(576) == [288, 144, 100, 100]
    assert MustDrop().has_budget and MustDrop(**THRESHOLDS, keep_tokens=3).has_budget


def test_presets() -> None:
    for tokens, thetas in {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}.items():
        m = MustDrop.paper("llava-1.5", tokens)
        assert isinstance(m, MustDrop) and not m.has_budget
        assert (m.theta_global, m.theta_individual) == thetas
        assert (m.window, m.merge_threshold, m.key_ratio, m.layers) == (
            3,
            0.8,
            0.08,
            (2, 6, 10, 14),
        )
    with pytest.raises(vtc.UnsupportedError, match=r"llava-1\.5"):
        MustDrop.paper("llava-1.5", 100)


@torch.no_grad()
def test_edge_cases() -> None:
    """Nothing to drop, everything to drop, no text behind the image, no image at all."""
    inputs = mini.prompt(1)
    model = mini.build()
    stock = model(**inputs).logits
    none = MustDrop(theta_global=1e-9, theta_individual=1e-9, **OFF)
    with vtc.compressing(model, none):
        torch.testing.assert_close(model(**inputs).logits, stock, atol=1e-5, rtol=1e-5)
    every = MustDrop(theta_global=9, theta_individual=9, **OFF)
    with vtc.compressing(model, every) as session:
        assert torch.isfinite(model(**inputs).logits).all()
        assert session.report().final_tokens == 2  # the key set
        bare = mini.prompt(1, after=0)
        model(**bare)
        assert session.report().final_tokens == mini.PATCHES
    with vtc.compressing(model, MustDrop(keep_tokens=5)) as session:
        model(**bare)
        assert session.report().final_tokens == 5
        text = {"input_ids": torch.tensor([[5, 6, 7]])}
        compressed = model(**text).logits
    assert torch.equal(compressed, model(**text).logits)


@torch.no_grad()
def test_compact_positions() -> None:
    model, inputs = mini.build(), mini.prompt([1, 2], pad="left")
    out = []
    for positions in ("original", "compact"):
        with vtc.compressing(model, MustDrop(keep_tokens=5, positions=positions, **LOUD["clip"])):
            out.append(model.generate(**inputs, max_new_tokens=3, do_sample=False))
            logits = model(**inputs).logits[:, -1]
            assert torch.isfinite(logits).all()
            out.append(logits)
    assert not torch.allclose(out[1], out[3], atol=1e-3)


@pytest.mark.parametrize(
    "kwargs, match",
    [
        (dict(theta_global=0.1), "or neither"),
        (dict(theta_global=0.1, theta_individual=0), "positive"),
        (dict(layers=()), "ascending"),
        (dict(layers=(4, 2)), "ascending"),
        (dict(layers=(2, 40)), "of 32"),
        (dict(schedule=(0.5,)), "each of the 4 layers"),
        (dict(schedule=(0.5, 0, 0.1)), "fractions"),
        (dict(schedule=(0.5, 0.4, 0.1), **THRESHOLDS), "goes with a budget"),
        (dict(window=1), "window"),
        (dict(merge_threshold=float("nan")), "merge_threshold is a mean cosine"),
        (dict(merge_threshold="0.8"), "merge_threshold is a mean cosine"),
        (dict(key_ratio=1.2), "key_ratio"),
        (dict(saliency="received"), "saliency"),
    ],
)
def test_errors(kwargs: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        MustDrop(**kwargs)
