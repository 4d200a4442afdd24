# SPDX-License-Identifier: Apache-2.0
"""Every method on features that break rankings: ties, zeros, huge and tiny numbers, one token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from functools import cache
from typing import Any

import mini
import mini_llava
import mini_qwen
import pytest
import torch
from adversarial import EXTREME, PATTERNS, PLACES, features, methods, model, replacing
from hypothesis import given
from hypothesis import strategies as st
from reductions import well_formed
from torch import Tensor

import vtc
from vtc.benchmarks.shared.budgets import seeded
from vtc.benchmarks.support import mini_families
from vtc.cache.codecs import Packing
from vtc.engine.finite import Finite
from vtc.method import split_answer
from vtc.methods.evs import EVS
from vtc.views.features import FeaturesView

DTYPES = (torch.float32, torch.float16)
ENTERS = {"pixels", "vision", "features", "decoder"}
"""Stages whose methods take tokens from the prefill for good."""


@pytest.fixture(autouse=True, scope="module")
def _answers_are_well_formed() -> Iterator[None]:
    """Whatever a hook answers, in every test of this file."""
    ask = Finite.ask

    def asked(self: Finite, hook: Any, view: Any, *where: Any) -> Any:
        answer = ask(self, hook, view, *where)
        reported = any(flag.rows.any() for flag in self.flags)
        if answer is not None and not isinstance(answer, Packing) and not reported:
            reduction, tokens = split_answer(answer)
            assert reduction is not None
            well_formed(reduction)
            assert (reduction.counts > 0).all(), "a row lost everything"
            assert tokens is None or tokens.isfinite().all()
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Finite, "ask", asked)
        yield


def prompts(batch: int, dtype: torch.dtype) -> dict[str, Tensor]:
    inputs = mini_llava.prompt(1, batch=batch)
    return inputs | {"pixel_values": inputs["pixel_values"].to(dtype)}


def run(
    method: vtc.Method, place: str, patterns: list[Any], dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Any]:
    """Logits of one prompt for each pattern, and the report."""
    stock = model(dtype)
    with (
        torch.no_grad(),
        vtc.compressing(stock, method) as session,
        replacing(stock, place, patterns, seed),
    ):
        logits = stock(**prompts(len(patterns), dtype), use_cache=True).logits
        return logits, session.report()


def kept(report: Any) -> list[list[int]]:
    return [k.tolist() for k in report.kept]


def check(method: vtc.Method, logits: Tensor, report: Any) -> None:
    """Finite, and as many tokens as were asked for."""
    assert logits.isfinite().all()
    if not method.has_budget:
        return
    budget = method.budget(mini_llava.PATCHES, (mini_llava.GRID, mini_llava.GRID))
    if method.stages & ENTERS:
        assert [len(k) for k in report.kept] == [budget] * len(logits)
        assert report.final_tokens == report.asked == budget
    elif "cache" in method.stages:
        assert report.kv_tokens == pytest.approx(report.asked, abs=0.5)


@cache
def among_its_like(name: str, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """A batch of that size of normal images."""
    return run(methods()[name], "encoder", [None] * (1 + len(PATTERNS)), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", methods())
def test_every_pattern_beside_a_normal_image(name: str, place: str, dtype: torch.dtype) -> None:
    """A batch of all patterns: each row is right, and the normal one does not notice the others."""
    method = methods()[name]
    logits, report = run(method, place, [None, *PATTERNS.values()], dtype)
    check(method, logits, report)
    normal, undisturbed = among_its_like(name, dtype)
    if name == "mustdrop-coupled":  # as published: all images of a batch merge as many windows
        return
    assert kept(report)[0] == kept(undisturbed)[0]
    close = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(logits[0], normal[0], atol=close, rtol=close)


IMAGE = st.sampled_from([None, *PATTERNS])


@given(
    st.sampled_from(sorted(methods())),
    st.sampled_from(PLACES),
    st.sampled_from(DTYPES),
    st.lists(IMAGE, min_size=1, max_size=3),
    st.integers(0, 2**20),
    st.integers(1, 15),
)
def test_any_mix_of_patterns(
    name: str, place: str, dtype: torch.dtype, images: list[str | None], seed: int, tokens: int
) -> None:
    """Any budget that the method can meet; twice the same."""
    method = methods()[name]
    if method.keep_tokens is not None:
        least = {"tome": 2, "pitome": 2, "mustdrop-coupled": 2}.get(name, 1)
        method = replace(method, keep_tokens=max(tokens, least))
    patterns = [None if i is None else PATTERNS[i] for i in images]
    logits, report = run(method, place, patterns, dtype, seed)
    check(method, logits, report)
    again, second = run(method, place, patterns, dtype, seed)
    assert torch.equal(logits, again) and kept(report) == kept(second)


@pytest.mark.parametrize("name", methods())
def test_extremes_are_right_or_reported(name: str) -> None:
    """Overflow inside the model is an error that says so; nothing else is."""
    for dtype in DTYPES:
        for pattern in EXTREME.values():
            try:
                result = run(methods()[name], "boundary", [None, pattern], dtype)
            except vtc.NotFiniteError as error:
                found = error.rows
            else:
                check(methods()[name], *result)
                continue
            assert found == (1,)


@pytest.mark.parametrize("size", [(4, 4), (4, 8)], ids=["one", "two"])
@torch.no_grad()
def test_one_and_two_patches_in_an_encoder(size: tuple[int, int]) -> None:
    """One patch stays; of two, one stays."""
    encoder = mini.ENCODERS["timm-vit"]()
    pixels = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(0))
    pixels[1] = 0
    patches = size[0] * size[1] // 16
    stock = encoder.forward_features(pixels)
    tried = 0
    for name, method in methods().items():
        if not method.stages <= {"pixels", "vision", "features"}:
            continue
        tried += 1
        one = seeded(name, 1, 0) if name in vtc.methods() else replace(method, keep_tokens=None)
        with vtc.compressing(encoder, one) as session:
            assert encoder(pixels).isfinite().all()
            assert session.report().final_tokens == 1 or not one.has_budget
            out = encoder.forward_features(pixels)
            assert patches > 1 or torch.allclose(out, stock, atol=1e-5)
    assert tried > 15


@torch.no_grad()
def test_one_and_two_visual_tokens_in_the_llm() -> None:
    """Rows with one token, two and many in one batch: none loses its last one."""
    stock = mini_qwen.build()
    inputs = mini_qwen.prompt([[(1, 1)], [(1, 2)], [(3, 5)]], pad="left")
    tried = 0
    for name, cls in vtc.methods().items():
        if "frames" in cls.needs:
            continue
        try:
            method = (
                methods()[name] if name in ("mod", "vidkv") else seeded(name, Fraction(1, 2), 0)
            )
            vtc.wrap(stock, replace(method, **cls.without_cls, **cls.outside_encoder))
        except vtc.UnsupportedError:  # acts inside the encoder, or needs [CLS]
            continue
        tried += 1
        logits, report = stock(**inputs).logits, stock.vtc.report()
        vtc.unwrap(stock)
        assert logits[inputs["attention_mask"].bool()].isfinite().all(), name
        counts = [len(k) for k in report.kept]
        if method.has_budget and method.stages & ENTERS:
            assert counts == [1, 1, method.budget(15, (3, 5))], name
        assert all(counts), name
    assert tried > 20


@pytest.mark.soak
@pytest.mark.parametrize("family", ["LLaVA-NeXT", "LLaVA-OneVision", "Qwen2.5-VL", "InternVL"])
@torch.no_grad()
def test_crops_tiles_and_grids(family: str) -> None:
    """Every pattern in place of what goes into the projector, images of several sizes."""
    stock, made = mini_families.build(family), mini_families.EVERY[family]
    first, second, third = made.sizes
    inputs = mini_families.prompt(family, [[first, second], [third]], pad="left")
    real = inputs["attention_mask"].bool()
    tried = 0
    for name, cls in vtc.methods().items():
        if name in ("mod", "evs"):  # routers, videos
            continue
        method = seeded(name, None if name == "vidkv" else Fraction(1, 3), 0)
        try:
            method = method if made.has_cls else replace(method, **cls.without_cls)
            vtc.wrap(stock, replace(method, **cls.outside_encoder) if made.joins else method)
        except vtc.UnsupportedError:  # acts inside the encoder, or needs [CLS]
            continue
        llm = stock.vtc.sites.decoder
        for pattern in PATTERNS.values():

            def put(module: Any, args: tuple, pattern: Any = pattern) -> tuple:
                x = args[0].flatten(0, -2)
                return (features(pattern, 0, x).reshape(args[0].shape), *args[1:])

            source = llm.projector if llm.grids is None else llm.grids.source
            handle = source.register_forward_pre_hook(put, prepend=True)
            logits, report = stock(**inputs).logits, stock.vtc.report()
            again, second_report = stock(**inputs).logits, stock.vtc.report()
            handle.remove()
            tried += 1
            assert logits[real].isfinite().all(), name
            assert torch.equal(logits, again) and kept(report) == kept(second_report), name
            if method.has_budget and method.stages & ENTERS and report.asked is not None:
                assert report.final_tokens == pytest.approx(report.asked), name
        vtc.unwrap(stock)
    assert tried > 20 * len(PATTERNS)


@given(st.sampled_from(sorted(PATTERNS)), st.integers(1, 5), st.integers(1, 6), st.data())
def test_evs_on_any_video(pattern: str, frames: int, patches: int, data: Any) -> None:
    """The first frame stays, and exactly the budget."""
    n = frames * patches
    k = data.draw(st.integers(patches, n))
    x = PATTERNS[pattern](torch.Generator().manual_seed(k), n, 16)[None]
    view: Any = FeaturesView(
        features=x,
        size=torch.ones(1, n),
        index=torch.arange(n)[None],
        total=n,
        grid=(1, patches),
        prefix=0,
        has_cls=False,
        projector=lambda features: features,
        layers={},
        depth=1,
        frame=torch.arange(n)[None] // patches,
        frames=frames,
        share=k,
    )
    reduction = EVS(keep_tokens=k).on_features(view)
    if reduction is None:
        assert k == n
        return
    well_formed(reduction)
    assert reduction.counts.tolist() == [k]
    assert reduction.keep[0, :patches].tolist() == list(range(patches))
