# SPDX-License-Identifier: Apache-2.0
"""Families whose LLM tokens are joined patches, and PaliGemma: the six invariants."""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any

import pytest
import torch
from invariants import dropped_is_masked
from snapshot import snapshot
from transformers.cache_utils import DynamicCache

import vtc
from vtc.adapters.base import GridSites
from vtc.adapters.locate import locate
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support import mini_families as mini
from vtc.benchmarks.support.mini_families import FAMILIES
from vtc.engine.llm.prompt import split_lengths
from vtc.engine.vision.grids import GridEngine, groups
from vtc.transformers_contract import cache_left, giving

TOKENS, STEPS = 6, 4
CHOOSING = {"pixels", "vision", "features", "decoder"}
TYPICAL = ("divprune", "visionzip", "mustdrop", "fastv", "sparsevlm", "prefixkv", "tome")
"""One for each way of acting: selects, merges and reads encoder attention, takes notes to the LLM,
selects in the LLM, merges there, evicts KV, merges in the encoder."""


# ---- which method on which family --------------------------------------------------------------


@functools.cache
def build(family: str, attention: str = "sdpa") -> Any:
    """One model for all tests: that `unwrap` gives it back as it was is tested below."""
    return mini.build(family, attention)


@functools.cache
def plain(method: str) -> vtc.Method:
    try:
        return seeded(method, TOKENS, 0)
    except ValueError:  # takes no budget
        return seeded(method, None, 0)


def made(method: str, family: str, keep: Fraction | None = None) -> vtc.Method:
    """The method with a budget, and with its substitutes for what the family lacks."""
    known, chosen = FAMILIES[family], plain(method)
    if chosen.has_budget and (keep or method == "downsample"):
        chosen = seeded(method, keep or Fraction(1, 2), 0)
    if not known.has_cls:
        chosen = replace(chosen, **chosen.without_cls)
    return replace(chosen, **chosen.outside_encoder) if known.joins else chosen


def refused(method: str, family: str) -> str | None:
    """Name that the reason gives where a method cannot run at all."""
    chosen = made(method, family)
    if method == "mod":
        return "routers"
    if "frames" in chosen.needs:
        return "frames of a video"
    if "cls" in chosen.needs and not FAMILIES[family].has_cls:
        return r"\[CLS\]"
    if FAMILIES[family].joins and chosen.stages & {"pixels", "vision"}:
        return "encoder"
    return None


def cases(methods: Any) -> list:
    return [(m, f) for f in FAMILIES for m in methods if refused(m, f) is None]


def rows_of(family: str) -> list[list[Any]]:
    a, b, c = FAMILIES[family].sizes
    return [[a, b], [c]]


def units(family: str, row: list[Any]) -> list[int]:
    """Visual tokens of each budget unit of a row."""
    return [prod(grid) for size in row for grid in FAMILIES[family].count(size)]


def logits_and_steps(model: Any, inputs: dict, wide: bool = True) -> tuple[Any, Any, list[int]]:
    """Prefill logits, greedy step logits, KV length of each layer; no sliding cache if wide."""

    def cache() -> dict[str, Any]:
        return giving(model, DynamicCache()) if wide else {}

    prefill = model(**inputs, use_cache=True, **cache())
    lengths = [layer.keys.shape[2] for layer in cache_left(prefill).layers]
    how = {"max_new_tokens": STEPS, "do_sample": False, **cache()}
    out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
    steps = torch.stack(out.logits, 1)
    if "vtc" not in model.__dict__ or model.vtc.decoder.handles:
        torch.testing.assert_close(steps[:, 0], prefill.logits[:, -1], atol=1e-5, rtol=1e-5)
    return prefill.logits, steps, lengths


def close(got: Any, want: Any, **how: Any) -> None:
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5, **how)


# ---- invariants --------------------------------------------------------------------------------


@pytest.mark.parametrize("method, family", cases(TYPICAL))
@torch.no_grad()
def test_dropped_is_masked(method: str, family: str) -> None:
    """Invariants 3 and 4: several images, rows of different lengths, SDPA or eager."""
    eager = (list(TYPICAL).index(method) + list(FAMILIES).index(family)) % 2
    model = build(family, "eager" if eager else "sdpa")
    inputs = mini.prompt(family, rows_of(family), pad="left")
    stock = logits_and_steps(model, inputs)
    assert stock[1] is not None
    chosen = made(method, family)
    drops = bool(chosen.stages & CHOOSING)
    with vtc.compressing(model, chosen):
        dropped_is_masked(model, logits_and_steps, inputs, stock, drops, f"{method}, {family}")


