# SPDX-License-Identifier: Apache-2.0
"""The public verbs, and what they say to bad input."""

from __future__ import annotations

import io
from fractions import Fraction

import mini_llava as mini
import pytest
import torch
from PIL import Image, UnidentifiedImageError
from snapshot import snapshot
from transformers import LlamaConfig, LlamaForCausalLM

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.report.flops import decoder_flops, encoder_flops, llm_flops
from vtc.transformers_contract import cache_left


def test_unknown_method_names_the_nearest() -> None:
    model = mini.build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r'unknown method "fastvv"; did you mean fastv'):
        vtc.wrap(model, "fastvv")
    with pytest.raises(ValueError, match=r"known: .*pitome"):
        vtc.wrap(model, "zzzzzz")
    with pytest.raises(ValueError, match=r"nonsense.*its parameters are.*keep_ratio"):
        vtc.wrap(model, "fastv", nonsense=3)
    with pytest.raises(ValueError, match="already has its parameters"):
        vtc.wrap(model, vtc.methods()["fastv"](), keep_ratio=0.5)
    with pytest.raises(ValueError, match="method name, a Method or"):
        vtc.wrap(model, 7)
    assert snapshot(model) == before


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (dict(keep_ratio=0.5, keep_tokens=8), "not both"),
        (dict(keep_ratio=0.0), r"in \(0, 1\]; got 0.0"),
        (dict(keep_ratio=-0.1), r"in \(0, 1\]"),
        (dict(keep_ratio=1.5), r"in \(0, 1\]; got 1.5"),
        (dict(keep_ratio=float("nan")), r"in \(0, 1\]"),
        (dict(keep_tokens=0), "at least 1"),
        (dict(keep_tokens=2.5), "at least 1"),
        (dict(keep_ratio="half"), "keep_ratio"),
        (dict(positions="absolute"), "original"),
    ],
)
@pytest.mark.parametrize("method", sorted(vtc.methods()))
def test_bad_budgets(method: str, parameters: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vtc.wrap(mini.build(), method, **parameters)


def test_wrapping_twice() -> None:
    model = vtc.wrap(mini.build(), "fastv")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"already wrapped.*unwrap.*chain"):
        vtc.wrap(model, "divprune")
    with pytest.raises(ValueError, match="already wrapped"), vtc.compressing(model, "fastv"):
        pass
    assert snapshot(model) == before
    vtc.unwrap(model)
    with pytest.raises(ValueError, match="not wrapped"):
        vtc.unwrap(model)


def test_models_without_images() -> None:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        vocab_size=9,
    )
    with pytest.raises(vtc.UnsupportedError, match="text-only"):
        vtc.wrap(LlamaForCausalLM(config), "fastv")
    with pytest.raises(vtc.UnsupportedError, match=r"no adapter.*supported: .*LLaVA"):
        vtc.wrap(torch.nn.Linear(3, 3), "fastv")
    with pytest.raises(ValueError, match=r"torch\.nn\.Module"):
        vtc.wrap("llava-hf/llava-1.5-7b-hf", "fastv")


def test_layer_behind_the_last() -> None:
    with pytest.raises(
        vtc.UnsupportedError, match=r"fastv\(k=9\) acts after LLM layer 8 and there are 5"
    ):
        vtc.wrap(mini.build(), "fastv", k=9)


def test_llm_method_on_an_encoder() -> None:
    tower = mini.build().model.vision_tower
    with pytest.raises(
        vtc.UnsupportedError, match=r"fastv.*encoder alone.*methods for encoders: .*tome"
    ):
        vtc.wrap(tower, "fastv")


@torch.no_grad()
def test_compressing_is_scoped_even_when_it_fails() -> None:
    model, inputs = mini.build(), mini.prompt(1)
    model(**inputs)  # Hugging Face installs hooks of its own at the first call, for good
    before = snapshot(model)
    with vtc.compressing(model, "divprune", keep_tokens=4) as session:
        model(**inputs)
        assert session.report().final_tokens == 4
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="mine"), vtc.compressing(model, "divprune"):
        raise RuntimeError("mine")
    assert snapshot(model) == before


def test_report_before_any_image() -> None:
    model = vtc.wrap(mini.build(), "fastv")
    with pytest.raises(RuntimeError, match="run the model on an image first"):
        model.vtc.report()


@pytest.mark.parametrize(
    "method",
    [m for m in sorted(vtc.methods()) if m not in ("mod", "evs")],  # routers, videos
)
@torch.no_grad()
def test_corrupt_image(method: str) -> None:
    """Not-a-number pixels are an error that says so, where a method chooses among tokens."""
    model, inputs = mini.build(), mini.prompt(1, batch=2)
    inputs["pixel_values"][1, :, :8] = torch.nan
    stock = model(**inputs).logits
    vtc.wrap(model, seeded(method, Fraction(1, 2) if method != "vidkv" else None, 0))
    assert stock[1, -1].isnan().all()
    if method == "vidkv":  # the prompt is too short for it to pack anything
        assert model(**inputs).logits[1, -1].isnan().all()
    else:
        with pytest.raises(vtc.NotFiniteError, match=r"not a number .*in (image|prompt) 1 "):
            model(**inputs)
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(b"not an image"))


