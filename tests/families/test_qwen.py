# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL, Qwen3-VL: M-RoPE, flat towers, DeepStack; the invariants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction
from inspect import signature
from typing import Any, ClassVar

import mini_qwen as mini
import pytest
import torch
from invariants import dropped_is_masked, greedy_loop
from mini_qwen import ROW, SQUARE, TALL, TINY, WIDE
from snapshot import snapshot
from torch import Tensor
from transformers import StaticCache

import vtc
from vtc.adapters.locate import locate
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support.masked_oracle import (
    bypassing,
    compare,
    logits_and_steps,
    masked,
    recording,
)
from vtc.engine.llm.prompt import split_lengths
from vtc.methods.mod import MoD
from vtc.methods.vidkv import VidKV
from vtc.reduction import Reduction
from vtc.transformers_contract import cache_left, giving

TOKENS, STEPS = 5, 4
ROWS = [[WIDE, TINY], [TALL]]
CHOOSING = {"features", "decoder"}
# Whether this transformers takes encoded images (5.18 and newer).
ENCODED_BEFORE = "mm_encoder_outputs" in signature(mini.build("qwen2").forward).parameters
QUICK = {"divprune", "visionzip", "holov", "fastv", "sparsevlm", "prefixkv"}
"""Methods of every kind, whose invariants are not marked slow."""


# ---- which method on which family --------------------------------------------------------------


def made(method: str, keep: Fraction | int | None = TOKENS) -> vtc.Method:
    """The method with a budget, and with its substitutes for [CLS] and for the encoder's blocks."""
    chosen = seeded(method, keep, 0)
    return replace(chosen, **chosen.without_cls, **chosen.outside_encoder)


def takes_budget(method: str) -> bool:
    try:
        return made(method).has_budget
    except ValueError:
        return False


def refused(method: str) -> str | None:
    """Pattern of a method's refusal, on every family alike."""
    chosen = made(method, None)
    if "pixels" in chosen.stages:
        return r"joins 2 x 2 patches.*give the processor a smaller max_pixels, or use.*divprune"
    if "vision" in chosen.stages:
        return r"before or inside the encoder.*joins 2 x 2 patches.*divprune"
    return r"\[CLS\].*methods that do without: .*divprune" if "cls" in chosen.needs else None


def bypasses(method: str) -> bool:
    return "bypass" in made(method).stages


VIDEO = {m for m, cls in vtc.methods().items() if "frames" in cls.needs}
"""See test_video.py."""
METHODS = [
    m for m in sorted(vtc.methods()) if takes_budget(m) and not refused(m) and m not in VIDEO
]


def cases(methods: list[str]) -> list:
    return [
        pytest.param(m, f, id=f"{m}-{f}", marks=[] if m in QUICK else pytest.mark.slow)
        for m in methods
        for f in mini.FAMILIES
    ]


@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize("method", [m for m in sorted(vtc.methods()) if refused(m)])
def test_refused_at_wrap(method: str, family: str) -> None:
    model = mini.build(family)
    before = snapshot(model)
    with pytest.raises(vtc.UnsupportedError, match=refused(method)):
        vtc.wrap(model, made(method, None))
    assert snapshot(model) == before


# ---- invariants --------------------------------------------------------------------------------


INPUTS: dict[str, tuple[list, dict]] = {
    "two images": ([[WIDE, SQUARE], [ROW, TALL]], {"pad": "left"}),
    "left": (ROWS, {"pad": "left"}),
    "right": ([[TALL], [TINY, SQUARE]], {"pad": "right"}),
    "alone": ([[SQUARE]], {}),
}


def result(model: Any, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, list[int]]:
    return logits_and_steps(model, inputs, STEPS)


