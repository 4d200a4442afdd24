# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT and LLaVA-OneVision: crops, newlines; the six invariants for every method."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

import mini_anyres as mini
import mini_llava
import pytest
import torch
from invariants import dropped_is_masked
from mini_anyres import LARGE, SLIVER, SQUARE, TALL, TINY, WIDE
from snapshot import snapshot

import vtc
from vtc.adapters.locate import locate
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support.masked_oracle import compare
from vtc.budgets import apportion
from vtc.engine.llm.prompt import split_packed
from vtc.engine.vision.crops import layout_of
from vtc.methods._text import TextQuery
from vtc.methods.cdpruner import CDPruner
from vtc.methods.mod import MoD
from vtc.methods.vidkv import VidKV
from vtc.reduction import Reduction
from vtc.transformers_contract import cache_left, giving

SIZES = {
    "square": SQUARE,
    "wide": WIDE,
    "tall": TALL,
    "tiny": TINY,
    "sliver": SLIVER,
    "large": LARGE,
}
TOKENS, STEPS = 11, 4
CHOOSING = {"pixels", "vision", "features", "decoder"}
QUICK = {"divprune", "visionzip", "tome", "fastv", "globalcom2", "mustdrop", "downsample"}
"""Methods of every kind, whose invariants are not marked slow."""


# ---- which method on which family --------------------------------------------------------------


def inside(method: str) -> bool:
    """Acts in the encoder only, on every crop alike."""
    return seeded(method, None, 0).stages <= {"pixels", "vision"}


def in_encoder(method: str) -> bool:
    return bool(seeded(method, None, 0).stages & {"pixels", "vision"})


def made(method: str, family: str = "next", keep: Fraction | None = None) -> vtc.Method:
    """The method with a budget; with its substitute for [CLS] on OneVision's SigLIP."""
    chosen = seeded(method, keep or (Fraction(1, 2) if inside(method) else TOKENS), 0)
    return replace(chosen, **chosen.without_cls) if family == "onevision" else chosen


def takes_budget(method: str) -> bool:
    try:
        return made(method).has_budget
    except ValueError:
        return False


def needs_cls(method: str) -> bool:
    return "cls" in seeded(method, None, 0).needs


VIDEO = {m for m, cls in vtc.methods().items() if "frames" in cls.needs}
"""See test_video.py."""
METHODS = [m for m in sorted(vtc.methods()) if takes_budget(m) and m not in VIDEO]


def cases(methods: list[str]) -> list:
    return [
        pytest.param(m, f, id=f"{m}-{f}", marks=[] if m in QUICK else pytest.mark.slow)
        for m in methods
        for f in mini.FAMILIES
        if not (f == "onevision" and needs_cls(m) and not vtc.methods()[m].without_cls)
    ]


def bypasses(method: str) -> bool:
    """Whether tokens bypass layers: test_in_cache.py has an oracle for those."""
    return "bypass" in made(method).stages


def possible(method: str, family: str, size: tuple[int, int]) -> tuple[int, int]:
    """No resampled canvas behind an encoder that merges: that raises, see below."""
    return SQUARE if family == "onevision" and in_encoder(method) and size == LARGE else size


INPUTS: dict[str, tuple[list, dict]] = {
    "padded crops": ([[WIDE]], {}),
    "adjacent images": ([[TALL, TINY], [SLIVER]], {"pad": "left", "between": 0}),
    "right": ([[LARGE], [TINY, SQUARE]], {"pad": "right"}),
}


def inputs_for(name: str, method: str, family: str) -> tuple[list, dict[str, torch.Tensor]]:
    rows, how = INPUTS[name]
    rows = [[possible(method, family, size) for size in row] for row in rows]
    return rows, mini.prompt(rows, family, **how)


def logits_and_steps(model, inputs) -> tuple[torch.Tensor, torch.Tensor | None, list[int]]:
    """Prefill logits, greedy step logits (left or no padding only), KV length of each layer."""
    prefill = model(**inputs, use_cache=True)
    lengths = [layer.keys.shape[2] for layer in cache_left(prefill).layers]
    steps = None
    if bool(inputs["attention_mask"][:, -1].all()):
        how = {"max_new_tokens": STEPS, "do_sample": False}
        out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        steps = torch.stack(out.logits, 1)
        if "vtc" not in model.__dict__ or model.vtc.decoder.handles:
            # Encoded before the prefill or within it: the same.
            torch.testing.assert_close(steps[:, 0], prefill.logits[:, -1], atol=1e-5, rtol=1e-5)
    return prefill.logits, steps, lengths