@pytest.mark.parametrize("method, family", cases(sorted(vtc.methods())))
@torch.no_grad()
def test_counts_and_batch_mates(method: str, family: str) -> None:
    """Invariants 5 and 6: asked == kept == reported; mates and padding side do not matter."""
    model, rows, chosen = build(family), rows_of(family), made(method, family)
    pad = "right" if len(method) % 2 else "left"
    inputs = mini.prompt(family, rows, pad=pad)
    with vtc.compressing(model, chosen) as session:
        together = model(**inputs).logits
        report = session.report()
        for r in range(len(rows)):
            alone = model(**mini.row_of(family, inputs, rows, r)).logits[0]
            close(together[r][inputs["attention_mask"][r].bool()], alone)
    full = [units(family, row) for row in rows]
    assert report.visual_tokens == sum(map(sum, full)) / len(rows)
    if chosen.stages <= {"cache", "bypass"}:
        if chosen.has_budget and "cache" in chosen.stages:
            if family == "Gemma 3":  # some have left the window
                assert 0 < report.kv_tokens < report.asked
            else:
                assert report.kv_tokens == pytest.approx(report.asked, abs=0.5)
        return
    kept = [len(k) for k in report.kept]
    assert sum(kept) / len(rows) == pytest.approx(report.final_tokens)
    if not chosen.has_budget:
        return
    per_row = [sum(kept[: len(full[0])]), sum(kept[len(full[0]) :])]
    grid = (4, 4) if method == "downsample" else None
    assert per_row == [sum(chosen.budget(n, grid) for n in row) for row in full]
    assert report.asked == pytest.approx(report.final_tokens)
    if chosen.stages <= {"features", "vision", "pixels"}:  # each image on its own
        assert kept == [chosen.budget(n, grid) for row in full for n in row]


@pytest.mark.parametrize("method, family", cases(TYPICAL))
@torch.no_grad()
def test_keeping_all_is_stock(method: str, family: str) -> None:
    """Invariants 1 and 2, with the model's own cache."""
    model = build(family)
    inputs = mini.prompt(family, rows_of(family), pad="left")
    stock, steps, _ = logits_and_steps(model, inputs, wide=False)
    before = snapshot(model)
    vtc.wrap(model, made(method, family, Fraction(1)))
    got, got_steps, _ = logits_and_steps(model, inputs, wide=False)
    close(got, stock)
    close(got_steps, steps)
    vtc.unwrap(model)
    vtc.wrap(model, made(method, family))
    assert not torch.equal(logits_and_steps(model, inputs, wide=False)[1], steps)
    vtc.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method, family", cases(("divprune", "mustdrop", "fastv")))
@torch.no_grad()
def test_beams(method: str, family: str) -> None:
    """Features encoded once and repeated for every beam; images of a row stay in order."""
    model = build(family)
    inputs = mini.prompt(family, rows_of(family), pad="left", between=2)
    how = {"max_new_tokens": 3, "do_sample": False}
    with vtc.compressing(model, made(method, family)):
        beams = model.generate(
            **inputs, **how, num_beams=2, output_scores=True, return_dict_in_generate=True
        )
        first = model(**inputs).logits[:, -1].log_softmax(-1)
    got = beams.scores[0].reshape(2, 2, -1)[:, 0]
    torch.testing.assert_close(got, first, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_compressed_inputs(family: str) -> None:
    """`compress_inputs` on the stock model answers like the wrapped one."""
    model = build(family)
    inputs = mini.prompt(family, rows_of(family), pad="left")
    if family == "Gemma 3":
        with pytest.raises(vtc.UnsupportedError, match=r"window of 20.*use vtc\.wrap"):
            vtc.compress_inputs(model, inputs, made("divprune", family))
        return
    how = {"max_new_tokens": STEPS, "do_sample": False, "output_logits": True}
    with vtc.compressing(model, made("divprune", family)):
        want = model.generate(**inputs, **how, return_dict_in_generate=True)
    short = vtc.compress_inputs(model, inputs, made("divprune", family))
    assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    got = model.generate(**short, **how, return_dict_in_generate=True)
    close(torch.stack(got.logits), torch.stack(want.logits))


# ---- what cannot be ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method, family",
    [
        (m, f)
        for f in FAMILIES
        for m in sorted(vtc.methods())
        if refused(m, f) not in (None, "routers")
    ],
)
def test_refusals_say_why_and_what_works(method: str, family: str) -> None:
    model = build(family)
    with pytest.raises(vtc.UnsupportedError, match=refused(method, family)) as error:
        vtc.wrap(model, made(method, family))
    assert "vtc" not in model.__dict__
    assert "divprune" in str(error.value) and method + "," not in str(error.value)


