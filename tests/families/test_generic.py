# SPDX-License-Identifier: Apache-2.0
"""Models that no adapter was written for: exact where they work, words where they do not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
import transformers as hf
from mini_generic import FAMILIES, IDS, IMAGE, TEXT, VISION, GenericFamily, clip_llama, text, vision
from snapshot import snapshot
from torch import Tensor, nn

import vtc
from vtc.adapters.locate import locate
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support.masked_oracle import compare, logits_and_steps
from vtc.method import Method, Scorer

EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@dataclass(frozen=True, kw_only=True)
class Front(Scorer):
    """Drop in front of LLM layer 0, by the norm of the hidden states."""

    name = "test-front"
    stage = "decoder"

    @property
    def after_layer(self) -> int:
        return -1

    def score(self, v: Any) -> Tensor:
        return v.tokens.float().norm(dim=-1)


def methods(family: GenericFamily) -> list[Method]:
    half = Fraction(1, 2)
    made = [
        Front(keep_ratio=half),
        *(seeded(m, half, 0) for m in ("fastv", "dart", "prefixkv")),
    ]
    if family.ahead:
        made.append(seeded("pyramiddrop", half, 0))
    if family.one_to_one:
        made += [seeded(m, half, 0) for m in ("random", "divprune", "pitome")]
    return made


@EVERY
def test_dropped_is_masked(family: GenericFamily) -> None:
    """Prefill logits and every greedy step; as many tokens kept as asked for, and reported."""
    for method in methods(family):
        model = family.build()
        stock = logits_and_steps(model, family.inputs(model, [1, 2]), 4)
        vtc.wrap(model, method)

        def run(model: Any = model) -> tuple:
            prefill = model(**family.inputs(model, [1, 2]), use_cache=True).logits
            return prefill, *logits_and_steps(model, family.inputs(model, [1, 2]), 4)[1:]

        (got, steps, lengths), (want, want_steps, _), alive = compare(model, run)
        inputs = family.inputs(model, [1, 2])
        real = inputs["attention_mask"].bool()
        rows = real & alive[len(alive) - 1]
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5, msg=str(method))
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5, msg=str(method))
        assert (steps[:, 1:] - stock[1][:, 1:]).abs().max() > 1e-3, f"{method}: no teeth"
        per_image = method.budget(family.tokens)
        if "cache" not in method.stages:
            kept = (alive[len(alive) - 1] & (inputs["input_ids"] == IMAGE)).sum(1)
            assert kept.tolist() == [per_image, 2 * per_image]
        for i, length in enumerate(lengths):
            held = alive.cached[real.shape[1]][i] if alive.cached else alive[i]
            assert (held & real).sum(1).max() <= length <= held.sum(1).max()
        if family.pixels is not None:
            report = model.vtc.report()
            assert report.asked == 1.5 * per_image
            assert (report.grid == (4, 4)) == family.one_to_one  # else no patch is drawn wrongly
            if "cache" not in method.stages:
                assert report.final_tokens == 1.5 * per_image
                assert report.flops_all < report.flops_all_full


@EVERY
def test_keeping_all_is_stock_and_unwrap_restores(family: GenericFamily) -> None:
    model = family.build()
    stock, before = model(**family.inputs(model, [1, 2])).logits, snapshot(model)
    vtc.wrap(model, "fastv", keep_ratio=1.0)
    got = model(**family.inputs(model, [1, 2])).logits
    torch.testing.assert_close(got, stock, atol=1e-5, rtol=1e-5)
    vtc.unwrap(model)
    with vtc.compressing(model, "fastv", keep_ratio=0.5):
        assert not torch.equal(model(**family.inputs(model, [1, 2])).logits, stock)
    assert snapshot(model) == before
    assert torch.equal(model(**family.inputs(model, [1, 2])).logits, stock)


@EVERY
def test_what_was_found_is_said(family: GenericFamily) -> None:
    model = family.build()
    sites = locate(model)
    assert sites.family == family.name and family.name in sites.notes[0]
    assert bool(sites.missing) != family.one_to_one
    if family.one_to_one:
        assert sites.decoder is not None and sites.decoder.tokens_per_image == family.tokens
        return
    for method in ("random", "pitome", "downsample", "mustdrop"):
        with pytest.raises(vtc.UnsupportedError, match=r"one to one: .*methods that work here: "):
            vtc.wrap(model, method, **({} if method == "mustdrop" else {"keep_ratio": 0.5}))


# ---- what cannot work says so --------------------------------------------------------------------


def _meta(name: str, config: Any) -> Any:
    with torch.device("meta"):
        return getattr(hf, name)._from_config(config)


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "MllamaForConditionalGeneration": (
        lambda: hf.MllamaConfig(),
        "cross-attention .*MllamaCrossAttentionDecoderLayer",
    ),
    "IdeficsForVisionText2Text": (lambda: hf.IdeficsConfig(), "cross-attention"),
    "FuyuForCausalLM": (lambda: hf.FuyuConfig(), "no image encoder"),
    "Emu3ForConditionalGeneration": (
        lambda: hf.Emu3Config(
            vocabulary_map={"<image>": 5, "<|visual token 000001|>": 6},
            text_config=dict(TEXT),
        ),
        "no image encoder",
    ),
    "ChameleonForConditionalGeneration": (
        lambda: hf.ChameleonConfig(vocabulary_map={"<image>": 5, "IMGIMGA": 6}),
        "no image encoder",
    ),
    "InstructBlipVideoForConditionalGeneration": (
        lambda: hf.InstructBlipVideoConfig(),
        "get no rotary tables",
    ),
    "Florence2ForConditionalGeneration": (lambda: hf.Florence2Config(), "encoder-decoder"),
    "Kosmos2ForConditionalGeneration": (lambda: hf.Kosmos2Config(), "inner_attn_ln"),
    "GitForCausalLM": (lambda: hf.GitConfig(), "no list of layers"),
    "Llama4ForConditionalGeneration": (lambda: hf.Llama4Config(), "chunked_attention"),
    "Gemma3nForConditionalGeneration": (
        lambda: hf.Gemma3nConfig(),
        "(per_layer_input|v_norm)",  # newer and older releases
    ),
    "Ernie4_5_VLMoeForConditionalGeneration": (
        lambda: hf.Ernie4_5_VLMoeConfig(),
        "moe_mm_token_type_ids",
    ),
    "GraniteDoclingForConditionalGeneration": (
        lambda: hf.GraniteDoclingConfig(),
        "deepstack_visual_embeds",
    ),
    "Kimi_K25ForConditionalGeneration": (lambda: hf.Kimi_K25Config(), "kv_a_proj_with_mqa"),
    "MuseSparkForConditionalGeneration": (lambda: hf.MuseSparkConfig(), "gate_proj"),
    "Lfm2VlForConditionalGeneration": (
        lambda: hf.Lfm2VlConfig(
            text_config=text("lfm2", layer_types=["conv", "full_attention"] * 2),
            vision_config=dict(VISION, num_patches=16, model_type="siglip2_vision_model"),
        ),
        "conv",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_reason(name: str) -> None:
    config, words = REFUSED[name]
    model = _meta(name, config())
    before = snapshot(model)
    for method in ("fastv", "random"):
        with pytest.raises(vtc.UnsupportedError, match=rf"{name}: .*{words}.*supported: "):
            vtc.wrap(model, method)
    assert snapshot(model) == before


def test_chunked_prefill_of_an_image_is_refused() -> None:
    family = next(f for f in FAMILIES if f.one_to_one)
    model = family.build()
    vtc.wrap(model, "random", keep_ratio=0.5)
    inputs = family.inputs(model, [1])
    del inputs["pixel_values"]
    inputs = {k: v[:, :9] for k, v in inputs.items()}
    with pytest.raises(vtc.UnsupportedError, match="not a multiple of 16"):
        model(**inputs)


@torch.no_grad()
def test_videos_are_refused() -> None:
    """The class takes them, and where the frames' tokens stand is not known."""
    family = next(f for f in FAMILIES if f.name == "VideoLlama3ForConditionalGeneration")
    model = vtc.wrap(family.build(), "fastv", keep_ratio=0.5)
    inputs = family.inputs(model, [1])
    want = model(**inputs).logits
    for more in (
        {"pixel_values_videos": torch.zeros(1, 3, 32, 32)},
        {"mm_encoder_outputs": inputs["mm_encoder_outputs"] | {"video": object()}},
    ):
        with pytest.raises(vtc.UnsupportedError, match=r"videos of this model.*vtc\.unwrap"):
            model(**{**inputs, **more})
    assert torch.equal(model(**inputs).logits, want)