@pytest.mark.parametrize("method, family", cases([m for m in METHODS if not bypasses(m)]))
@torch.no_grad()
def test_dropped_is_masked(method: str, family: str) -> None:
    """Invariants 3, 4 and 5: several images of different sizes, padding, SDPA and eager."""
    chosen = made(method)
    drops = bool(chosen.stages & CHOOSING)
    for n, (name, (rows, how)) in enumerate(INPUTS.items()):
        model = mini.build(family, "eager" if n % 2 else "sdpa")
        inputs = mini.prompt(rows, **how)
        stock = result(model, inputs)
        vtc.wrap(model, chosen)
        alive = dropped_is_masked(model, result, inputs, stock, drops, name)
        model(**inputs)
        report = model.vtc.report()
        counts = [[height * width for height, width in row] for row in rows]
        assert report.visual_tokens == pytest.approx(sum(map(sum, counts)) / len(rows))
        assert [g for layout in report.grids for g in layout.grids] == [s for r in rows for s in r]
        if not drops:
            assert report.kv_tokens == pytest.approx(report.asked, abs=0.5)
            continue
        kept = (alive[len(alive) - 1] & (inputs["input_ids"] == mini.IMAGE)).sum(1)
        assert kept.tolist() == [sum(chosen.budget(n) for n in row) for row in counts]
        assert report.asked == pytest.approx(kept.double().mean().item())
        assert report.final_tokens == pytest.approx(report.asked)
        assert sum(len(k) for k in report.kept) == kept.sum()
        if chosen.stages == {"features"}:  # each image on its own
            flat = [n for row in counts for n in row]
            assert [len(k) for k in report.kept] == [chosen.budget(n) for n in flat]


@pytest.mark.parametrize("method, family", cases(METHODS))
@torch.no_grad()
def test_keeping_all_is_stock(method: str, family: str) -> None:
    """Invariants 1 and 2."""
    model, inputs = mini.build(family), mini.prompt(ROWS, pad="left")
    stock, steps, _ = result(model, inputs)
    before = snapshot(model)
    vtc.wrap(model, made(method, Fraction(1)))
    got, got_steps, _ = result(model, inputs)
    torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_steps, steps, atol=1e-5, rtol=1e-5)
    vtc.unwrap(model)
    vtc.wrap(model, made(method))
    assert not torch.equal(result(model, inputs)[1], steps)
    vtc.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


def check_rows_alone(model: Any) -> None:
    """A row's logits with mates, padded left or right, are those that it has alone."""
    rows = [[WIDE], [TINY, SQUARE], [TALL]]
    for pad in ("left", "right"):
        inputs = mini.prompt(rows, pad=pad)
        together = model(**inputs).logits
        for r in range(len(rows)):
            got = together[r][inputs["attention_mask"][r].bool()]
            want = model(**mini.part(inputs, r, rows)).logits[0]
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method, family", cases(METHODS))
@torch.no_grad()
def test_batch_mates_do_not_matter(method: str, family: str) -> None:
    """Invariant 6."""
    check_rows_alone(vtc.wrap(mini.build(family), made(method)))


@pytest.mark.parametrize("method, family", cases([m for m in METHODS if not bypasses(m)]))
@torch.no_grad()
def test_beams(method: str, family: str) -> None:
    """Features encoded once and repeated for every beam; two images of a row stay in order."""
    model = vtc.wrap(mini.build(family), made(method))
    inputs = mini.prompt([[TINY, SQUARE], [WIDE]], pad="left")
    how = {"max_new_tokens": STEPS, "do_sample": False, "num_beams": 2}

    def beams() -> Any:
        return model.generate(**inputs, **how, output_scores=True, return_dict_in_generate=True)

    got, want, _ = compare(model, beams)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(got.sequences_scores, want.sequences_scores, atol=1e-5, rtol=1e-5)
    greedy = model.generate(
        **inputs, max_new_tokens=1, output_logits=True, return_dict_in_generate=True
    ).logits[0]
    first = got.scores[0].reshape(2, 2, -1)[:, 0]
    torch.testing.assert_close(first, greedy.log_softmax(-1), atol=1e-4, rtol=1e-4)


def adaptive() -> list[str]:
    every = [(m, made(m, None)) for m in sorted(vtc.methods()) if not refused(m)]
    return [m for m, x in every if not x.has_budget and x.stages & CHOOSING]


@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize("method", adaptive())
@torch.no_grad()
def test_adaptive_counts(method: str, family: str) -> None:
    """Methods that decide themselves how many tokens stay: dropped is masked, nothing is asked."""
    model, inputs = mini.build(family), mini.prompt(ROWS, pad="left")
    vtc.wrap(model, made(method, None))
    (got, steps, _), (want, want_steps, _), alive = compare(model, lambda: result(model, inputs))
    seen = inputs["attention_mask"].bool() & alive[len(alive) - 1]
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    report = model.vtc.report()
    assert report.asked is None and 0 < report.final_tokens <= report.visual_tokens
    check_rows_alone(model)