# ---- invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("method, family", cases([m for m in METHODS if not bypasses(m)]))
@torch.no_grad()
def test_dropped_is_masked(method: str, family: str) -> None:
    """Invariants 3, 4 and 5: several images, padded crops, SDPA and eager, forward and generate."""
    chosen = made(method, family)
    drops = bool(chosen.stages & CHOOSING)
    for n, name in enumerate(INPUTS):
        model = mini.build(family, "eager" if n % 2 else "sdpa")
        rows, inputs = inputs_for(name, method, family)
        stock = logits_and_steps(model, inputs)
        vtc.wrap(model, chosen)
        alive = dropped_is_masked(model, logits_and_steps, inputs, stock, drops, name)
        # Invariant 5: of patches. Newlines all stay and are counted apart.
        model(**inputs)
        report = model.vtc.report()
        patches = [[mini.patches_of(size, family) for size in row] for row in rows]
        newlines = [sum(mini.shape_of(size, family)[0] for size in row) for row in rows]
        assert report.visual_tokens == pytest.approx(sum(map(sum, patches)) / len(rows))
        assert report.separators == pytest.approx(sum(newlines) / len(rows))
        assert f"newline tokens {report.separators:g}, all kept" in str(report)
        if not drops:
            assert report.kv_tokens == pytest.approx(report.asked, abs=0.5)
            continue
        kept = (alive[len(alive) - 1] & (inputs["input_ids"] == mini.IMAGE)).sum(1)
        kept -= torch.tensor(newlines)
        assert report.final_tokens == pytest.approx(kept.double().mean().item())
        assert sum(len(k) for k in report.kept) == kept.sum()
        if inside(method):
            most = chosen.budget(mini.PATCHES, (mini.GRID, mini.GRID))
            crops = [sum(1 + math.prod(mini.grid_of(size)) for size in row) for row in rows]
            assert report.asked is None
            assert all(k <= c * most for k, c in zip(kept.tolist(), crops, strict=True))
            continue
        want_kept = [sum(chosen.budget(n) for n in row) for row in patches]
        assert kept.tolist() == want_kept
        assert report.asked == pytest.approx(report.final_tokens)
        if chosen.stages == {"features"}:  # each image on its own
            flat = [n for row in patches for n in row]
            assert [len(k) for k in report.kept] == [chosen.budget(n) for n in flat]


@pytest.mark.parametrize("method, family", cases(METHODS))
@torch.no_grad()
def test_keeping_all_is_stock(method: str, family: str) -> None:
    """Invariants 1 and 2."""
    model = mini.build(family)
    _, inputs = inputs_for("adjacent images", method, family)
    stock, steps, _ = logits_and_steps(model, inputs)
    before = snapshot(model)
    vtc.wrap(model, made(method, family, Fraction(1)))
    if not in_encoder(method):
        large = mini.prompt([[LARGE]], family)
        torch.testing.assert_close(
            model(**large).logits, mini.build(family)(**large).logits, atol=1e-5, rtol=1e-5
        )
        got, got_steps, _ = logits_and_steps(model, inputs)
        torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got_steps, steps, atol=1e-5, rtol=1e-5)
    vtc.unwrap(model)
    vtc.wrap(model, made(method, family))
    assert "get_image_features" in model.model.__dict__
    assert not torch.equal(logits_and_steps(model, inputs)[1], steps)
    vtc.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method, family", cases(METHODS))