def test_prefix_tokens_that_stay_are_not_one_to_one() -> None:
    """DeepSeek-VL with a tower that has a class token: 17 tokens, which the projector would get."""
    config = hf.DeepseekVLConfig(
        vision_config=vision("clip_vision_model"), text_config=text(), **IDS
    )
    model = _meta("DeepseekVLForConditionalGeneration", config)
    with pytest.raises(vtc.UnsupportedError, match="puts 1 tokens in front and 0 are removed"):
        vtc.wrap(model, "random")
    vtc.wrap(model, "fastv")


# ---- what nobody has built yet -------------------------------------------------------------------


ONE_TO_ONE = next(f for f in FAMILIES if f.one_to_one)


def _refused(change: Callable[[Any], Any], method: str, words: str) -> Any:
    """A model with a change, on which the method does not work."""
    model = ONE_TO_ONE.build()
    change(model)
    with pytest.raises(vtc.UnsupportedError, match=words):
        vtc.wrap(model, method)
    return model


def _no_projector(model: Any) -> None:
    base = model.model
    base.bridge, base.other = base.aligner, nn.Linear(1, 1)
    del base.aligner


JOINED: dict[str, tuple[Callable[[Any], Any], str]] = {
    "no projector": (_no_projector, "no projector between encoder and LLM was found"),
    "layers": (
        lambda model: setattr(model.config, "vision_feature_layer", [-2, -3]),
        r"the projector reads several encoder layers \(\[-2, -3\]\)",
    ),
    "any size": (
        lambda model: setattr(model.config.vision_config, "image_size", [32, 64]),
        "the size of its images is not fixed",
    ),
    "fewer tokens": (
        lambda model: setattr(model.config, "image_seq_length", 4),
        r"16 patches become 4 tokens \(image_seq_length\)",
    ),
}