# ---- tokens that bypass layers -------------------------------------------------------------------


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize("method", ["mod", *(m for m in METHODS if bypasses(m))])
@torch.no_grad()
def test_bypassing_is_masked(method: str, family: str, pad: str) -> None:
    """Tokens that a layer leaves out are masked in it, and it gives them nothing; they come
    back."""
    g = torch.Generator().manual_seed(1)
    routers = {i: torch.randn(48, generator=g) for i in (0, 1, 3)}
    chosen = MoD(routers=routers, keep_tokens=TOKENS) if method == "mod" else made(method)
    model, inputs = mini.build(family), mini.prompt(ROWS, pad=pad)
    stock = model(**inputs).logits
    vtc.wrap(model, chosen)
    engine = model.vtc.decoder
    with recording(engine) as seen:
        got, steps, _ = result(model, inputs)
    assert any(not part.all() for part in seen.parts.values())
    layers = model.model.language_model.layers
    engine.remove()
    with bypassing(layers, seen.parts, chosen.bypass):
        want, want_steps, _ = result(model, inputs)
    engine.install()
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    assert (got[real] - stock[real]).abs().max() > 1e-3, "no teeth"
    if steps is not None:
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["divprune", "visionzip", "fastv", "transprune", "prefixkv"])
@torch.no_grad()
def test_mixture_of_experts(method: str) -> None:
    """The same seams with experts, each token choosing its own."""
    model, inputs = mini.build("qwen3-moe"), mini.prompt(ROWS, pad="left")
    stock, stock_steps, _ = result(model, inputs)
    with vtc.compressing(model, made(method, Fraction(1))):
        torch.testing.assert_close(result(model, inputs)[0], stock, atol=1e-5, rtol=1e-5)
    vtc.wrap(model, made(method))
    (got, steps, _), (want, want_steps, _), alive = compare(model, lambda: result(model, inputs))
    seen = inputs["attention_mask"].bool() & alive[len(alive) - 1]
    torch.testing.assert_close(got[seen], want[seen], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    assert (steps[:, 1:] - stock_steps[:, 1:]).abs().max() > 1e-3, "no teeth"
    check_rows_alone(model)
    model(**inputs)
    assert locate(model).decoder.mlp_width == 48


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_packed_bits(family: str) -> None:
    """The prompt is stock, its cache is bits, and decoding reads what a stock cache of them
    holds."""
    model, inputs = mini.build(family), mini.prompt([[SQUARE, WIDE], [WIDE, SQUARE]])
    step = {"input_ids": torch.tensor([[9], [8]])}
    plain = model(**inputs, use_cache=True)
    with vtc.compressing(model, VidKV(window=8, group=8)) as session:
        out = model(**inputs, use_cache=True)
        report = session.report()
        torch.testing.assert_close(out.logits, plain.logits, atol=1e-5, rtol=1e-5)
        assert report.kv_bytes < 0.7 * report.kv_bytes_full
        full = cache_left(plain).layers
        for layer, stock in zip(cache_left(out).layers, full, strict=True):
            where = layer.columns(torch.device("cpu"))[:, None, :, None]
            for got, values in zip(layer.unpacked(), (stock.keys, stock.values), strict=True):
                assert (values.gather(2, where.expand_as(got)) - got).abs().max() > 1e-2
                values.scatter_(2, where.expand_as(got), got)
        got = model(**step, **giving(model, cache_left(out))).logits
    want = model(**step, **giving(model, cache_left(plain))).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# ---- DeepStack ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DropBehind(vtc.Method):
    """Drops the visual tokens that the prompt attends to least, after the given layers."""

    name: ClassVar[str] = "test-drop"
    after: tuple[int, ...] = (1,)
    share: float = 0.6

    def on_decoder_layer(self, v: Any) -> Reduction | None:
        if v.layer not in self.after:
            return None
        score = v.tokens.norm(dim=-1) if v.layer < 0 else v.attention("prompt").sum((1, 2))
        if v.valid is None:
            return Reduction.from_scores(score, int(v.count * self.share))
        return Reduction.from_scores(score, (v.valid.sum(1) * self.share).long(), v.valid)


@pytest.mark.parametrize("after", [(-1,), (0,), (1,), (2,), (3,), (-1, 0, 1, 3)])
@torch.no_grad()
def test_deepstack_follows_the_survivors(after: tuple[int, ...]) -> None:
    """Drops in front of, between and behind the layers that image features are added to."""
    for attention, pad in (("sdpa", "left"), ("eager", "right"), ("sdpa", None)):
        model = mini.build("qwen3", attention)
        inputs = mini.prompt(ROWS if pad else [[SQUARE, WIDE], [WIDE, SQUARE]], pad=pad)
        vtc.wrap(model, DropBehind(after=after))
        (got, steps, _), (want, want_steps, _), alive = compare(
            model, lambda model=model, inputs=inputs: result(model, inputs)
        )
        rows = inputs["attention_mask"].bool() & alive[4]
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)
        if steps is not None:
            torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
        # Teeth: without the features, and with those of other rows.
        for change in (torch.zeros_like, lambda x: x.flip(0)):
            stock = type(model.vtc.decoder)._deepstack

            def wrong(i: int, st: Any, hidden: Tensor, change: Any = change, stock: Any = stock):
                mask, embeds = st.deepstack
                return stock(i, replace(st, deepstack=(mask, [change(x) for x in embeds])), hidden)

            model.vtc.decoder._deepstack = wrong
            assert (model(**inputs).logits[rows] - want[rows]).abs().max() > 1e-2
            del model.vtc.decoder._deepstack