@torch.no_grad()
def test_batch_mates_do_not_matter(method: str, family: str) -> None:
    """Invariant 6: a row alone, with mates, padded left or right."""
    model = mini.build(family)
    vtc.wrap(model, made(method, family))
    sizes = [possible(method, family, s) for s in (WIDE, LARGE, TALL, SLIVER)]
    rows = [sizes[:1], sizes[1:3], sizes[3:]]
    for pad in ("left", "right"):
        inputs = mini.prompt(rows, family, pad)
        together, image = model(**inputs).logits, 0
        for r, row in enumerate(rows):
            real = inputs["attention_mask"][r].bool()
            mine = slice(image, image + len(row))
            alone = model(
                input_ids=inputs["input_ids"][r : r + 1, real],
                attention_mask=inputs["attention_mask"][r : r + 1, real],
                pixel_values=inputs["pixel_values"][mine],
                image_sizes=inputs["image_sizes"][mine],
            ).logits
            image += len(row)
            torch.testing.assert_close(together[r][real], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method, family", cases([m for m in METHODS if not bypasses(m)]))
@torch.no_grad()
def test_beams(method: str, family: str) -> None:
    """Features encoded once and repeated for every beam; two images of a row stay in order."""
    model = mini.build(family)
    vtc.wrap(model, made(method, family))
    rows = [[possible(method, family, s) for s in row] for row in ([TINY, LARGE], [TALL])]
    inputs = mini.prompt(rows, family, pad="left", between=0)
    how = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 2}

    def beams() -> Any:
        return model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)

    got, want, _ = compare(model, beams)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-5, rtol=1e-5)
    # The first step of all beams is that of the row alone.
    greedy = model.generate(
        **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    first = got.scores[0].reshape(2, 2, -1)[:, 0]
    torch.testing.assert_close(first, greedy.log_softmax(-1), atol=1e-4, rtol=1e-4)


def adaptive() -> list:
    every = [(m, seeded(m, None, 0)) for m in sorted(vtc.methods())]
    found = [m for m, x in every if not x.has_budget and x.stages & CHOOSING]
    return [(m, f) for m in found for f in mini.FAMILIES if f == "next" or not needs_cls(m)]


@pytest.mark.parametrize("method, family", adaptive())
@torch.no_grad()
def test_adaptive_counts(method: str, family: str) -> None:
    """Methods that decide themselves how many tokens stay: dropped is masked, nothing is asked."""
    model = mini.build(family)
    inputs = mini.prompt([[TALL, TINY], [SLIVER]], family, pad="left", between=0)
    vtc.wrap(model, seeded(method, None, 0))
    (got, steps, _), (want, want_steps, _), alive = compare(
        model, lambda: logits_and_steps(model, inputs)
    )
    seen = inputs["attention_mask"].bool() & alive[len(alive) - 1]
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    report = model.vtc.report()
    assert report.asked is None and 0 < report.final_tokens <= report.visual_tokens


def adaptive_quick() -> list:
    return [
        pytest.param(m, f, marks=[] if f == "next" else pytest.mark.slow) for m, f in adaptive()
    ]


def alone(inputs: dict[str, torch.Tensor], rows: list[list]) -> list[dict[str, torch.Tensor]]:
    """Each row of a batch without its padding and mates."""
    out, image = [], 0
    for r, row in enumerate(rows):
        real, mine = inputs["attention_mask"][r].bool(), slice(image, image + len(row))
        one = {k: inputs[k][r : r + 1, real] for k in ("input_ids", "attention_mask")}
        out.append(one | {k: inputs[k][mine] for k in ("pixel_values", "image_sizes")})
        image += len(row)
    return out


def check_rows_alone(model: Any, family: str) -> None:
    """A row's logits with mates, padded left, are those that it has alone."""
    rows = [[TALL, TINY], [SLIVER]]
    inputs = mini.prompt(rows, family, pad="left", between=0)
    together = model(**inputs).logits
    for r, one in enumerate(alone(inputs, rows)):
        got = together[r][inputs["attention_mask"][r].bool()]
        torch.testing.assert_close(got, model(**one).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method, family", adaptive_quick())
@torch.no_grad()
def test_adaptive_counts_of_rows_alone(method: str, family: str) -> None:
    model = mini.build(family)
    check_rows_alone(vtc.wrap(model, seeded(method, None, 0)), family)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_routed_patches(family: str) -> None:
    """`mod` with given routers: batch mates do not matter, and keeping all is stock."""
    model = mini.build(family)
    width = locate(model).decoder.hidden
    g = torch.Generator().manual_seed(1)
    routers = {i: torch.randn(width, generator=g) for i in (0, 2, 3)}
    inputs = mini.prompt([[TALL, TINY], [SLIVER]], family, pad="left", between=0)
    stock = model(**inputs).logits
    with vtc.compressing(model, MoD(routers=routers, keep_ratio=1.0)):
        assert torch.equal(model(**inputs).logits, stock)
    vtc.wrap(model, MoD(routers=routers, keep_tokens=TOKENS))
    check_rows_alone(model, family)
    real = inputs["attention_mask"].bool()
    assert (model(**inputs).logits[real] - stock[real]).abs().max() > 1e-2
    counts = model.vtc.report().attended_per_layer
    assert [counts[i] for i in routers] == [TOKENS * 3 / 2] * 3  # three images in two rows


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_packed_bits_of_crops(family: str) -> None:
    """The prompt is stock, its cache is bits, and decoding reads what a stock cache of them
    holds."""
    model, method = mini.build(family), VidKV(window=8, group=8)
    rows = [[TALL, TINY], [SLIVER]]
    inputs = mini.prompt(rows, family, pad="left", between=0)
    step = {"input_ids": torch.tensor([[9], [8]])}
    mask = inputs["attention_mask"]
    step["attention_mask"] = torch.cat([mask, mask.new_ones(2, 1)], 1)

    plain = model(**inputs, use_cache=True)
    with vtc.compressing(model, method) as session:
        out = model(**inputs, use_cache=True)
        report, cache = session.report(), cache_left(out)
        torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-5)
        assert report.kv_bytes < 0.6 * report.kv_bytes_full
        assert report.final_tokens == report.visual_tokens
        columns, worst = torch.device("cpu"), 0.0
        for layer, stock in zip(cache.layers, cache_left(plain).layers, strict=True):
            assert (layer.counts >= 8).all()
            where = layer.columns(columns)
            there = ~layer.padded("filler", columns)
            for got, full in zip(layer.unpacked(), (stock.keys, stock.values), strict=True):
                for r in range(len(rows)):
                    worst = max(
                        worst,
                        float((full[r][:, where[r, there[r]]] - got[r][:, there[r]]).abs().max()),
                    )
                    full[r][:, where[r, there[r]]] = got[r][:, there[r]]
        assert worst > 1e-2, "nothing was packed: no teeth"
        got = model(**step, **giving(model, cache)).logits
    want = model(**step, **giving(model, cache_left(plain))).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method, family", cases([m for m in METHODS if bypasses(m)]))
@torch.no_grad()
def test_newlines_bypass_nothing(method: str, family: str) -> None:
    """Text and newlines take part in every layer, whatever patches bypass it."""
    model = mini.build(family)
    sizes = [TALL, LARGE]
    inputs = mini.prompt([sizes], family, between=0)
    vtc.wrap(model, made(method, family))
    _, _, lengths = logits_and_steps(model, inputs)
    model(**inputs)
    report = model.vtc.report()
    others = (inputs["input_ids"] != mini.IMAGE).sum() + report.separators
    assert lengths == [n + others for n in report.attended_per_layer]
    assert min(report.attended_per_layer) < report.visual_tokens


# ---- layouts -----------------------------------------------------------------------------------


def reference_layout(size: tuple[int, int]) -> list[tuple[int, int] | None]:
    """Flat rows of LLaVA-NeXT by hand: (crop, patch), or None for a newline."""
    g, (_, columns), (y, x) = mini.GRID, mini.grid_of(size), mini.canvas_of(size)
    rows: list[tuple[int, int] | None] = [(0, p) for p in range(g * g)]
    for r in range(y.start, y.stop):
        for c in range(x.start, x.stop):
            rows.append((1 + r // g * columns + c // g, r % g * g + c % g))
        rows.append(None)
    return rows


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_layout_is_that_of_the_model(size: tuple[int, int]) -> None:
    sites = locate(mini.build("next")).decoder.crops
    ((found, crops),) = sites.images({"image_sizes": torch.tensor([size])})
    layout = layout_of(sites, found, crops, {})
    want = reference_layout(size)
    assert layout.length == len(want) and not layout.resampled
    assert layout.crops == mini.grid_of(size) and layout.canvas == mini.shape_of(size)
    got: list[tuple[int, int] | None] = [None] * len(want)
    for row, crop, place in zip(*(t.tolist() for t in (layout.rows, layout.crop, layout.place))):
        got[row] = (crop, place)
    assert got == want
    # Regions: thumbnail and crops without padding, all patches once, in raster order.
    regions = layout.regions()
    assert sorted(torch.cat([r.patches for r in regions]).tolist()) == list(range(len(layout.rows)))
    for region in regions:
        assert math.prod(region.grid) == len(region.patches)
        place = layout.place[region.patches]
        assert (place.diff() > 0).all() and len(set(layout.crop[region.patches].tolist())) == 1
        y, x = place // mini.GRID, place % mini.GRID
        assert (y - y[0]).tolist() == [i // region.grid[1] for i in range(len(y))]
        assert (x - x[0]).tolist() == [i % region.grid[1] for i in range(len(x))]


@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_lifted_features_are_the_flat_ones(size: tuple[int, int], family: str) -> None:
    """On random features, resampled or not."""
    model = mini.build(family)
    sites = locate(model).decoder.crops
    crops = 1 + math.prod(mini.grid_of(size))
    layout = layout_of(sites, size, crops, {})
    assert layout.canvas == mini.shape_of(size, family)
    assert layout.resampled == (family == "onevision" and size == LARGE)
    x = torch.randn(crops, mini.PATCHES, 5, generator=torch.Generator().manual_seed(0))
    flat = sites.pack(x, size, torch.zeros(5), {}, True)
    torch.testing.assert_close(layout.lift(x.flatten(0, 1)[layout.source]), flat[layout.rows])
    assert not flat[[i for i in range(len(flat)) if i not in set(layout.rows.tolist())]].any()
    near = x[layout.crop, layout.place]
    assert layout.resampled or torch.equal(near, flat[layout.rows])


def test_crops_of_padding_alone_are_no_regions() -> None:
    model = mini.build("next")
    model.config.image_grid_pinpoints = [[3 * mini.SIZE, 3 * mini.SIZE]]
    layout = layout_of(locate(model).decoder.crops, (96, 20), 10, {})
    assert layout.crops == (3, 3) and layout.canvas == (12, 2)
    assert [r.grid for r in layout.regions()] == [(4, 4), (4, 2), (4, 2), (4, 2)]
    assert sorted(set(layout.crop.tolist())) == [0, 2, 5, 8]


def test_apportion() -> None:
    assert apportion(10, [16, 16, 8], [16, 16, 8]) == [4, 4, 2]
    assert apportion(5, [1, 1, 1], [9, 9, 9]) == [2, 2, 1]  # ties to the first
    assert apportion(2, [16, 4, 4, 4], [16, 4, 4, 4]) == [1, 1, 0, 0]  # 1.14 and .29 each
    assert apportion(9, [3.0, 1.0, 1.0], [4, 9, 9]) == [4, 3, 2]  # a cap gives to the others
    assert apportion(9, [1, 1], [2, 3]) == [2, 3]
    assert apportion(4, [0.0, 0.0], [3, 3]) == [2, 2]
    assert apportion(3, [1, 0], [1, 5]) == [1, 2]
    assert apportion(0, [1, 2], [3, 3]) == [0, 0]
    g = torch.Generator().manual_seed(0)
    for _ in range(200):
        n = int(torch.randint(1, 7, (), generator=g))
        caps = torch.randint(0, 30, (n,), generator=g).tolist()
        weights = [c * float(torch.rand((), generator=g)) for c in caps]
        total = int(torch.randint(0, 60, (), generator=g))
        got = apportion(total, weights, caps)
        assert sum(got) == min(total, sum(caps))
        assert all(0 <= k <= c for k, c in zip(got, caps, strict=True))


def test_split_packed() -> None:
    """Two adjacent images, one of one line; columns of text between and behind."""
    kinds = "tppppllnllntppppnt"  # thumbnail p, line l, newline n, text t
    visual = torch.tensor([[k != "t" for k in kinds]])
    separator = torch.tensor([[k == "n" for k in kinds]])
    images, image, position = split_packed(visual, separator, [10, 5], 4)
    assert images == [[8, 4]]
    shown = "".join("." if i < 0 else str(i) for i in image[0].tolist())
    assert shown == ".000000.00..1111.."
    assert position[0][image[0] >= 0].tolist() == [*range(8), *range(4)]
    for lengths in ([15], [9, 6], [10], [10, 5, 5], [10, 6]):
        if lengths == [10, 5, 5]:
            continue  # an image of another forward is not looked for
        with pytest.raises(vtc.UnsupportedError, match="not whole packed images"):
            split_packed(visual, separator, lengths, 4)


# ---- views -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class CropProbe(vtc.Method):
    """Notes what it is shown; keeps the whole thumbnail and the first patches of all else."""

    seen: list
    name = "probe"

    def captures(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,)

    def on_features(self, v):
        self.seen.append(v)
        k = v.budget(self)
        _ = v.projected, v.attention_received(-1), v.key(-1)
        if v.has_cls:
            _ = v.cls_attention(-1), v.cls_logits(-1)
        v.scratch["index"] = v.index
        if k >= v.count:
            return None
        return Reduction.from_keep(torch.arange(k).expand(len(v.features), -1), v.count)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_views_show_each_crop(family: str) -> None:
    """Everything a view offers, against the stock model and its attention maps."""
    stock, eager = mini.build(family), mini.build(family, "eager")
    sizes = [TALL, LARGE]
    inputs = mini.prompt([sizes], family)
    images = {k: inputs[k] for k in ("pixel_values", "image_sizes")}
    given: list = []
    hook = stock.model.multi_modal_projector.register_forward_pre_hook(
        lambda m, args: given.append(args[0])
    )
    flat = stock.get_image_features(**images).pooler_output
    hook.remove()
    (features,) = given
    pixels = [p[: 1 + math.prod(mini.grid_of(s))] for p, s in zip(images["pixel_values"], sizes)]
    prefix = 1 if family == "next" else 0
    maps = eager.model.vision_tower(torch.cat(pixels), output_attentions=True).attentions[-1]
    received = maps.mean(1).mean(1)[:, prefix:]

    model = mini.build(family)
    seen: list = []
    vtc.wrap(model, CropProbe(seen=seen, keep_ratio=0.5))
    model(**inputs)
    sites, start = locate(stock).decoder.crops, 0
    wanted = []  # (grid, features, projected, received, cls) of each region
    for i, size in enumerate(sizes):
        layout = layout_of(sites, size, 1 + math.prod(mini.grid_of(size)), {})
        source = layout.source + start * mini.PATCHES
        start += 1 + math.prod(mini.grid_of(size))

        def lifted(x, layout=layout, source=source):
            return layout.lift(x.flatten(0, 1)[source])

        for region in layout.regions():
            p = region.patches
            cls = lifted(maps[:, :, 0, prefix:].transpose(1, 2))[p].T if prefix else None
            wanted.append(
                (
                    region.grid,
                    lifted(features)[p],
                    flat[i][layout.rows][p],
                    lifted(received)[p],
                    cls,
                )
            )
    shown = [(v, b) for v in seen for b in range(len(v.features))]
    assert len(shown) == len(wanted) and len(seen) < len(wanted)  # equal ones come together
    for v, b in shown:
        assert v.total == math.prod(v.grid) == v.count and v.crops is None
        assert v.index[b].tolist() == list(range(v.count))
        match = [
            w for w in wanted if w[0] == v.grid and torch.allclose(w[1], v.features[b], 1e-4, 1e-5)
        ]
        assert len(match) == 1
        _, _, projected, attention, cls = match[0]
        torch.testing.assert_close(v.projected[b], projected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(v.attention_received(-1)[b], attention, atol=1e-5, rtol=1e-4)
        assert v.key(-1).shape[:2] == (len(v.features), v.count)
        if cls is not None:
            torch.testing.assert_close(v.cls_attention(-1)[b], cls, atol=1e-5, rtol=1e-4)
            difference = (v.cls_logits(-1)[b].softmax(-1) - cls / cls.sum(-1, keepdim=True)).abs()
            assert difference.max() < 1e-5
    # The image's budget is shared out by patches, and met.
    kept = [len(k) for k in model.vtc.report().kept]
    assert kept == [round(0.5 * mini.patches_of(size, family)) for size in sizes]


@torch.no_grad()
def test_fastervlm_as_a_loop() -> None:
    """Top k of [CLS] attention in every crop, of its patches that are not padding."""
    model = mini.build("next")
    inputs = mini.prompt([[WIDE, TALL]])
    vtc.wrap(model, "fastervlm", keep_tokens=TOKENS)
    model(**inputs)
    report = model.vtc.report()
    vtc.unwrap(model)
    tower = mini.build("next", "eager").model.vision_tower
    for i, size in enumerate((WIDE, TALL)):
        rows = reference_layout(size)
        crops = 1 + math.prod(mini.grid_of(size))
        maps = tower(inputs["pixel_values"][i, :crops], output_attentions=True).attentions[-1]
        scores = maps[:, :, 0, 1:].mean(1)
        patches = [row for row in rows if row is not None]
        sizes = [sum(crop == c for crop, _ in patches) for c in range(crops)]
        exact = [n * TOKENS / len(patches) for n in sizes]
        shares = [int(e) for e in exact]
        for c in sorted(range(crops), key=lambda c: shares[c] - exact[c])[: TOKENS - sum(shares)]:
            shares[c] += 1
        kept = []
        for c in range(crops):
            mine = [p for p, (crop, _) in enumerate(patches) if crop == c]
            mine.sort(key=lambda p: -float(scores[patches[p]]))
            kept += mine[: shares[c]]
        assert report.kept[i].tolist() == sorted(kept)


@torch.no_grad()
def test_fewer_tokens_than_crops() -> None:
    """Crops whose share is nothing keep nothing; the best of the others stay."""
    model, inputs = mini.build("next"), mini.prompt([[WIDE]])
    vtc.wrap(model, "fastervlm", keep_tokens=3)
    model(**inputs)
    report = model.vtc.report()
    (layout,) = report.layouts
    (kept,) = report.kept
    weights = [len(region.patches) for region in layout.regions()]
    shares = apportion(3, weights, weights)
    assert sorted(shares) == [0, 0, 1, 1, 1]
    scores, want = report.scores(0), []
    for region, share in zip(layout.regions(), shares, strict=True):
        best = scores[region.patches].nan_to_num(-torch.inf).argmax()
        want += [int(region.patches[best])] * share
    assert kept.tolist() == sorted(want)


@torch.no_grad()
def test_crops_that_keep_different_numbers_inside_the_encoder() -> None:
    """MustDrop merges what is alike: as many patches as the model sees are those it reports."""
    rows = [[TALL, TINY], [SLIVER]]
    model = mini.build("next")
    vtc.wrap(model, "mustdrop", keep_ratio=0.5, merge_threshold=0.2)
    inputs = mini.prompt(rows, pad="left", between=0)
    got, want, alive = compare(model, lambda: model(**inputs).logits)
    seen = inputs["attention_mask"].bool() & alive[len(alive) - 1]
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
    model(**inputs)
    report, reduction, first = model.vtc.report(), model.vtc.vision.state.reduction, 0
    assert len(reduction.valid.sum(1).unique()) > 1, "no teeth"
    for i, layout in enumerate(report.layouts):
        for p in range(len(layout.rows)):
            row = first + int(layout.crop[p])
            there = reduction.keep[row][reduction.valid[row]]
            before_llm = report.stage(i, "encoder block 0").kept[p]
            assert before_llm == bool((there == layout.place[p]).any())
        first += 1 + math.prod(layout.crops)


@dataclass(frozen=True, kw_only=True)
class FoldAll(vtc.Method):
    """Folds all patches of a view into the first."""

    own: bool = False
    name = "fold-all"
    merges = True

    def on_features(self, v):
        merged = Reduction.from_merge(torch.zeros_like(v.index), 1)
        return (merged, v.features[:, :1] * 2) if self.own else merged


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_merged_features_are_projected(family: str) -> None:
    """The mean of a region's features, projected; of flat rows where a canvas is resampled."""
    model = mini.build(family)
    images = {
        k: v for k, v in mini.prompt([[WIDE, LARGE]], family).items() if k[:2] in ("pi", "im")
    }
    seen: list = []
    hook = model.model.multi_modal_projector.register_forward_pre_hook(
        lambda m, args: seen.append(args[0])
    )
    stock = [f.clone() for f in model.get_image_features(**images).pooler_output]
    hook.remove()
    features, project = seen[0], model.model.multi_modal_projector
    for own in (False, True):
        with vtc.compressing(model, FoldAll(own=own)):
            flat = model.get_image_features(**images).pooler_output
        start = 0
        for i, size in enumerate((WIDE, LARGE)):
            crops = 1 + math.prod(mini.grid_of(size))
            layout = layout_of(locate(model).decoder.crops, size, crops, {})
            mine = features[start : start + crops]
            start += crops
            left = flat[i][layout.rows]
            alive = (~left[:, 0].isnan()).nonzero()[:, 0].tolist()
            regions = layout.regions()
            assert alive == sorted(int(r.patches[0]) for r in regions)
            lifted = layout.lift(mine.flatten(0, 1)[layout.source])
            for region in regions:
                if own:
                    want = project(lifted[region.patches[:1]] * 2)[0]
                elif region.blended:
                    want = stock[i][layout.rows][region.patches].mean(0)
                else:
                    want = project(lifted[region.patches].mean(0, keepdim=True))[0]
                got = left[int(region.patches[0])]
                torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)
            newlines = [r for r in range(layout.length) if r not in set(layout.rows.tolist())]
            torch.testing.assert_close(flat[i][newlines], stock[i][newlines])


@dataclass(frozen=True, kw_only=True)
class Notes(vtc.Method):
    """Notes the order of patches in the encoder, and reads it in the LLM."""

    seen: list
    joint: ClassVar[bool] = True
    name = "notes"

    def on_features(self, v):
        v.scratch["order"] = v.index.float()
        return Reduction.from_scores(-((v.index * 7) % 11).float(), v.budget(self))

    def decoder_layers(self, depth):
        return (0,)

    def on_decoder_layer(self, v):
        self.seen.append(v)
        return None


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_notes_reach_the_patches_they_were_taken_of(family: str) -> None:
    """Adjacent images, rows of different lengths; separators are neither visual nor text."""
    model, seen = mini.build(family), []
    vtc.wrap(model, Notes(seen=seen, keep_ratio=0.4))
    rows = [[TALL, LARGE], [SLIVER]]
    inputs = mini.prompt(rows, family, pad="left", between=0)
    model(**inputs)
    (v,) = seen
    assert torch.equal(v.scratch["order"][v.valid], v.position[v.valid].float())
    assert v.images == [[mini.patches_of(s, family) for s in row] for row in rows]
    assert v.image[0][v.valid[0]].unique().tolist() == [0, 1]
    assert not (v.separator & (v.visual | v.text)).any()
    words = inputs["attention_mask"].sum(1) - (inputs["input_ids"] == mini.IMAGE).sum(1)
    assert v.text.sum(1).tolist() == words.tolist()
    lines = [sum(mini.shape_of(s, family)[0] for s in row) for row in rows]
    assert v.separator.sum(1).tolist() == lines
    assert v.prompt.sum(1).tolist() == [5, 5]


@torch.no_grad()
def test_last_row_may_be_a_newline() -> None:
    model, seen = mini.build("next"), []
    vtc.wrap(model, Notes(seen=seen, keep_ratio=0.4))
    model(**mini.prompt([[TINY]], after=0))
    (v,) = seen
    assert v.last_row.tolist() == [v.hidden.shape[1] - 1] and v.separator[0, -1]


@dataclass(frozen=True, kw_only=True)
class Uneven(vtc.Method):
    """Keeps another number of patches of each image: those whose first feature is not low."""

    name = "uneven"

    def on_features(self, v):
        v.scratch["first"] = v.features[..., 0]
        return Reduction.from_mask(v.features[..., 0] > -4)


@pytest.mark.parametrize("second", ["fastervlm", "divprune", "visionzip"])
@torch.no_grad()
def test_single_views_stay_rectangular(second: str) -> None:
    """LLaVA-1.5 behind a method that leaves images with different numbers of tokens."""
    model = mini_llava.build("clip")
    inputs = mini_llava.prompt([2, 1], pad="left", seed=3)
    follow = vtc.methods()[second](keep_tokens=5)
    vtc.wrap(model, vtc.chain(Uneven(), follow))
    (got, want, alive) = compare(model, lambda: model(**inputs).logits)
    real = inputs["attention_mask"].bool() & alive[len(alive) - 1]
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    kept = [k.tolist() for k in model.vtc.report().kept]
    assert [len(k) for k in kept] == [5, 5, 5]
    for i in range(3):
        one = mini_llava.prompt(1, batch=1)
        model(**{**one, "pixel_values": inputs["pixel_values"][i : i + 1]})
        assert model.vtc.report().kept[0].tolist() == kept[i]


def asking(rows: torch.Tensor) -> CDPruner:
    return CDPruner(keep_tokens=TOKENS, text=TextQuery(rows, lambda x: x[..., :8]))


@pytest.mark.parametrize("rows", [[[WIDE, SQUARE], [TINY, SQUARE]], [[SQUARE], [SLIVER]]])
@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_each_image_has_its_own_question(rows: list, family: str) -> None:
    """Crops of several images come in one view; each is compared with the text of its image."""
    model, sizes = mini.build(family), [size for row in rows for size in row]
    inputs = mini.prompt(rows, family, pad="left")
    texts = torch.randn(len(sizes), 8, generator=torch.Generator().manual_seed(9))

    def kept(text: torch.Tensor, call: dict[str, torch.Tensor]) -> list:
        with vtc.compressing(model, asking(text)) as session:
            model(**call)
            return [k.tolist() for k in session.report().kept]

    def alone(i: int, text: torch.Tensor) -> list:
        crops = 1 + math.prod(mini.grid_of(sizes[i]))
        one = mini.prompt([[sizes[i]]], family)
        return kept(text, {**one, "pixel_values": inputs["pixel_values"][i : i + 1, :crops]})

    together = kept(texts, inputs)
    for i in range(len(sizes)):
        assert [together[i]] == alone(i, texts[i : i + 1])
    assert any([together[i]] != alone(i, texts[i - 1 : i]) for i in range(1, len(sizes)))
    # Neither one text nor as many as images, even if there were as many crops.
    for wrong in (torch.randn(len(sizes) + 1, 8), torch.randn(5 * len(sizes), 8)):
        with pytest.raises(ValueError, match=f"there are {len(sizes)} images"):
            kept(wrong, inputs)


@torch.no_grad()
def test_each_image_has_its_own_question_where_counts_differ() -> None:
    model = mini_llava.build("clip")
    inputs = mini_llava.prompt([2, 1], pad="left", seed=3)
    texts = torch.randn(3, 8, generator=torch.Generator().manual_seed(9))
    with vtc.compressing(model, vtc.chain(Uneven(), asking(texts))) as session:
        model(**inputs)
        together = [k.tolist() for k in session.report().kept]
    for i in range(3):
        one = mini_llava.prompt(1, batch=1)
        with vtc.compressing(model, vtc.chain(Uneven(), asking(texts[i : i + 1]))) as session:
            model(**{**one, "pixel_values": inputs["pixel_values"][i : i + 1]})
            assert session.report().kept[0].tolist() == together[i]


# ---- around the model --------------------------------------------------------------------------


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_second_turns(family: str) -> None:
    """Text, then another image, behind a compressed first turn."""
    model = mini.build(family)
    first = mini.prompt([[WIDE]], family)
    vtc.wrap(model, "divprune", keep_tokens=TOKENS)

    def turns() -> torch.Tensor:
        cache = cache_left(model(**first, use_cache=True))
        return model(input_ids=torch.tensor([[9, 8, 7]]), **giving(model, cache)).logits

    got, want, _ = compare(model, turns)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)

    cache = cache_left(model(**first, use_cache=True))
    second = mini.prompt([[TALL, TINY]], family, seed=1)
    del second["attention_mask"]
    model(**second, **giving(model, cache))
    assert model.vtc.report().final_tokens == 2 * TOKENS
    lengths = [layer.keys.shape[2] for layer in cache.layers]
    newlines = sum(mini.shape_of(s, family)[0] for s in (WIDE, TALL, TINY))
    assert lengths == [3 * TOKENS + newlines + (3 + 5) + (3 + 2 + 5)] * len(lengths)


@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize("method", ["divprune", "pool"])
@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}],
    ids=["greedy", "beams", "static-cache", "chunked-prefill"],
)
@torch.no_grad()
def test_compress_inputs(family: str, method: str, how: dict) -> None:
    model = mini.build(family)
    inputs = mini.prompt([[WIDE, LARGE], [TINY]], family, pad="left")

    def generate(inputs: dict, **how: Any) -> tuple[torch.Tensor, torch.Tensor]:
        how = {"max_new_tokens": 5, "do_sample": False, **how}
        out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        return out.sequences[:, -5:], torch.stack(out.logits, 1)

    with vtc.compressing(model, method, keep_ratio=0.3):
        want, want_logits = generate(inputs, **(how if "num_beams" in how else {}))
    short = vtc.compress_inputs(model, inputs, method, keep_ratio=0.3)
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    assert "image_sizes" not in short and "get_image_features" not in model.model.__dict__
    got, got_logits = generate(short, **how)
    assert torch.equal(got, want)
    torch.testing.assert_close(got_logits, want_logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_images_without_crops() -> None:
    """OneVision encodes images beside others in one sample as thumbnails alone."""
    model = mini.build("onevision")
    n = mini.PATCHES + 1
    g = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.tensor([[7, *[mini.IMAGE] * n, *[mini.IMAGE] * n, 8, 9]]),
        "pixel_values": torch.randn(2, 1, 3, mini.SIZE, mini.SIZE, generator=g),
        "image_sizes": torch.tensor([WIDE, TALL]),
        "batch_num_images": torch.tensor([2]),
    }
    vtc.wrap(model, "divprune", keep_tokens=5)
    got, want, alive = compare(model, lambda: model(**inputs).logits)
    torch.testing.assert_close(got[alive[0]], want[alive[0]], atol=1e-5, rtol=1e-5)
    report = model.vtc.report()
    assert report.visual_tokens == 2 * mini.PATCHES and report.final_tokens == 10
    assert report.separators == 2 and [x.crops for x in report.layouts] == [(0, 0)] * 2


