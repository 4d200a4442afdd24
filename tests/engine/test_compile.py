# SPDX-License-Identifier: Apache-2.0
"""torch.compile: a fixed budget is one graph with the eager logits; adaptive methods say they are
not.

``backend="eager"`` is Dynamo alone, which decides what is a graph; one case runs AOTAutograd too.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import mini_llava as mini
import pytest
import torch
from llava_cases import budget
from mini_anyres import build as build_anyres
from mini_generic import FAMILIES as GENERIC
from torch import Tensor
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.methods.fastv import FastV
from vtc.methods.pitome import PiToMe
from vtc.methods.prumerge import PruMerge
from vtc.methods.visionzip import VisionZip
from vtc.methods.zipvl import ZipVL
from vtc.transformers_contract import cache_left, giving

CLOSE: dict[str, float] = dict(atol=1e-6, rtol=1e-6)


FIXED = [
    n
    for n in sorted(set(vtc.methods()) - {"mod", "vidkv", "evs"})
    if seeded(n, budget(n), 0).compiles
]
ADAPTIVE = [n for n in sorted(set(vtc.methods()) - {"mod", "vidkv", "evs"}) if n not in FIXED]
FAST = {"pitome", "zipvl"}
"""Beside the chain: notes from layer to layer of the tower, tokens around an LLM layer."""
DEEP = {"pyramiddrop", "transprune"}
"""These prune after three layers of the LLM and need a fourth."""
CHAIN = vtc.chain(PiToMe(keep_tokens=12), VisionZip(keep_tokens=8), FastV(keep_tokens=5))
CASES = [pytest.param(n, marks=[] if n in FAST else pytest.mark.slow) for n in FIXED]


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch._dynamo.reset()
    logging.disable(logging.DEBUG)  # pytest would collect every step of the tracing
    yield
    logging.disable(logging.NOTSET)
    torch._dynamo.reset()


def build(layers: int = 3, **how: Any) -> Any:
    """A mini model of few blocks and LLM layers: tracing takes long."""
    depth = {"num_hidden_layers": layers}
    with patch.dict(mini._vision, depth), patch.dict(mini._text, depth):
        return mini.build(**how)


def step(model: Any, out: Any, inputs: dict[str, Tensor], token: int) -> Any:
    mask = inputs["attention_mask"]
    mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    return model(
        input_ids=torch.full((len(mask), 1), token),
        attention_mask=mask,
        position_ids=mask.cumsum(1)[:, -1:] - 1,
        **giving(model, cache_left(out)),
    )


@pytest.mark.parametrize("method", [*CASES, pytest.param(CHAIN, id="chain")])
@torch.no_grad()
def test_one_graph(method: Any) -> None:
    """Prefill of the whole model, pixels and cache included, and a decoded token."""
    chosen = seeded(method, budget(method), 0) if isinstance(method, str) else method
    model = vtc.wrap(build(4 if method in DEEP else 3), chosen)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    first, second = (mini.prompt(2, batch=2, pad="left", seed=s) for s in (0, 1))
    model(**first)  # Hugging Face takes a lock in the first forward, which no graph can hold
    for inputs in (first, second):
        eager = model(**inputs, use_cache=True)
        report = model.vtc.report()
        got = compiled(**inputs, use_cache=True)
        torch.testing.assert_close(got.logits, eager.logits, **CLOSE)
        for a, b in zip(cache_left(got).layers, cache_left(eager).layers, strict=True):
            assert a.keys.shape == b.keys.shape and a.get_seq_length() == b.get_seq_length()
        assert model.vtc.report().tokens_per_layer == report.tokens_per_layer
        assert set(model.vtc.report().stages(1)) == {
            (label, n)
            for label, n in report.stages(1)
            if "KV" not in label  # not read in a graph
        }
        assert counter.frame_count == 1, "one graph, also for other pixels and words"
        want = step(model, eager, inputs, 7).logits
        torch.testing.assert_close(step(model, got, inputs, 7).logits, want, **CLOSE)
    vtc.unwrap(model)
    assert (model(**second).logits[:, -1] - eager.logits[:, -1]).abs().max() > 1e-3 or (
        "cache" in chosen.stages
    )


@torch.no_grad()
def test_decoding_in_a_graph() -> None:
    """The steps go through the compiled model as well, with the cache of its prefill."""
    model = vtc.wrap(build(), CHAIN)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    inputs = mini.prompt(1, batch=2, pad="left")
    want, got = model(**inputs, use_cache=True), compiled(**inputs, use_cache=True)
    for token in (7, 8):
        want, got = step(model, want, inputs, token), step(compiled, got, inputs, token)
        torch.testing.assert_close(got.logits, want.logits, **CLOSE)
        more = inputs["attention_mask"].new_ones(2, 1)
        inputs["attention_mask"] = torch.cat([inputs["attention_mask"], more], 1)


@torch.no_grad()
def test_language_model_alone() -> None:
    """The base model stays eager: where the images lie is known before the graph."""
    model = vtc.wrap(build(attention="eager"), CHAIN)
    prompts = [mini.prompt(n, batch=2, pad=pad) for n, pad in ((2, "left"), (1, "right"))]
    want = [model(**p).logits for p in prompts]
    model.get_decoder().compile(backend="eager", fullgraph=True)
    for p, logits in zip(prompts, want, strict=True):
        torch.testing.assert_close(model(**p).logits, logits, **CLOSE)
    with pytest.raises(RuntimeError, match="as many visual tokens in every prompt"):
        model(**mini.prompt([1, 2], pad="left"))


@pytest.mark.slow
@torch.no_grad()
def test_through_autograd() -> None:
    """backend="aot_eager", and the assertion that stands in for what the graph cannot branch on."""
    model = vtc.wrap(build(), VisionZip(keep_tokens=6))
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    inputs = mini.prompt(2, batch=2, pad="left")
    want = model(**inputs).logits
    torch.testing.assert_close(compiled(**inputs).logits, want, **CLOSE)
    assert counter.frame_count == 1
    uneven = mini.prompt([1, 3], pad="left")
    with pytest.raises(RuntimeError, match="different numbers of images"):
        compiled(**uneven)
    broken = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    broken["pixel_values"][0] = torch.nan
    with pytest.raises(RuntimeError, match="not a number"):
        compiled(**broken)


@pytest.mark.parametrize(
    "method", [*ADAPTIVE, "vidkv", PruMerge(), ZipVL(), vtc.chain("divprune", "sparsevlm")], ids=str
)
@torch.no_grad()
def test_adaptive_methods_say_so(method: Any) -> None:
    model = vtc.wrap(mini.build(), method)  # some need all five layers
    inputs = mini.prompt(1, batch=2)
    want = model(**inputs).logits
    with pytest.raises(Exception, match=r"data decide.*without fullgraph.*fixed budget") as error:
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    assert isinstance(error.value, torch._dynamo.exc.TorchDynamoException)
    torch.testing.assert_close(model(**inputs).logits, want, **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_adaptive_methods_run_outside_the_graph() -> None:
    """Without fullgraph=True nothing is lost but speed; the same with uneven prompts."""
    model = vtc.wrap(build(), PruMerge())
    inputs = mini.prompt([1, 2], pad="left")
    want = model(**inputs).logits
    got = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(got, want, **CLOSE)
    vtc.unwrap(model)
    vtc.wrap(model, CHAIN)
    want = model(**inputs).logits
    got = torch.compile(model, backend="eager")(**inputs).logits
    torch.testing.assert_close(got, want, **CLOSE)


@torch.no_grad()
def test_crops_say_so() -> None:
    model = vtc.wrap(build_anyres("next"), VisionZip(keep_tokens=6))
    with pytest.raises(Exception, match=r"crops.*vtc\.compress_inputs"):
        torch.compile(model, backend="eager", fullgraph=True)(**mini.prompt(1))


@torch.no_grad()
def test_lengths_that_no_shape_tells_say_so() -> None:
    model = vtc.wrap(build(), CHAIN)
    model(**mini.prompt(1))  # Hugging Face installs hooks of its own the first time
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"3 images for 2 prompts.*one by one"):
        compiled(**mini.prompt([1, 2], pad="left"))
    family = next(f for f in GENERIC if f.name == "VideoLlama3ForConditionalGeneration")
    other = family.build()
    other(**family.inputs(other, [1]))
    compiled = torch.compile(vtc.wrap(other, "fastv"), backend="eager", fullgraph=True)
    with pytest.raises(Exception, match=r"images of one size.*get_decoder\(\)\.compile"):
        compiled(**family.inputs(other, [1]))


@pytest.mark.parametrize("how", ["in place", pytest.param("wrapper", marks=pytest.mark.slow)])
@torch.no_grad()
def test_wrap_and_unwrap_after_compiling(how: str) -> None:
    """Dynamo does not look at hooks again: graphs are forgotten when they come and go."""
    model, inputs = build(), mini.prompt(1, batch=2)
    stock = model(**inputs).logits
    run = model
    if how == "wrapper":
        run = torch.compile(model, backend="eager")
    else:
        model.get_decoder().compile(backend="eager")
    torch.testing.assert_close(run(**inputs).logits, stock, **CLOSE)
    inner = getattr(run, "_orig_mod", run)
    vtc.wrap(inner, FastV(keep_tokens=4))
    compressed = run(**inputs).logits
    assert (compressed - stock).abs().max() > 1e-3, "the hooks are in"
    vtc.unwrap(run)
    torch.testing.assert_close(run(**inputs).logits, stock, **CLOSE)
