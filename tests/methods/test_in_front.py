# SPDX-License-Identifier: Apache-2.0
"""PruMerge, VisPruner, HoloV, CDPruner and TokenCorr: the methods between encoder and LLM."""

from __future__ import annotations

from dataclasses import replace

import mini_llava as mini
import pytest
import torch
from naive_in_front import ADAPTIVE, METHODS, query, rows_of
from snapshot import snapshot
from synthetic_views import BUDGETS, N, features_view, well_formed

import vtc
from vtc.errors import UnsupportedError
from vtc.methods.cdpruner import CDPruner
from vtc.methods.holov import HoloV
from vtc.methods.prumerge import PruMerge
from vtc.methods.tokencorr import TokenCorr
from vtc.methods.vispruner import VisPruner


def split(answer):
    return answer if isinstance(answer, tuple) else (answer, None)


# ---- contracts of all of them ------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("k", BUDGETS)
def test_the_budget_is_met_exactly(name, k):
    method = METHODS[name](keep_tokens=k)
    view = features_view(has_cls="cls" in method.needs or "received" not in name)
    reduction, tokens = split(method.on_features(view))
    assert reduction.valid is None
    well_formed(reduction, N, k)
    assert method.has_budget
    if method.merges:
        assert (reduction.group >= 0).all()
    else:
        assert ((reduction.group >= 0).sum(1) == k).all()
    assert tokens is None or tokens.shape == (2, k, view.features.shape[2])


@pytest.mark.parametrize("name", METHODS)
def test_keeping_everything_is_a_no_op(name):
    for budget in ({"keep_ratio": 1.0}, {"keep_tokens": N}, {"keep_tokens": 10 * N}):
        assert METHODS[name](**budget).on_features(features_view()) is None


@pytest.mark.parametrize("name", [*METHODS, *(f"{a}, adaptive" for a in ADAPTIVE)])
def test_an_image_does_not_depend_on_its_batch_mates(name):
    adaptive = ADAPTIVE.get(name.removesuffix(", adaptive")) if "adaptive" in name else None
    method = adaptive or METHODS[name](keep_ratio=0.3)
    both = features_view(batch=3)
    together, made = split(method.on_features(both))
    counts = together.counts.tolist()
    for row in range(3):
        alone, tokens = split(method.on_features(rows_of(both, slice(row, row + 1))))
        n = counts[row]
        assert alone.count == n
        assert torch.equal(together.keep[row, :n], alone.keep[0])
        assert torch.equal(together.group[row], alone.group[0])
        if made is not None:
            torch.testing.assert_close(made[row, :n], tokens[0], atol=1e-6, rtol=1e-5)
    if adaptive is not None:
        assert len(set(counts)) > 1, "rows agree: the ragged case is not tested"
        assert all(1 <= n < N for n in counts)
        assert not method.has_budget


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_and_no_side_effects(name):
    method, view = METHODS[name](keep_ratio=0.3), features_view()
    before, state = view.features.clone(), torch.get_rng_state()
    first, _ = split(method.on_features(view))
    assert torch.equal(first.group, split(method.on_features(view))[0].group)
    assert torch.equal(view.features, before) and torch.equal(torch.get_rng_state(), state)
    assert not view.scratch
    half = replace(view, features=view.features.bfloat16())
    reduction, tokens = split(method.on_features(half))
    well_formed(reduction, N, first.count)
    assert tokens is None or tokens.dtype == torch.bfloat16