@torch.no_grad()
def test_flops_count_crops() -> None:
    """Of encoder and projector: five crops cost five times as much as one image."""
    model = mini.build("next")
    with vtc.observe(model) as session:
        model(**mini.prompt([[WIDE]]))
        report = session.report()
    single = mini_llava.build("clip")
    n = mini.patches_of(WIDE)
    with vtc.observe(single) as session:
        single(**mini_llava.prompt(1, batch=1))
        one = session.report()
    assert report.visual_tokens == report.final_tokens == n and report.asked == n
    assert report.flops == pytest.approx(report.flops_full)
    assert report.flops_all == pytest.approx(report.flops_all_full)
    from vtc.report.flops import decoder_flops

    llm = locate(model).decoder

    def decoder(tokens: int) -> float:
        return (
            decoder_flops(
                [tokens] * 5, llm.hidden, llm.mlp_width, llm.heads, llm.kv_heads, llm.head_dim
            )
            + llm.hidden * llm.vocab
        )

    encoder = one.flops_all - decoder(mini.PATCHES + 8)
    words = 8 + mini.shape_of(WIDE)[0]
    assert report.flops_all == pytest.approx(decoder(n + words) + 5 * encoder)
    assert "layouts" not in report.to_dict()


# ---- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in METHODS if inside(m)])
def test_budgets_inside_the_encoder_are_ratios(method: str) -> None:
    with pytest.raises(vtc.UnsupportedError, match="give keep_ratio instead of keep_tokens"):
        vtc.wrap(mini.build("next"), seeded(method, 8, 0))


