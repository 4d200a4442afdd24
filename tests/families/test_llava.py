# SPDX-License-Identifier: Apache-2.0
"""The six invariants for every method on LLaVA with every tower and decoder."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

import mini_llava as mini
import pytest
import torch
from llava_cases import METHODS, NO_CLS, made
from snapshot import snapshot
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support.masked_oracle import compare, logits_and_steps
from vtc.methods.cdpruner import CDPruner
from vtc.registry import _REGISTRY

CHOOSING = {"pixels", "vision", "features", "decoder"}
MODELS = [(t, d) for t in mini.TOWERS for d in mini.DECODERS]


def needs_cls(method: str) -> bool:
    return "cls" in seeded(method, None, 0).needs


def drops(method: str) -> bool:
    """Whether tokens leave for good at prefill, rather than the KV cache or single layers."""
    return bool(made(method).stages & CHOOSING)


def bypasses(method: str) -> bool:
    """Whether tokens bypass layers: test_in_cache.py has an oracle for those."""
    return "bypass" in made(method).stages


def skip_message(tower: str, method: str) -> bool:
    return tower in NO_CLS and needs_cls(method) and not vtc.methods()[method].without_cls


def cases(methods: list[str]) -> list:
    """Method x tower x decoder; a pair that cannot work must say so instead.

    The second and third decoder differ from Llama in names and biases only, which no method looks
    at: they take turns instead of being multiplied with every tower.
    """
    return [
        pytest.param(m, t, d, id=f"{m}-{t}-{d}")
        for n, m in enumerate(methods)
        for i, (t, d) in enumerate(MODELS)
        if not skip_message(t, m) and (d == "llama" or (i + n) % 4 == 0)
    ]


INPUTS = {
    "1-image-batch-1": dict(images_per_row=1, batch=1),
    "2-images-batch-3": dict(images_per_row=2, batch=3),
    "left": dict(images_per_row=[1, 2, 1], pad="left"),
    "right": dict(images_per_row=[1, 1, 2], pad="right"),
}


@pytest.mark.parametrize("method, tower, decoder", cases([m for m in METHODS if not bypasses(m)]))
@torch.no_grad()
def test_dropped_is_masked(method: str, tower: str, decoder: str) -> None:
    """Invariants 3, 4 and 5, padded or not, one and two images, SDPA and eager."""
    for n, (name, kwargs) in enumerate(INPUTS.items()):
        model = mini.build(tower, decoder, "eager" if n % 2 else "sdpa")
        inputs = mini.prompt(**kwargs)
        stock, stock_steps, _ = logits_and_steps(model, inputs)
        vtc.wrap(model, made(method, tower))
        (got, steps, lengths), (want, want_steps, _), alive = compare(
            model, lambda model=model, inputs=inputs: logits_and_steps(model, inputs)
        )
        real = inputs["attention_mask"].bool()
        rows = real & alive[len(alive) - 1]
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5, msg=name)
        if drops(method):
            assert (got[rows] - stock[rows]).abs().max() > 1e-3, "nothing changed: no teeth"
        if steps is not None:
            torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5, msg=name)
            assert (steps[:, 1:] - stock_steps[:, 1:]).abs().max() > 1e-3, "no teeth"
        # Invariant 4: as long as the longest row without its padding, or as the row with padding.
        for i, length in enumerate(lengths):
            held = alive.cached[real.shape[1]][i] if alive.cached else alive[i]
            entered = (held & real).sum(1).max().item()
            assert entered <= length <= held.sum(1).max().item()
        # Invariant 5.
        model(**inputs)
        report = model.vtc.report()
        if not drops(method):
            assert report.kv_tokens == pytest.approx(report.asked, abs=0.5)
            continue
        images = (inputs["input_ids"] == mini.IMAGE).sum(1) // mini.PATCHES
        kept = (alive[len(alive) - 1] & (inputs["input_ids"] == mini.IMAGE)).sum(1)
        per_image = made(method).budget(mini.PATCHES, (mini.GRID, mini.GRID))
        assert kept.tolist() == (images * per_image).tolist()
        assert report.asked == pytest.approx(kept.double().mean().item())
        assert report.final_tokens == pytest.approx(report.asked)
        assert sum(len(k) for k in report.kept) == kept.sum()


@pytest.mark.parametrize("method, tower, decoder", cases(METHODS))
@torch.no_grad()
def test_keeping_all_is_stock(method: str, tower: str, decoder: str) -> None:
    """Invariants 1 and 2."""
    model = mini.build(tower, decoder)
    inputs = mini.prompt([1, 2], pad="left")
    stock, before = model(**inputs).logits, snapshot(model)
    steps = logits_and_steps(model, inputs)[1]
    vtc.wrap(model, made(method, tower, Fraction(1)))
    got, got_steps, _ = logits_and_steps(model, inputs)
    torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got_steps, steps, atol=1e-5, rtol=1e-5)
    vtc.unwrap(model)
    vtc.wrap(model, made(method, tower))
    got, got_steps, _ = logits_and_steps(model, inputs)
    assert not torch.equal(got_steps, steps)
    vtc.unwrap(model)
    assert snapshot(model) == before
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize("method, tower, decoder", cases(METHODS))
@torch.no_grad()
def test_batch_mates_do_not_matter(method: str, tower: str, decoder: str) -> None:
    """Invariant 6: a row alone, with mates, padded left or right."""
    model = mini.build(tower, decoder)
    vtc.wrap(model, made(method, tower))
    for pad in ("left", "right"):
        inputs = mini.prompt([1, 2, 1], pad=pad)
        together = model(**inputs).logits
        image = 0
        for r, n in enumerate([1, 2, 1]):
            real = inputs["attention_mask"][r].bool()
            alone = model(
                input_ids=inputs["input_ids"][r : r + 1, real],
                attention_mask=inputs["attention_mask"][r : r + 1, real],
                pixel_values=inputs["pixel_values"][image : image + n],
            ).logits
            image += n
            torch.testing.assert_close(together[r][real], alone[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", [m for m in METHODS if needs_cls(m)])
def test_needs_a_class_token(method: str) -> None:
    own = vtc.methods()[method].without_cls
    hint = "".join(f"give it {k}='{v}'" for k, v in own.items())
    with pytest.raises(vtc.UnsupportedError, match=rf"\[CLS\].*{hint}"):
        vtc.wrap(mini.build("siglip"), made(method))


@pytest.mark.parametrize(
    ("layer", "strategy", "why"),
    [
        ([-2, -3], "default", r"vision_feature_layer=\[-2, -3\] concatenates several encoder"),
        (9, "default", "vision_feature_layer=9 is outside a tower of 4 blocks"),
        (-2, "full", '"full" removes 0 tokens and the tower puts 1 in front'),
    ],
)
def test_features_that_cannot_be_followed(layer: int | list[int], strategy: str, why: str) -> None:
    config = LlavaConfig(
        vision_config=mini.TOWERS["clip"](),
        text_config=mini.DECODERS["llama"](),
        image_token_id=mini.IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    with pytest.raises(vtc.UnsupportedError, match=why):
        vtc.wrap(model, "fastv")


@dataclass(frozen=True, kw_only=True)
class Plain(CDPruner):
    """CDPruner's variant without text, which needs nothing."""

    relevance: str = "none"
    needs = frozenset()


@pytest.mark.parametrize("tower", ["clip", "siglip"])
@pytest.mark.parametrize(
    "invariant",
    ["test_dropped_is_masked", "test_keeping_all_is_stock", "test_batch_mates_do_not_matter"],
)
def test_the_variant_without_text_keeps_the_invariants(invariant, tower, monkeypatch):
    monkeypatch.setitem(_REGISTRY, "cdpruner", Plain)
    globals()[invariant]("cdpruner", tower, "llama")