@pytest.mark.parametrize("name", METHODS)
def test_fixed_budgets_compile_without_a_graph_break(name):
    method = METHODS[name](keep_tokens=9)
    view = features_view()

    def step(x):
        reduction, tokens = split(method.on_features(replace(view, features=x)))
        return reduction.keep, reduction.group, reduction.select(x) if tokens is None else tokens

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for mine, theirs in zip(compiled(view.features), step(view.features), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruMerge(neighbours=-1), "neighbours is a count"),
        (lambda: VisPruner(important=1.2), "share of the budget"),
        (lambda: VisPruner(saliency="mean"), '"cls" or "received"'),
        (lambda: HoloV(chunks=0), "at least 1"),
        (lambda: HoloV(tau=-1.0), "at least 0"),
        (lambda: HoloV(variant="v2"), '"paper" or "code"'),
        (lambda: HoloV(variant="code", tau=2.0), "no tau"),
        (lambda: HoloV(saliency="mean"), '"cls" or "received"'),
        (lambda: CDPruner(relevance="clip"), '"text" or "none"'),
        (lambda: CDPruner(text=torch.ones(1, 8)), "for_prompts"),
        (lambda: CDPruner(relevance="none", text=query()), "leave one"),
        (lambda: CDPruner(relevance="none", inverted=False), "leave inverted out"),
        (lambda: TokenCorr(similarity=1.5), "cosine"),
        (lambda: TokenCorr(duplicates=-1), "at least 0"),
        (lambda: TokenCorr(seed=0.5), "integer"),
        (lambda: TokenCorr(saliency="mean"), '"cls" or "received"'),
    ],
)
def test_bad_parameters(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_published_settings():
    assert PruMerge.paper("llava-1.5", tokens=144) == PruMerge(plus=True)
    assert not PruMerge.paper("llava-1.5", tokens=32).has_budget
    assert VisPruner.paper("llava-1.5", tokens=64) == VisPruner(keep_tokens=64)
    assert HoloV.paper("llava-1.5", tokens=192) == HoloV(keep_tokens=192)
    assert CDPruner.paper("llava-1.5", tokens=32).keep_tokens == 32
    with pytest.raises(UnsupportedError, match="known: none"):
        TokenCorr.paper("docowl-1.5", tokens=100)


@pytest.mark.parametrize(
    "method", [PruMerge(), PruMerge(plus=True), TokenCorr(similarity=0.2, duplicates=3)]
)
@pytest.mark.parametrize("tower", ["clip", "dinov2"])
@torch.no_grad()
def test_adaptive_counts_run_ragged_and_padded(method, tower):
    """Without a budget images keep what they need; a row alone gives the same logits."""
    model = vtc.wrap(mini.build(tower), method)
    for seed in range(3, 9):  # random weights differ between releases, and rarely images agree
        inputs = mini.prompt([1, 2, 1], pad="left", seed=seed)
        together = model(**inputs).logits
        report = model.vtc.report()
        counts = [len(k) for k in report.kept]
        if len(set(counts)) > 1:
            break
    assert report.asked is None and "asked" not in str(report)
    assert all(1 <= n < mini.PATCHES for n in counts) and len(set(counts)) > 1
    assert report.final_tokens == sum(counts) / 3
    assert report.tokens_per_layer == [report.final_tokens] * 5
    model.generate(**inputs, max_new_tokens=3)
    image = 0
    for r, n in enumerate([1, 2, 1]):
        real = inputs["attention_mask"][r].bool()
        alone = model(
            input_ids=inputs["input_ids"][r : r + 1, real],
            attention_mask=inputs["attention_mask"][r : r + 1, real],
            pixel_values=inputs["pixel_values"][image : image + n],
        ).logits
        assert [len(k) for k in model.vtc.report().kept] == counts[image : image + n]
        image += n
        torch.testing.assert_close(together[r][real], alone[0], atol=1e-5, rtol=1e-5)


def test_the_class_similarity_takes_heads_as_one():
    view = features_view(batch=1)
    block = view.layers[view.depth - 1]
    q, k = block.query(slice(0, 1))[0, :, 0].flatten(), block.key()[0].transpose(0, 1).flatten(1)
    want = (k @ q / q.numel() ** 0.5).softmax(0)[1:]
    torch.testing.assert_close(view.cls_similarity(-1)[0], want)
    assert view.cls_similarity(-1).sum() < 1  # [CLS] itself has its share


def test_without_text_it_refuses_before_anything_runs():
    model = mini.build()
    before = snapshot(model)
    with pytest.raises(
        UnsupportedError, match=r"for_prompts.*relevance=\"none\".*do without: .*divprune"
    ):
        vtc.wrap(model, "cdpruner", keep_tokens=6)
    assert snapshot(model) == before
    vtc.wrap(model, "cdpruner", keep_tokens=6, relevance="none")
