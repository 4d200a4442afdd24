# SPDX-License-Identifier: Apache-2.0
"""Features and scores that are not a number are reported by every method; the next call is
right."""

from __future__ import annotations

import copy
import pickle
from dataclasses import dataclass
from typing import Any

import mini
import mini_llava
import pytest
import torch
from adversarial import BROKEN, PLACES, methods, model, replacing
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import vtc
from vtc.benchmarks.support import mini_families
from vtc.engine.finite import Finite, broken
from vtc.method import Scorer
from vtc.methods.dart import DART
from vtc.methods.fastervlm import FasterVLM
from vtc.views.features import FeaturesView

CASES = [("boundary", how) for how in BROKEN] + [(p, "one nan") for p in PLACES if p != "boundary"]
ENCODER = {"pixels", "vision", "features"}


def fails(call: Any) -> vtc.NotFiniteError:
    with pytest.raises(vtc.NotFiniteError, match="not a number") as error, torch.no_grad():
        call()
    return error.value


@pytest.mark.parametrize("name", methods())
@torch.no_grad()
def test_every_method_reports_it(name: str) -> None:
    """Wherever the image breaks; then the same model with the method, and without, is right."""
    stock, method, inputs = model(torch.float32), methods()[name], mini_llava.prompt(1, batch=3)
    plain = stock(**inputs).logits
    with vtc.compressing(stock, method) as session:
        want = stock(**inputs).logits
        for place, how in CASES:
            with replacing(stock, place, [None, BROKEN[how], None], 0):
                error = fails(lambda: stock(**inputs))
            assert error.rows == (1,), (place, how)
            assert error.stage in {"features", *method.stages}
            assert f"{error.method}: " in f"{error}: " and error.method in ("", method.name)
            assert not session.decoder.finite.flags and session.decoder.forward is None
        assert torch.equal(stock(**inputs).logits, want)
        assert not session.vision or not session.vision.finite.flags
    assert torch.equal(stock(**inputs).logits, plain)


@torch.no_grad()
def test_generate_gives_no_answer() -> None:
    stock, inputs = model(torch.float32), mini_llava.prompt(1, batch=2)
    with vtc.compressing(stock, "fastv", keep_tokens=4):
        want = stock.generate(**inputs, max_new_tokens=3, do_sample=False)
        with replacing(stock, "llm", [None, BROKEN["nan"]], 0):
            error = fails(lambda: stock.generate(**inputs, max_new_tokens=3))
        assert (error.method, error.stage, error.layer, error.rows) == ("fastv", "decoder", 1, (1,))
        assert "behind LLM layer 1" in str(error) and "in prompt 1 " in str(error)
        assert torch.equal(stock.generate(**inputs, max_new_tokens=3, do_sample=False), want)


@torch.no_grad()
def test_features_that_were_encoded_before() -> None:
    """Rows of NaN are dropped tokens there; but not all rows of an image."""
    stock, inputs = model(torch.float32), mini_llava.prompt(1, batch=2)
    features = stock.get_image_features(inputs.pop("pixel_values")).pooler_output
    features = [features[0], torch.full_like(features[1], torch.nan)]
    encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
    with vtc.compressing(stock, "divprune", keep_tokens=4):
        error = fails(lambda: stock(**inputs, mm_encoder_outputs=encoded))
    assert (error.method, error.stage, error.rows) == ("", "features", (1,))


@pytest.mark.parametrize("family", ["timm-vit", "hf-clip", "open-clip"])
@torch.no_grad()
def test_encoders_alone(family: str) -> None:
    encoder, pixels = mini.ENCODERS[family](), mini.images(3)
    tried = 0
    for name, method in methods().items():
        # Resizing ranks nothing: what it gives is not a number, like the stock model's answer.
        if not method.stages <= {"vision", "features"}:
            continue
        tried += 1
        with vtc.compressing(encoder, method):
            want = encoder(pixels)
            nan = pixels.clone()
            nan[2, 0, 0, 0] = torch.nan
            error = fails(lambda nan=nan: encoder(nan))
            assert error.rows == (2,) and error.method == method.name, name
            got = encoder(pixels)
            first = lambda x: x[0] if isinstance(x, (tuple, dict)) else x  # noqa: E731
            assert torch.equal(first(got), first(want)), name
    assert tried > 10


@pytest.mark.parametrize("family", sorted(mini_families.EVERY))
@torch.no_grad()
def test_every_family(family: str) -> None:
    """In front of the LLM, inside it, and by `vtc.compress_inputs`."""
    stock = mini_families.build(family)
    sizes = mini_families.EVERY[family].sizes
    inputs = mini_families.prompt(family, [[sizes[0]], [sizes[1]]], pad="left")
    nan = {k: v.clone() for k, v in inputs.items()}
    nan["pixel_values"][0, ..., 0] = torch.nan
    for name in ("divprune", "fastv"):
        with vtc.compressing(stock, name, keep_ratio=0.5):
            want = stock(**inputs).logits
            error = fails(lambda: stock(**nan))
            # Pixtral and Qwen2-VL run all images as one masked sequence: NaN gets to the others.
            assert error.rows in ((0,), (0, 1))
            assert torch.equal(stock(**inputs).logits, want)
    if family == "Gemma 3":  # compress_inputs refuses its sliding window
        return
    fails(lambda: vtc.compress_inputs(stock, nan, "divprune", keep_ratio=0.5))
    vtc.compress_inputs(stock, inputs, "divprune", keep_ratio=0.5)