@pytest.mark.parametrize("family", [f for f in FAMILIES if FAMILIES[f].joins])
def test_mustdrop_names_its_way_around_the_encoder(family: str) -> None:
    chosen = replace(made("mustdrop", family), merge_threshold=0.8)
    with pytest.raises(vtc.UnsupportedError, match="give it merge_threshold=None"):
        vtc.wrap(build(family), chosen)


# ---- what methods are shown --------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class GridProbe(vtc.Method):
    """Notes what it is shown and keeps all."""

    seen: list
    name = "probe"

    def captures(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,)

    def on_features(self, v: Any) -> None:
        known = {"received": v.attention_received(-1), "key": v.key(-1), "projected": v.projected}
        if v.has_cls:
            known["cls"] = v.cls_attention(-1)
        self.seen.append((v, known))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_views_hold_what_the_encoder_saw(family: str) -> None:
    """Attention and keys of eager maps of the last block, folded by hand; projected rows."""
    model, known = build(family, "eager"), FAMILIES[family]
    rows = rows_of(family)
    inputs = mini.prompt(family, rows, pad="left")
    sites = locate(model)
    block, maps, keys = sites.vision.blocks[sites.decoder.feature_block], [], []

    def note(module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        maps.append(output[1])
        keys.append(block.key((args, kwargs), slice(None)).transpose(1, 2))  # (B, T, H, d)

    handle = block.attn.register_forward_hook(note, with_kwargs=True)
    method = GridProbe(seen=[])
    names = ("pixel_values", "pixel_attention_mask", "image_sizes")
    images = {k: inputs[k] for k in names if k in inputs}
    features = model.get_image_features(**images).pooler_output
    features = torch.cat(list(features)).reshape(-1, features[0].shape[-1])
    try:
        with vtc.compressing(model, method):
            model.get_image_features(**images)
    finally:
        handle.remove()
    attention = maps[-1].float()  # (B, H, T, T)
    grids = [grid for row in rows for size in row for grid in known.count(size)]
    fold = 1 if sites.decoder.grids is None else sites.decoder.grids.fold
    shown = {}
    for v, seen in method.seen:
        indices = range(len(v.features)) if v.image is None else v.image.tolist()
        for b, image in enumerate(indices):
            assert image not in shown and v.grid == grids[image] and v.total == prod(v.grid)
            assert v.index[b].tolist() == list(range(v.total))
            shown[image] = {name: x[b] for name, x in seen.items()}
    assert sorted(shown) == list(range(len(grids)))
    start = token = 0
    for i, (r, c) in enumerate(grids):
        n = r * c * fold * fold
        if len(attention) == 1:  # one sequence of all images
            mine = attention[0, :, start : start + n, start : start + n]
            key = keys[-1][0, start : start + n]
            start += n
        else:
            mine, key = attention[i], keys[-1][i, sites.vision.prefix :]

        def folded(x: torch.Tensor, r: int = r, c: int = c) -> torch.Tensor:
            return x.reshape(-1, r, fold, c, fold).sum((2, 4)).reshape(-1, r * c)

        prefix = sites.vision.prefix
        want = folded(mine.mean((0, 1))[prefix:])[0]
        close(shown[i]["received"], want, msg=f"image {i}")
        assert shown[i]["received"].std() > 1e-4, "uniform: no teeth"
        if known.has_cls:
            close(shown[i]["cls"], folded(mine[:, 0, prefix:]))
        flat = key.flatten(1).T  # (H d, patches)
        close(shown[i]["key"], folded(flat).T.reshape(r * c, *key.shape[1:]) / fold**2)
        close(shown[i]["projected"], features[token : token + r * c])
        token += r * c


def test_groups() -> None:
    assert groups((2, 5), 2, False).tolist() == [
        [0, 1, 5, 6],
        [2, 3, 7, 8],
    ]  # a column is left over
    assert groups((2, 4), 2, True).tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert groups((1, 2), 1, False).tolist() == [[0], [1]]


def test_patches_in_the_order_of_windows() -> None:
    """Groups behind one another, sorted by windows within their grid, in a flat sequence."""
    shapes = [(2, 4), (4, 2)]
    order = torch.tensor([4, 5, 6, 7, 0, 1, 2, 3, *range(8, 16)])
    sites = GridSites(
        images=lambda call: [[shape] for shape in shapes],
        source=torch.nn.Identity(),
        project=lambda x: x,
        fold=2,
        grouped=True,
        packed=True,
    )
    engine = GridEngine.__new__(GridEngine)
    engine.grids = sites
    layouts = engine._layouts({})
    assert [layout.grids for layout in layouts] == [((1, 2),), ((2, 1),)]
    x = torch.arange(16.0).reshape(1, 16, 1)  # as the encoder has sorted it
    lift = engine._lift(layouts, order, torch.device("cpu"))
    assert lift(x, "mean")[:, 0].tolist() == [5.5, 1.5, 9.5, 13.5]
    assert lift(x, "sum")[:, 0].tolist() == [22, 6, 38, 54]


@torch.no_grad()
def test_grids_of_an_image_share_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tiles as one image: as many tokens as its share, from each as much as it is large."""
    model = build("InternVL")
    sites = locate(model)
    both = replace(sites.decoder.grids, images=lambda call: [[(8, 8), (8, 8)]])
    decoder = replace(sites.decoder, grids=both, tokens_per_image=None)
    monkeypatch.setattr("vtc.session.locate", lambda model: replace(sites, decoder=decoder))
    inputs = mini.prompt("InternVL", [[2]])
    chosen = made("divprune", "InternVL")
    with vtc.compressing(model, replace(chosen, keep_tokens=9)) as session:
        model(**inputs)
        report = session.report()
    assert report.visual_tokens == 32 and report.asked == report.final_tokens == 9
    (kept,) = report.kept
    assert (kept < 16).sum() == 5 and (kept >= 16).sum() == 4


@torch.no_grad()
def test_images_without_their_sizes() -> None:
    """Mistral 3 needs them; for a LLaVA with Pixtral all images are as large as the batch."""
    model, inputs = mini.build("Mistral 3"), mini.prompt("Mistral 3", [[(64, 48)]])
    del inputs["image_sizes"]
    vtc.wrap(model, "divprune", keep_tokens=4)
    with pytest.raises(ValueError, match="needs image_sizes, as its processor gives them"):
        model(**inputs)
    model, inputs = mini.build("LLaVA, Pixtral"), mini.prompt("LLaVA, Pixtral", [[(32, 24)]] * 2)
    vtc.wrap(model, "divprune", keep_tokens=4)
    want = model(**inputs).logits
    del inputs["image_sizes"]
    assert torch.equal(model(**inputs).logits, want)
    assert model.vtc.report().grid == (4, 3)
    with pytest.raises(vtc.UnsupportedError, match="got 23 rows where the images have 24 tokens"):
        model(**inputs, vision_feature_select_strategy="default")


@torch.no_grad()
def test_a_tile_of_zeros_alone_stays_a_tile() -> None:
    """SmolVLM takes tiles of zeros for padding, unless there is nothing else."""
    model, inputs = mini.build("SmolVLM"), mini.prompt("SmolVLM", [[1]])
    inputs["pixel_values"] = torch.zeros_like(inputs["pixel_values"])
    stock = model(**inputs).logits
    with vtc.compressing(model, "divprune", keep_ratio=1.0):
        assert torch.equal(model(**inputs).logits, stock)
    with vtc.compressing(model, "divprune", keep_tokens=4) as session:
        model(**inputs)
        assert session.report().final_tokens == 4


def test_split_lengths() -> None:
    """Images of rows that end in text, and two adjacent ones."""
    visual = torch.tensor([[c == "v" for c in "tvvtvvtvvvt"], [c == "v" for c in "tttttvvtttt"]])
    images, image, position = split_lengths(visual, [4, 3, 2])
    assert images == [[4, 3], [2]]
    assert image[visual].tolist() == [0, 0, 0, 0, 1, 1, 1, 0, 0]
    assert position[visual].tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1]
    assert (image[~visual] == -1).all()
    for lengths in ([4, 3], [4, 5], [8, 1]):
        with pytest.raises(vtc.UnsupportedError, match="not whole images"):
            split_lengths(visual, lengths)


# ---- sliding windows ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop", "prefixkv"])
@torch.no_grad()
def test_sliding_windows_count_positions(method: str) -> None:
    """A window of 20 positions under prompts of 60: the model's own cache or a full one."""
    model = build("Gemma 3")
    inputs = mini.prompt("Gemma 3", rows_of("Gemma 3"), pad="left")
    assert inputs["input_ids"].shape[1] > 2 * 20
    stock = cache_left(model(**inputs, use_cache=True))
    assert [layer.is_sliding for layer in stock.layers] == [True, True, False, True, True]
    with vtc.compressing(model, made(method, "Gemma 3")) as session:
        own = logits_and_steps(model, inputs, wide=False)
        report = session.report()
        full = logits_and_steps(model, inputs, wide=True)
    close(own[0], full[0])
    close(own[1], full[1])
    stock_bytes = sum(2 * layer.keys.numel() * layer.keys.element_size() for layer in stock.layers)
    assert report.kv_bytes < report.kv_bytes_full == stock_bytes


@torch.no_grad()
def test_windows_that_tokens_have_left_are_refused() -> None:
    model = build("Gemma 3")
    inputs = mini.prompt("Gemma 3", [[1]])
    cache = cache_left(model(**inputs, use_cache=True))
    with (
        vtc.compressing(model, "divprune"),
        pytest.raises(vtc.UnsupportedError, match="start the conversation with the wrapped"),
    ):
        model(**inputs, **giving(model, cache))


@torch.no_grad()
def test_a_window_that_was_begun_without_vtc() -> None:
    """A stock prompt within the window, then an image: as if wrapped from the start."""
    model, inputs = build("Gemma 3"), mini.prompt("Gemma 3", [[1]], before=5)
    text = {"input_ids": torch.tensor([[7, 8, 9, 10, 11, 12]])}
    mask = torch.cat([torch.ones_like(text["input_ids"]), inputs["attention_mask"]], 1)
    got = []
    for early in (False, True):
        with contextlib.ExitStack() as stack:
            if early:
                stack.enter_context(vtc.compressing(model, made("divprune", "Gemma 3")))
            cache = cache_left(model(**text, use_cache=True))
            if not early:
                stack.enter_context(vtc.compressing(model, made("divprune", "Gemma 3")))
            stock = cache.layers[0]
            model(**{**inputs, "attention_mask": mask}, **giving(model, cache))
            got.append(model(input_ids=torch.tensor([[7]]), **giving(model, cache)).logits)
            now = cache.layers[0]
        assert (now.keys.dtype, now.keys.device) == (stock.keys.dtype, stock.keys.device)
    torch.testing.assert_close(got[0], got[1])


@torch.no_grad()
def test_cropping_does_not_slide_a_window_back() -> None:
    model = build("Gemma 3")
    inputs = mini.prompt("Gemma 3", [[2]])
    with vtc.compressing(model, made("divprune", "Gemma 3")):
        cache = cache_left(model(**inputs, use_cache=True))
        out = model(input_ids=torch.tensor([[7, 8]]), **giving(model, cache))
        first = out.logits[:, 0]
        for layer in cache.layers:
            layer.crop(-2)
        again = model(input_ids=torch.tensor([[7]]), **giving(model, cache)).logits[:, 0]
        close(again, first)
        with pytest.raises(vtc.UnsupportedError, match="window of this layer would reach back"):
            cache.layers[0].crop(-2)


@torch.no_grad()
def test_second_prompts_behind_a_window() -> None:
    """A further turn on a trimmed cache is what it is on a full one."""
    model = build("Gemma 3")
    inputs = mini.prompt("Gemma 3", [[2]])
    more = mini.prompt("Gemma 3", [[1]], seed=3)
    more["attention_mask"] = torch.ones(1, sum(x["input_ids"].shape[1] for x in (inputs, more)))
    with vtc.compressing(model, made("fastv", "Gemma 3")):
        got = []
        for cache in (None, DynamicCache()):
            cache = cache_left(model(**inputs, use_cache=True, **giving(model, cache)))
            got.append(model(**more, **giving(model, cache)).logits)
    close(*got)


@torch.no_grad()
def test_compact_positions_in_every_kind_of_layer() -> None:
    """Renumbered positions go through the rotary tables of the layer's kind."""
    model = mini.build("Gemma 3")
    model.config.get_text_config().sliding_window = 200  # as large as the prompt at least
    inputs = mini.prompt("Gemma 3", [[1]])
    chosen = replace(made("divprune", "Gemma 3"), positions="compact")
    with vtc.compressing(model, chosen):
        want = model(**inputs).logits[:, -1]
    short = vtc.compress_inputs(model, inputs, chosen)
    close(model(**short).logits[:, -1], want)