@pytest.mark.parametrize("what", JOINED)
def test_patches_that_may_not_be_tokens_are_left_alone(what: str) -> None:
    """Only methods inside the LLM are offered, which know nothing of patches."""
    change, words = JOINED[what]
    vtc.wrap(_refused(change, "random", f"are not one to one: {words}.*work here: "), "fastv")


def _own_get_encoder(model: Any) -> None:
    """Code of a model's own repository, written before get_encoder knew modalities."""
    model.get_encoder = lambda: model.model.vision_model


class Rotary(nn.Module):
    """Rotary tables of another kind than (cos, sin) for positions (B, L)."""

    def __init__(self, stock: Any, kind: str) -> None:
        super().__init__()
        self.stock, self.kind = stock, kind
        self.inv_freq = stock.inv_freq

    def forward(self, x: Tensor, position_ids: Tensor) -> Any:
        if self.kind == "axes":
            position_ids, _, _ = position_ids  # of time, height and width
        cos, sin = self.stock(x, position_ids)
        return {"complex": (torch.complex(cos, sin), sin), "one": cos}.get(self.kind, (cos, sin))


def _rotary(kind: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        decoder = model.model.language_model
        decoder.rotary_emb = Rotary(decoder.rotary_emb, kind) if kind else None

    return change


SEAMS: dict[str, tuple[Callable[[Any], Any], str]] = {
    "get_encoder": (_own_get_encoder, "it has no image encoder in front"),
    "placeholders": (
        lambda model: vars(model.config).update(image_token_id=None, image_token_index=None),
        "is not told by image_token_id and get_image_features",
    ),
    "recurrence": (
        lambda model: model.model.language_model.layers[2].add_module("conv", nn.Conv1d(4, 4, 2)),
        "LlamaDecoderLayer mixes tokens otherwise than by self-attention",
    ),
    "no rotary": (_rotary(""), r"not the pair \(cos, sin\)"),
    "complex tables": (_rotary("complex"), r"not the pair \(cos, sin\)"),
    "one table": (_rotary("one"), r"not the pair \(cos, sin\)"),
}


@pytest.mark.parametrize("what", SEAMS)
def test_other_seams_are_refused(what: str) -> None:
    change, words = SEAMS[what]
    _refused(change, "fastv", f"{ONE_TO_ONE.name}: .*{words}.*support")


def test_rotary_tables_for_three_axes_alone() -> None:
    model = ONE_TO_ONE.build()
    _rotary("axes")(model)
    assert locate(model).family == type(model).__name__


def test_text_models_and_others_stay_what_they_were() -> None:
    plain = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))
    with pytest.raises(vtc.UnsupportedError, match="text-only"):
        vtc.wrap(plain, "fastv")
    config = hf.LlavaConfig(**clip_llama())
    assert locate(_meta("LlavaForConditionalGeneration", config)).family == "LLaVA"