@pytest.mark.parametrize("method", [m for m in METHODS if in_encoder(m) and not needs_cls(m)])
@torch.no_grad()
def test_no_blends_of_removed_tokens(method: str) -> None:
    model = mini.build("onevision")
    vtc.wrap(model, made(method))
    ran: list = []
    hook = model.model.vision_tower.register_forward_hook(lambda *a: ran.append(a))
    inputs = mini.prompt([[LARGE]], "onevision")
    with pytest.raises(vtc.UnsupportedError, match="too many for this model"):
        model(**inputs)
    with pytest.raises(vtc.UnsupportedError, match="too many for this model"):
        model.generate(**inputs, max_new_tokens=2)
    assert not ran
    hook.remove()


@pytest.mark.parametrize("method", [m for m in METHODS if needs_cls(m)])
def test_needs_a_class_token(method: str) -> None:
    with pytest.raises(vtc.UnsupportedError, match=r"\[CLS\]"):
        vtc.wrap(mini.build("onevision"), made(method))


@pytest.mark.parametrize("method", ["divprune", "fastv"])
@torch.no_grad()
def test_other_refusals(method: str) -> None:
    model = mini.build("onevision")
    vtc.wrap(model, method, keep_tokens=TOKENS)
    inputs = mini.prompt([[WIDE]], "onevision")
    with pytest.raises(vtc.UnsupportedError, match="not whole packed images"):
        model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=16)
    with pytest.raises(ValueError, match="image_sizes"):
        model(**{k: v for k, v in inputs.items() if k != "image_sizes"})
    # Text alone, and placeholders that got no image, are left alone.
    stock = mini.build("onevision")
    for ids in (torch.tensor([[7, 8, 9]]), torch.tensor([[7, mini.IMAGE, 9]])):
        assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