def whole(rows: Any) -> Tensor:
    """All images of a layer, which 5.12 does not split by image yet."""
    return rows if isinstance(rows, Tensor) else torch.cat(list(rows))


@torch.no_grad()
def test_deepstack_of_merged_tokens_is_their_mean() -> None:
    model, inputs = mini.build("qwen3"), mini.prompt([[SQUARE]])
    call = {k: inputs[k] for k in ("pixel_values", "image_grid_thw")}
    stock = model.get_image_features(**call)
    with vtc.compressing(model, "pool", keep_tokens=4):
        got = model.get_image_features(**call)
    left = ~got.pooler_output[0][:, 0].isnan()
    assert left.sum() == 4
    for rows, full in zip(got.deepstack_features, stock.deepstack_features, strict=True):
        cells = whole(full).reshape(2, 2, 2, 2, -1).mean((1, 3)).flatten(0, 1)
        torch.testing.assert_close(whole(rows)[left], cells, atol=1e-5, rtol=1e-5)
    with vtc.compressing(model, "uniform", keep_tokens=4):
        kept = model.get_image_features(**call)
    for rows, full in zip(kept.deepstack_features, stock.deepstack_features, strict=True):
        assert torch.equal(whole(rows), whole(full))


@pytest.mark.parametrize("method", ["pool", "uniform", "pyramiddrop"])
@pytest.mark.parametrize("family", mini.FAMILIES)
def test_gradients_reach_the_tower(family: str, method: str) -> None:
    """Through the merger and, on Qwen3-VL, through DeepStack."""
    model, inputs = mini.build(family), mini.prompt(ROWS, pad="left")
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == mini.IMAGE, -100)
    vtc.wrap(model, made(method))
    loss = model(**inputs, labels=labels).loss
    loss.backward()
    visual = model.model.visual
    parts = [visual.patch_embed, visual.merger, *getattr(visual, "deepstack_merger_list", [])]
    assert torch.isfinite(loss)
    for part in parts:
        grads = [p.grad for p in part.parameters()]
        assert all(g is not None and torch.isfinite(g).all() for g in grads)
        assert any(g.abs().max() > 1e-6 for g in grads)


def test_deepstack_in_every_layer_is_refused() -> None:
    model = mini.build("qwen3")
    model.config.get_text_config().num_hidden_layers = 3
    with pytest.raises(vtc.UnsupportedError, match="DeepStack"):
        vtc.wrap(model, DropBehind())