@torch.no_grad()
def test_report_counts_cost_and_bytes() -> None:
    model, inputs = mini.build(), mini.prompt(1, batch=2)
    with vtc.observe(model) as session:
        stock = model(**inputs, use_cache=True)
        full = session.report()
    assert full.final_tokens == full.asked == full.visual_tokens == mini.PATCHES
    assert full.flops == full.flops_full == llm_flops([mini.PATCHES] * 5, 48, 64)
    assert full.flops_all == full.flops_all_full
    assert (
        full.kv_bytes
        == full.kv_bytes_full
        == sum(2 * layer.keys.nbytes for layer in cache_left(stock).layers)
    )
    vtc.wrap(model, "fastv", keep_tokens=4)
    out = model(**inputs, use_cache=True)
    report = model.vtc.report()
    assert report.tokens_per_layer == [16, 16, 4, 4, 4]
    assert report.average_tokens == pytest.approx(44 / 5)
    assert report.flops == llm_flops([16, 16, 4, 4, 4], 48, 64)
    text = inputs["input_ids"].shape[1] - mini.PATCHES
    saved = sum(decoder_flops([n + text], 48, 64, 4, 2, 12) for n in [16] * 3)
    saved -= sum(decoder_flops([n + text], 48, 64, 4, 2, 12) for n in [4] * 3)
    assert report.flops_all_full - report.flops_all == pytest.approx(saved)
    assert report.kv_bytes == sum(2 * layer.keys.nbytes for layer in cache_left(out).layers)
    assert report.kv_bytes_full == full.kv_bytes
    assert report.prefill_ms > 0
    assert report.method_ms > 0
    assert report.grid == (mini.GRID, mini.GRID)
    assert [len(k) for k in report.kept] == [4, 4]
    assert "16 -> 4" in str(report)
    assert repr(report) == str(report)  # in a notebook, too: no tensors
    model.generate(**inputs, max_new_tokens=3)
    assert model.vtc.report().decode_ms > 0


@torch.no_grad()
def test_explicit_schedules_ask_for_no_budget() -> None:
    model, inputs = mini.build(), mini.prompt(1, batch=1)
    for method in (vtc.methods()["tome"](r=3), vtc.methods()["pitome"](ratio=0.75)):
        with vtc.compressing(model, method) as session:
            model(**inputs)
            report = session.report()
        assert report.asked is None
        assert report.final_tokens == len(report.kept[0]) < mini.PATCHES
        assert "asked" not in str(report)


def test_published_flops() -> None:
    """Numbers of the literature for LLaVA-1.5-7B (FastV, PyramidDrop and TransPrune papers)."""

    def tera(tokens: list[float]) -> float:
        return llm_flops(tokens, 4096, 11008) / 1e12

    assert tera([576] * 32) == pytest.approx(3.817, abs=5e-4)
    assert tera([576] * 2 + [288] * 30) == pytest.approx(2.007, abs=5e-4)
    assert tera([576] * 2 + [144] * 30) == pytest.approx(1.118, abs=5e-4)
    assert tera([576] * 8 + [288] * 8 + [144] * 8 + [72] * 8) == pytest.approx(1.777, abs=5e-4)
    assert tera([576] * 7 + [504] * 2 + [360] * 3 + [72] * 20) == pytest.approx(1.557, abs=5e-4)


def test_encoder_flops() -> None:
    """ViT-B/16 at 224 px: 17.58 G with the head's and patch embedding's share (timm's table:
    17.6)."""
    blocks = encoder_flops([197] * 12, [197] * 12, 768, 3072)
    patches = 196 * 3 * 16 * 16 * 768
    assert (blocks + patches) / 1e9 == pytest.approx(17.58, abs=0.02)


@torch.no_grad()
def test_chain_across_stages() -> None:
    """Budgets are shares of the original tokens, whatever stage a method acts at."""
    chain = vtc.chain(
        vtc.methods()["tome"](keep_tokens=12),
        vtc.methods()["divprune"](keep_tokens=8),
        vtc.methods()["fastv"](keep_tokens=4),
    )
    model, inputs = mini.build(), mini.prompt([1, 2], pad="left")
    stock = model(**inputs).logits
    vtc.wrap(model, chain)
    model.generate(**inputs, max_new_tokens=4, num_beams=2)
    model(**inputs)
    report = model.vtc.report()
    assert report.tokens_per_layer == [12, 12, 6, 6, 6]  # means of rows with one and two images
    one, *two = map(len, report.kept)  # FastV ranks the images of a prompt together
    assert one == 4 and sum(two) == 8
    vtc.unwrap(model)
    assert torch.equal(model(**inputs).logits, stock)
    with pytest.raises(ValueError, match="at least one"):
        vtc.chain()
    with pytest.raises(ValueError, match="agree on positions"):
        vtc.chain(vtc.methods()["fastv"](positions="compact"), "divprune")
