# SPDX-License-Identifier: Apache-2.0
"""ToDRE, VScan and TOPS: one selection in front of the LLM and one inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mini_anyres
import mini_llava as mini
import pytest
import torch
from naive_two_places import _no_grad, features_view, prefill_and_steps
from torch import Tensor

import vtc
from vtc.benchmarks.support.masked_oracle import compare
from vtc.methods._stages import entering
from vtc.methods.todre import ToDRE
from vtc.methods.tops import TOPS
from vtc.methods.uniform import Uniform
from vtc.methods.vscan import VScan
from vtc.views.projections import Projections

__all__ = ["_no_grad"]  # fixtures


LAST = 5  # text tokens behind the image in the prompts of mini_llava


@pytest.mark.parametrize("name", ["todre", "vscan", "tops"])
def test_images_in_crops(name: str) -> None:
    model = mini_anyres.build("next")
    sizes = [[mini_anyres.WIDE], [mini_anyres.TINY, mini_anyres.SQUARE]]
    inputs = mini_anyres.prompt(sizes)
    for k in (2, 9):
        with vtc.compressing(model, name, keep_tokens=k) as session:
            model(**inputs)
            report = session.report()
        assert [len(kept) for kept in report.kept] == [k, k, k] or name != "todre"
        assert sum(len(kept) for kept in report.kept) == 3 * k
        assert report.final_tokens == 1.5 * k == report.asked


# ---- all three ---------------------------------------------------------------------------------

THREE: dict[str, Any] = {
    "todre": ToDRE,
    "todre random": lambda **k: ToDRE(pivot="random", **k),
    "vscan": VScan,
    "vscan one stage": lambda **k: VScan(llm_share=1.0, **k),
    "tops": TOPS,
    "tops received": lambda **k: TOPS(saliency="received", **k),
}


@pytest.mark.parametrize("name", THREE)
def test_budgets_in_front_of_the_llm(name: str) -> None:
    for k in (1, 2, 3, 7, 15, 16, 23, 24, 47):
        method = THREE[name](keep_tokens=k)
        want = min(48, entering(k, 48, getattr(method, "llm_share", 1.0)))
        done = method.on_features(features_view())
        assert method.budget(48) == k
        if want == 48:
            assert done is None
            continue
        assert done.keep.shape == (2, want) and done.valid is None
        assert (done.keep.diff(dim=1) > 0).all()
        assert bool((done.group >= 0).all()) == method.merges
    assert THREE[name](keep_ratio=1.0).on_features(features_view()) is None
    assert THREE[name](keep_tokens=480).on_features(features_view()) is None


@pytest.mark.parametrize("name", THREE)
def test_a_row_alone_in_front_of_the_llm(name: str) -> None:
    method = THREE[name](keep_tokens=5)
    v = features_view(batch=3)

    def alone(p: Projections) -> Projections:
        return Projections(lambda rows: p.query(rows)[1:2], lambda: p.key()[1:2], p.scale)

    one = replace(
        v,
        features=v.features[1:2],
        index=v.index[1:2],
        size=v.size[1:2],
        layers={i: alone(p) for i, p in v.layers.items()},
    )
    together, single = method.on_features(v), method.on_features(one)
    assert torch.equal(together.keep[1:2], single.keep)
    assert torch.equal(together.group[1:2], single.group)


@pytest.mark.parametrize("name", THREE)
def test_fixed_budgets_compile_without_a_graph_break(name: str) -> None:
    method, v = THREE[name](keep_tokens=2), features_view()

    class BudgetView:
        count, total, grid, depth = v.count, v.total, v.grid, v.depth
        index, row, crops = v.index, v.cls_attention(1), None

        def __init__(self, features: Tensor) -> None:
            self.features, self.projected = features, features

        def budget(self, m: Any) -> int:
            return m.budget(self.total, self.grid)

        def cls_attention(self, layer: int) -> Tensor:
            return self.row

        def attention_received(self, layer: int) -> Tensor:
            return self.row.mean(1)

    def step(features: Tensor) -> tuple[Tensor, Tensor]:
        done = method.on_features(BudgetView(features))
        return done.keep, done.group

    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True)
    for mine, want in zip(compiled(v.features), step(v.features), strict=True):
        assert torch.equal(mine, want)


@pytest.mark.parametrize("name", ["vscan", "tops"])
def test_small_budgets_on_llava(name: str) -> None:
    """Both selections at work, padded rows, two images: dropped is masked, mates do not matter."""
    inputs = mini.prompt([1, 2, 1], pad="left")
    model = mini.build()
    vtc.wrap(model, name, keep_tokens=2)
    (got, steps, _), (want, want_steps, _), alive = compare(
        model, lambda: prefill_and_steps(model, inputs)
    )
    rows = inputs["attention_mask"].bool() & alive[4]
    torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    visual = inputs["input_ids"] == mini.IMAGE
    start = entering(2, 16, model.vtc.methods[0].llm_share)
    for layer, per_image in ((0, start), (2, start), (3, 2), (4, 2)):
        assert (alive.get(layer, alive[4]) & visual).sum(1).tolist() == [
            per_image,
            2 * per_image,
            per_image,
        ]
    real = inputs["attention_mask"][1].bool()
    alone = model(
        input_ids=inputs["input_ids"][1:2, real],
        attention_mask=inputs["attention_mask"][1:2, real],
        pixel_values=inputs["pixel_values"][1:3],
    ).logits
    torch.testing.assert_close(got[1][real], alone[0], atol=1e-5, rtol=1e-5)


def test_half_precision() -> None:
    for name in ("todre", "vscan", "tops"):
        model = mini.build().bfloat16()
        inputs = mini.prompt()
        inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
        with vtc.compressing(model, name, keep_tokens=2) as session:
            out = model(**inputs)
            assert out.logits.dtype == torch.bfloat16 and session.report().final_tokens == 2


def test_chains() -> None:
    """Behind a method that has dropped some already."""
    model, inputs = mini.build(), mini.prompt([1, 2], pad="right")
    for later in (ToDRE(keep_tokens=3), VScan(keep_tokens=3), TOPS(keep_tokens=3)):
        with vtc.compressing(model, vtc.chain(Uniform(keep_tokens=10), later)) as session:
            model(**inputs)
            report = session.report()
        assert report.final_tokens == 4.5 == report.asked
        one, *two = map(len, report.kept)  # in the LLM, images of a prompt are ranked together
        assert one == 3 and sum(two) == 6 and all(max(k) < 16 for k in report.kept if len(k))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ToDRE(tau=-0.1), r"tau is a share of attention.*in \[0, 1\]; got -0.1"),
        (lambda: ToDRE(tau=1.5), "got 1.5"),
        (lambda: ToDRE(pivot="first"), "pivot is .*got 'first'"),
        (lambda: ToDRE(seed=0.5), "seed is an integer; got 0.5"),
        (lambda: ToDRE.paper("llava-next", 5), r'known: \("llava-next", tokens=288\)'),
        (lambda: VScan(window=0), "window is a side.*got 0"),
        (lambda: VScan(window=True), "got True"),
        (lambda: VScan(llm_share=0), r"llm_share is .*in \(0, 1\].*got 0"),
        (lambda: VScan(keep_ratio=0.1, keep_tokens=3), "not both"),
        (lambda: VScan.paper("llava-1.5", 32), "tokens=64"),
        (lambda: TOPS(llm_share=1.1), "got 1.1"),
        (lambda: TOPS(cover=-1.0), "cover is a weight.*got -1.0"),
        (lambda: TOPS(novel=float("nan")), "novel is a weight.*got nan"),
        (lambda: TOPS(saliency="attention"), "got 'attention'"),
        (lambda: TOPS.paper("llava-1.5", 64), "known: none"),
    ],
)
def test_bad_parameters_say_what_to_do(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