# ---- ways of calling ---------------------------------------------------------------------------


@pytest.mark.parametrize("after", [(-1,), (0, 2)])
@pytest.mark.parametrize("family", mini.FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False, num_beams=3),
        dict(do_sample=True, num_return_sequences=2, temperature=2.0, top_k=0),
        # Up to 5.12 it fails without an end.
        dict(do_sample=False, prompt_lookup_num_tokens=2, eos_token_id=2),
        dict(do_sample=False, use_cache=False),
    ],
    ids=["beams", "sampling", "prompt-lookup", "no-cache"],
)
@torch.no_grad()
def test_generate(family: str, after: tuple[int, ...], how: dict) -> None:
    model = vtc.wrap(mini.build(family), DropBehind(after=after))
    alone = "prompt_lookup_num_tokens" in how  # a limit of Hugging Face
    inputs = mini.prompt([[WIDE, TINY]] if alone else ROWS, pad=None if alone else "left")
    # Without a cache, every step chooses anew.
    length = 1 if "use_cache" in how else 6

    def run() -> tuple:
        torch.manual_seed(3)
        out = model.generate(
            **inputs, **how, max_new_tokens=length, output_logits=True, return_dict_in_generate=True
        )
        return out.sequences, torch.stack(out.logits, 1)

    (sequences, logits), (want_sequences, want), _ = compare(model, run)
    assert torch.equal(sequences, want_sequences)
    torch.testing.assert_close(logits, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("after", [(-1,), (1,), (0, 2)])
@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_manual_loop(family: str, after: tuple[int, ...]) -> None:
    """Positions of decoded tokens are the logical length and the model's own shift."""
    model = vtc.wrap(mini.build(family, "eager"), DropBehind(after=after))
    inputs = mini.prompt([[SQUARE, WIDE], [WIDE, SQUARE]])
    (got, cache), (want, full), alive = compare(model, lambda: greedy_loop(model, inputs))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == full.get_seq_length(), "the cache reports its logical length"
    for i, layer in enumerate(cache.layers):
        assert layer.keys.shape[2] == alive[i].sum(1).max() + 5


@pytest.mark.parametrize("image", [False, True], ids=["text", "second-image"])
@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_second_turn(family: str, image: bool) -> None:
    """A conversation on one cache: the second turn, with an image that is compressed as well."""
    model = vtc.wrap(mini.build(family), DropBehind(after=(0, 2)))
    first = mini.prompt([[WIDE], [ROW]][:1] * 2, seed=1)
    second: dict[str, Tensor] = {"input_ids": torch.tensor([[7, 8, 9], [10, 11, 12]])}
    if image:
        second = mini.prompt([[TALL], [TALL]], seed=2)
        del second["attention_mask"]
    length = first["input_ids"].shape[1]

    def second_turn(cache: Any) -> Tensor:
        return greedy_loop(model, second, 3, cache)[0]

    engine = model.vtc.decoder
    with recording(engine) as seen_first:
        _, cache = greedy_loop(model, first, 2)
    with recording(engine) as seen_second:
        got = second_turn(cache)
    layers = model.model.language_model.layers
    engine.remove()
    with masked(layers, seen_first.alive):
        _, cache = greedy_loop(model, first, 2)
        if image:
            with masked(layers, seen_second.alive, start=length + 2):
                want = second_turn(cache)
        else:
            want = second_turn(cache)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_attention_ahead(family: str) -> None:
    """Attention of a layer that has not run yet is what that layer then computes."""
    seen: dict[int, tuple[Tensor, Tensor]] = {}

    @dataclass(frozen=True, kw_only=True)
    class LookAhead(vtc.Method):
        name: ClassVar[str] = "test-look"

        def on_decoder_layer(self, v: Any) -> None:
            ahead = v.attention("prompt", ahead=True) if v.layer < 4 else None
            seen[v.layer] = (v.attention("prompt") if v.layer >= 0 else None, ahead)

    model = vtc.wrap(mini.build(family), vtc.chain(DropBehind(after=(1,)), LookAhead()))
    model(**mini.prompt(ROWS, pad="left"))
    for layer in (0, 2, 3):  # tokens leave between what was seen ahead of layer 1 and behind it
        torch.testing.assert_close(seen[layer][0], seen[layer - 1][1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_refused_before_compute(family: str) -> None:
    model = mini.build(family)
    inputs = mini.prompt([[SQUARE]])
    with pytest.raises(vtc.UnsupportedError, match=r'time, height and width.*positions="original"'):
        vtc.wrap(model, "fastv", positions="compact")
    vtc.wrap(model, DropBehind())
    config = model.config.get_text_config()
    with pytest.raises(vtc.UnsupportedError, match="DynamicCache"):
        model(**inputs, **giving(model, StaticCache(config=config, max_cache_len=64)))
    if ENCODED_BEFORE:  # else Hugging Face does not get that far
        with pytest.raises(vtc.UnsupportedError, match="chunked"):
            model.generate(**inputs, max_new_tokens=2, prefill_chunk_size=8)


@torch.no_grad()
def test_text_only_prompt_passes_through() -> None:
    model, text = mini.build(), {"input_ids": torch.randint(7, 60, (2, 7))}
    stock = model.generate(**text, max_new_tokens=4, do_sample=False)
    vtc.wrap(model, DropBehind())
    assert torch.equal(model.generate(**text, max_new_tokens=4, do_sample=False), stock)


@pytest.mark.parametrize(
    "how",
    [{}, {"num_beams": 2}, {"cache_implementation": "static"}, {"prefill_chunk_size": 8}],
    ids=["greedy", "beams", "static-cache", "chunked-prefill"],
)
@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_compressed_inputs(family: str, how: dict) -> None:
    """Before `generate()`: positions of time, height and width, and DeepStack, go along."""
    if not ENCODED_BEFORE:
        with pytest.raises(vtc.UnsupportedError, match=r"5\.18"):
            vtc.compress_inputs(mini.build(family), mini.prompt(ROWS), "divprune", keep_tokens=4)
        return

    def generate(inputs: dict[str, Any], **how: Any) -> tuple[Tensor, Tensor]:
        how = {"max_new_tokens": 6, "do_sample": False, **how}
        out = model.generate(**inputs, **how, output_logits=True, return_dict_in_generate=True)
        return out.sequences[:, -6:], torch.stack(out.logits, 1)

    model, inputs = mini.build(family), mini.prompt(ROWS, pad="left")
    for method in ("divprune", "pool"):
        with vtc.compressing(model, method, keep_tokens=4):
            want, want_logits = generate(inputs, **(how if "num_beams" in how else {}))
        short = vtc.compress_inputs(model, inputs, method, keep_tokens=4)
        assert short["input_ids"].shape[1] < inputs["input_ids"].shape[1]
        got, got_logits = generate(short, **how)
        assert torch.equal(got, want)
        torch.testing.assert_close(got_logits, want_logits, atol=1e-5, rtol=1e-5)


# ---- the tower ---------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class LookAtFeatures(vtc.Method):
    """Notes what the features stage sees of each image."""

    name: ClassVar[str] = "test-features"
    seen: ClassVar[dict[int, dict[str, Any]]] = {}

    def captures(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth))

    def on_features(self, v: Any) -> None:
        for row, image in enumerate(v.image.tolist()):
            self.seen[image] = {
                "grid": v.grid,
                "index": v.index[row],
                "features": v.features[row],
                "projected": v.projected[row],
                "again": v.projector(v.features)[row],
                "received": [v.attention_received(i)[row] for i in range(4)],
                "keys": [v.key(i)[row] for i in range(4)],
            }


def attention_by_hand(
    model: Any, block: int, pixels: Tensor, grid: Tensor
) -> tuple[Tensor, Tensor]:
    """Eager maps of one image in block ``block`` summed over query rows (T,), and keys (T, H, d).

    In the order of the block; the image is alone, so a map of it is all there is.
    """
    found: list[Tensor] = []
    attn = model.model.visual.blocks[block].attn

    def interface(module: Any, q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> tuple:
        if module is attn:
            weights = (q @ k.transpose(-1, -2) * module.scaling).softmax(-1)
            found.append((weights.mean((0, 1, 2)), k[0].transpose(0, 1)))
        return stock(module, q, k, *args, **kwargs)

    import sys

    namespace: Any = sys.modules[type(attn).__module__]
    stock = namespace.eager_attention_forward
    namespace.eager_attention_forward = interface
    try:
        model.get_image_features(pixel_values=pixels, image_grid_thw=grid)
    finally:
        namespace.eager_attention_forward = stock
    received, keys = zip(*found, strict=True)
    return torch.cat(received), torch.cat(keys)


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_what_methods_see_of_the_tower(family: str) -> None:
    """Raster order, four patches to a token; attention and keys as eager attention has them."""
    sizes = [[WIDE, TINY], [TALL, WIDE]]
    model, inputs = mini.build(family, "eager"), mini.prompt(sizes, pad="left")
    stock = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"])
    LookAtFeatures.seen.clear()
    with vtc.compressing(model, LookAtFeatures()):
        model(**inputs)
    seen = dict(LookAtFeatures.seen)
    nearest = {0: 1, 1: 1, 2: 3, 3: 3} if family == "qwen2.5" else {i: i for i in range(4)}
    counts = inputs["image_grid_thw"].prod(1).tolist()
    for i, size in enumerate(size for row in sizes for size in row):
        image, n = seen[i], size[0] * size[1]
        assert image["grid"] == size and image["index"].tolist() == list(range(n))
        assert image["features"].shape == (n, 4 * 32)
        torch.testing.assert_close(image["projected"], stock.pooler_output[i])
        torch.testing.assert_close(image["again"], image["projected"], atol=1e-5, rtol=1e-5)
        pixels = inputs["pixel_values"].split(counts)[i]
        grid = inputs["image_grid_thw"][i : i + 1]
        order = torch.arange(n)
        if family == "qwen2.5":  # windows of 2 x 2 tokens, row by row
            y, x = order // size[1], order % size[1]
            key = ((y // 2) * 100 + x // 2) * 100 + (y % 2) * 10 + x % 2
            order = key.argsort().argsort()
        for block in range(4):
            received, keys = attention_by_hand(model, block, pixels, grid)
            want = keys.unflatten(0, (n, 4)).mean(1)[order]
            torch.testing.assert_close(image["keys"][block], want, atol=1e-5, rtol=1e-5)
            if nearest[block] != block:
                received, _ = attention_by_hand(model, nearest[block], pixels, grid)
            want = received.unflatten(0, (n, 4)).sum(1)[order]
            torch.testing.assert_close(image["received"][block], want, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(want.sum(), torch.tensor(1.0))


@pytest.mark.parametrize("family", mini.FAMILIES)
@torch.no_grad()
def test_cost_of_the_tower(family: str) -> None:
    """FLOPs of the blocks count windows as what they are, and of the images as many as there
    are."""
    grids = locate(mini.build(family)).decoder.grids
    for size in (WIDE, SQUARE, TALL):
        patches = 4 * size[0] * size[1]
        model = mini.build(family)
        lengths: list[list[int]] = []

        def note(m: Any, args: tuple, kwargs: dict, lengths: list = lengths) -> None:
            lengths.append(kwargs["cu_seqlens"].diff().tolist())

        for block in model.model.visual.blocks:
            block.register_forward_pre_hook(note, with_kwargs=True)
        call = mini.prompt([[size]])
        model(**call)
        assert all(sum(n) == patches for n in lengths)
        shape = (2 * size[0], 2 * size[1])
        assert [grids.attended(shape, i) for i in range(4)] == lengths
        with vtc.observe(model) as session:
            model(**call)
            report = session.report()
        assert report.grid == size and report.flops_all == report.flops_all_full


def test_images_of_known_lengths() -> None:
    visual = torch.tensor([[0, 1, 1, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0, 0]]).bool()
    images, image, position = split_lengths(visual, [2, 3, 2])
    assert images == [[2, 3], [2]]
    assert image.tolist() == [[-1, 0, 0, -1, 1, 1, 1], [0, 0, -1, -1, -1, -1, -1]]
    assert position[0].tolist() == [0, 0, 1, 0, 0, 1, 2]
    for lengths in ([3, 3, 1], [2, 4, 1], [2, 3], [4, 2, 1]):
        with pytest.raises(vtc.UnsupportedError, match="not whole images"):
            split_lengths(visual, lengths)