@torch.no_grad()
def test_text_that_ranks_counts_too() -> None:
    """DART compares with text tokens; padding may hold anything."""
    stock, inputs = model(torch.float32), mini_llava.prompt([1, 1], pad="left")
    table = stock.get_input_embeddings()

    def embedded(r: int, column: int) -> None:
        def put(module: nn.Module, args: tuple, out: Tensor) -> Tensor:
            out = out.clone()
            out[r, column] = torch.nan
            return out

        handle = table.register_forward_hook(put)
        try:
            stock(**inputs)
        finally:
            handle.remove()

    with vtc.compressing(stock, DART(keep_tokens=4)):
        error = fails(lambda: embedded(0, -1))
    assert (error.method, error.stage, error.layer, error.rows) == ("dart", "decoder", 1, (0,))


def test_padding_does_not_count() -> None:
    x = torch.zeros(3, 4, 2)
    x[1, 3], x[2, 0, 1] = torch.nan, torch.inf
    assert broken(x).tolist() == [False, True, True]
    real = torch.ones(3, 4, dtype=torch.bool)
    real[1, 3] = False
    assert broken(x, real).tolist() == [False, False, True]
    assert broken(torch.full((1, 2, 3, 4), 1e19)).all(), "its norm is infinite"
    assert not broken(torch.full((1, 2, 64), 65504.0).half()).any()
    assert not broken(torch.full((1, 2, 3), 1e30).double()).any()


@dataclass(frozen=True, kw_only=True)
class Scores(Scorer):
    """Scores as they are given, and an error where they are none."""

    given: Any = None
    name = "scores"

    def score(self, v: FeaturesView) -> Tensor:
        if self.given is None:
            raise KeyError("mine")
        return self.given.expand(len(v.features), -1)


@torch.no_grad()
def test_scores_are_looked_at() -> None:
    """NaN among them; infinity is what methods give to tokens that stay or go in any case."""
    stock, inputs = model(torch.float32), mini_llava.prompt(1, batch=2)
    given = torch.arange(16.0)
    given[3], given[5] = torch.inf, -torch.inf
    with vtc.compressing(stock, Scores(given=given, keep_tokens=4)) as session:
        stock(**inputs)
        assert [k.tolist() for k in session.report().kept] == [[3, 13, 14, 15]] * 2
    given[7] = torch.nan
    with vtc.compressing(stock, Scores(given=given, keep_tokens=4)):
        error = fails(lambda: stock(**inputs))
    assert error.rows == (0, 1) and "scores: the scores between encoder and LLM" in str(error)


@torch.no_grad()
def test_a_hook_that_fails() -> None:
    """On features that are not a number it failed because of them; else its error is its own."""
    stock, inputs = model(torch.float32), mini_llava.prompt(1, batch=2)
    with vtc.compressing(stock, Scores(keep_tokens=4)):
        with pytest.raises(KeyError, match="mine"):
            stock(**inputs)
        with replacing(stock, "boundary", [BROKEN["nan"], None], 0):
            error = fails(lambda: stock(**inputs))
        assert isinstance(error.__cause__, KeyError) and error.rows == (0,)


@torch.no_grad()
def test_attention_of_the_last_block_alone() -> None:
    """FasterVLM ranks by a block whose output the LLM never sees: only its scores can tell."""
    stock, inputs = model(torch.float32), mini_llava.prompt(1, batch=2)
    tower = stock.model.vision_tower
    last = getattr(tower, "vision_model", tower).encoder.layers[-1].self_attn.q_proj
    kept = last.weight.clone()
    with vtc.compressing(stock, FasterVLM(keep_tokens=4)):
        last.weight.fill_(torch.nan)
        error = fails(lambda: stock(**inputs))
        last.weight.copy_(kept)
        assert error.rows == (0, 1) and "fastervlm: the scores" in str(error)
        stock(**inputs)


def test_the_error_travels() -> None:
    """Between processes: with its message and what it says apart."""
    error = vtc.NotFiniteError("text", "fastv", "decoder", 1, (0, 2))
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert str(other) == "text" and vars(other) == vars(error)


def test_nothing_is_read_while_compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    finite, x = Finite("image"), torch.full((1, 2, 3), torch.nan)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    finite.look_at_projected(x)
    assert finite.ask(lambda view: "answer", x, "any", "features") == "answer"
    assert not finite.flags
