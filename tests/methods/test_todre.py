# SPDX-License-Identifier: Apache-2.0
"""`todre` by itself."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import mini_anyres
import mini_llava as mini
import pytest
import torch
from naive_two_places import (
    CASES,
    _no_grad,
    cosine,
    features_view,
    kept_by,
    prefill_and_steps,
    random_tokens,
    stock,
)
from torch import Tensor

import vtc
from vtc.benchmarks.support.masked_oracle import compare
from vtc.methods.fastv import FastV
from vtc.methods.todre import ToDRE, max_sum_order
from vtc.methods.tops import TOPS
from vtc.methods.vscan import VScan
from vtc.views.features import FeaturesView

__all__ = ["_no_grad"]  # fixtures


ANGLES = torch.tensor([0.0, 10, 25, 90, 100, 180, 205, 300]).deg2rad()
V8 = torch.stack([ANGLES.cos(), ANGLES.sin()], 1)[None]


def naive_max_sum(x: Tensor, pivot: int, k: int) -> list[int]:
    chosen = [pivot]
    while len(chosen) < k:
        rest = [i for i in range(len(x)) if i not in chosen]
        chosen.append(min(rest, key=lambda i: sum(cosine(x[i], x[c]) for c in chosen)))
    return chosen


def test_todre_worked_example() -> None:
    """Angles 0 and 180 cancel, so the third pick is a tie that only rounding breaks; a degree does.

    DivPrune takes 7, 4, 6, 2 of the same tokens.
    """
    pivot = torch.tensor([0])
    order = max_sum_order(V8, pivot, 4)[0].tolist()
    assert order[:2] == [0, 5]
    tie = V8[0] @ (V8[0, 0] + V8[0, 5])
    assert tie.abs().max() < 1e-6
    angles = torch.tensor([0.0, 10, 25, 90, 100, 179, 205, 300]).deg2rad()
    x = torch.stack([angles.cos(), angles.sin()], 1)[None]
    assert max_sum_order(x, pivot, 4)[0].tolist() == [0, 5, 7, 4]


def test_todre_is_the_naive_loop() -> None:
    x, _ = random_tokens(3, 23)
    pivot = torch.tensor([4, 0, 22])
    for k in (1, 2, 7, 23):
        order = max_sum_order(x, pivot, k)
        for row in range(3):
            assert order[row].tolist() == naive_max_sum(x[row], int(pivot[row]), k)


def test_todre_equal_features_stay_in_order() -> None:
    x = torch.ones(2, 6, 3)
    x[1] = 0  # no direction at all
    assert max_sum_order(x, torch.tensor([3, 0]), 4).tolist() == [[3, 0, 1, 2], [0, 1, 2, 3]]


def test_todre_takes_its_pivot_from_the_last_block() -> None:
    facts = stock()
    for k in (1, 4, 6):
        want = [
            sorted(naive_max_sum(x, int(facts["cls"][-1][i].argmax()), k))
            for i, x in enumerate(facts["projected"])
        ]
        assert kept_by(ToDRE(keep_tokens=k)) == want
    # The pivot alone tells the last block from the others.
    assert any(int(a.argmax()) != want[0][0] for a in (facts["cls"][0][0], facts["cls"][-2][0]))


def test_todre_random_pivot() -> None:
    v = features_view(batch=3, cls=False)
    method = ToDRE(keep_tokens=5, pivot="random")
    assert method.needs == frozenset() and method.captures(6) == ()
    pivot = method.first(v)
    assert len(set(pivot.tolist())) == 1  # batch mates do not matter
    pivots = {int(ToDRE(pivot="random", seed=s).first(v)[0]) for s in range(40)}
    assert len(pivots) > 15 and max(pivots) < v.count
    order = max_sum_order(v.projected, pivot, 5).sort(1).values
    assert torch.equal(method.on_features(v).keep, order)  # type: ignore[union-attr]
    # The place in the grid counts, not the place in what an earlier method has left.
    keep = torch.arange(1, v.count, 2)
    part = replace(v, features=v.features[:, keep], index=v.index[:, keep], size=v.size[:, keep])
    left = int(method.first(part)[0])
    full = int(pivot[0])
    assert (full not in keep) or int(keep[left]) == full
    assert ToDRE(keep_ratio=0.3, pivot="random").stages == {"features"}
    model = mini.build("siglip")
    vtc.wrap(model, "todre", keep_tokens=4, pivot="random")
    model(**mini.prompt())
    assert model.vtc.report().final_tokens == 4


def test_todre_budget_or_threshold() -> None:
    off, on = frozenset({"features"}), frozenset({"features", "decoder"})
    for method, tau, stages in (
        (ToDRE(), 0.1, on),
        (ToDRE(tau=0.0), 0.0, off),
        (ToDRE(keep_ratio=0.3), 0.0, off),
        (ToDRE(keep_tokens=3), 0.0, off),
        (ToDRE(keep_tokens=3, tau=0.2), 0.2, on),
        (ToDRE.paper("llava-next", 288), 0.1, on),
    ):
        assert method.threshold == tau and method.stages == stages
        assert method.has_budget == (tau == 0)
    assert ToDRE.paper("llava-next", 720).budget(2880) == 720
    assert ToDRE.paper("llava-next", 288).budget(2880) == 288
    assert [ToDRE().decoder_layers(d) for d in (32, 24, 40, 8, 5)] == [
        (27,),
        (20,),
        (34,),
        (6,),
        (3,),
    ]


def test_todre_pools_the_crops_of_an_image() -> None:
    """One pool for thumbnail and crops, and a pivot from the thumbnail."""
    model = mini_anyres.build("next", seed=1)
    inputs = mini_anyres.prompt([[mini_anyres.SQUARE]])
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    class SpyToDRE(ToDRE):
        def on_features(self, v: FeaturesView) -> Any:
            done = super().on_features(v)
            assert v.count == 80 and v.crops is not None
            assert [i for i, crop in enumerate(v.crops.crop.tolist()) if crop == 0] == [*range(16)]
            seen.append((v.cls_attention(-1).mean(1)[0], v.projected[0], done.keep[0]))
            return done

    for k in (1, 2, 6):
        vtc.wrap(model, SpyToDRE(keep_tokens=k))
        model(**inputs)
        assert model.vtc.report().final_tokens == k
        vtc.unwrap(model)
        scores, x, keep = seen.pop()
        assert not seen
        pivot = int(scores[:16].argmax())
        assert int(scores.argmax()) != pivot, "the thumbnail wins anyway: no teeth"
        assert keep.tolist() == sorted(naive_max_sum(x, pivot, k))


def naive_share(facts: dict[str, Any], row: int, layer: int = 3) -> float:
    """Attention that the text behind the last image pays to visual tokens, of all it pays."""
    visual = facts["visual"][row]
    real = facts["inputs"]["attention_mask"][row].bool()
    last = int(visual.nonzero().max())
    text = [t for t in range(last + 1, len(visual)) if real[t]]
    paid = total = 0.0
    for head in facts["llm"][layer][row]:
        for t in text:
            paid += float(head[t][visual].sum())
            total += float(head[t].sum())
    return paid / total


def between(facts: dict[str, Any], rows: int) -> tuple[list[float], float]:
    """The share of each row, and a threshold in the middle of the widest gap."""
    shares = [naive_share(facts, r) for r in range(rows)]
    order = sorted(shares)
    gap, tau = max((b - a, (a + b) / 2) for a, b in pairwise(order))
    assert gap > 1e-3, "the rows look alike: choose other inputs"
    return shares, tau


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_todre_drops_the_rows_that_look_away(name: str, attention: str) -> None:
    """One row loses every visual token, another keeps all; dropped is masked, also decoding."""
    pad, images = CASES[name]
    facts = stock(pad, images)
    shares, tau = between(facts, len(images))
    model = mini.build(attention=attention)
    vtc.wrap(model, "todre", tau=tau, keep_ratio=1.0)
    (got, steps, lengths), (want, want_steps, _), alive = compare(
        model, lambda: prefill_and_steps(model, facts["inputs"])
    )
    visual = facts["visual"]
    stays = [share >= tau for share in shares]
    assert True in stays and False in stays
    for r, stay in enumerate(stays):
        assert (alive[3][r] & visual[r]).sum() == images[r] * mini.PATCHES
        assert (alive[4][r] & visual[r]).sum() == images[r] * mini.PATCHES * stay
    real = facts["inputs"]["attention_mask"].bool() & alive[4]
    torch.testing.assert_close(got[real], want[real], atol=1e-5, rtol=1e-5)
    if steps is not None:
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    entered = real.sum(1).max().item()
    assert entered <= lengths[4] <= alive[4].sum(1).max().item()
    assert lengths[:4] == [visual.shape[1]] * 4
    model(**facts["inputs"])
    report = model.vtc.report()
    flat = [stay for stay, n in zip(stays, images, strict=True) for _ in range(n)]
    assert [len(k) for k in report.kept] == [mini.PATCHES * stay for stay in flat]
    assert report.asked is None and "asked" not in str(report)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("batch", [1, 2])
def test_todre_may_drop_everything(positions: str, batch: int) -> None:
    inputs = mini.prompt(batch=batch)
    model = mini.build()
    # 1.0 is above any share: text sees itself.
    vtc.wrap(model, ToDRE(tau=1.0, keep_tokens=6, positions=positions))
    if positions == "original":
        (got, steps, lengths), (want, want_steps, _), alive = compare(
            model, lambda: prefill_and_steps(model, inputs)
        )
        rows = alive[4]
        torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(steps, want_steps, atol=1e-5, rtol=1e-5)
    else:
        _, _, lengths = prefill_and_steps(model, inputs)
    assert lengths == [14, 14, 14, 14, 8]
    model(**inputs)
    report = model.vtc.report()
    assert report.final_tokens == 0 and report.tokens_per_layer == [6, 6, 6, 6, 0]
    assert [len(k) for k in report.kept] == [0] * batch
    assert report.kv_bytes < report.kv_bytes_full  # type: ignore[operator]


def test_todre_in_front_of_methods_that_find_nothing_left() -> None:
    model = mini.build()
    both = (FastV(k=4, keep_ratio=0.5), VScan(keep_tokens=2), TOPS(keep_tokens=2))
    for later in both:
        # k=4: FastV acts at the same place, right behind; the others before it.
        with vtc.compressing(model, vtc.chain(ToDRE(tau=1.0, keep_tokens=12), later)) as session:
            model.generate(**mini.prompt(), max_new_tokens=3, do_sample=False)
            assert session.report().final_tokens == 0


def test_todre_row_without_an_image() -> None:
    inputs = mini.prompt([1, 0, 1], pad="left")
    model = mini.build()
    vtc.wrap(model, ToDRE(tau=1.0, keep_tokens=6))
    together = model(**inputs).logits
    assert model.vtc.report().final_tokens == 0
    real = inputs["attention_mask"][1].bool()
    vtc.unwrap(model)
    alone = model(input_ids=inputs["input_ids"][1:2, real]).logits
    torch.testing.assert_close(together[1][real], alone[0], atol=1e-5, rtol=1e-5)


def test_todre_decision_does_not_depend_on_batch_mates() -> None:
    for pad, images in CASES.values():
        facts = stock(pad, images)
        _, tau = between(facts, len(images))
        inputs, first = facts["inputs"], 0
        model = mini.build()
        vtc.wrap(model, ToDRE(tau=tau, keep_tokens=9))
        together = model(**inputs).logits
        for r, n in enumerate(images):
            real = inputs["attention_mask"][r].bool()
            alone = model(
                input_ids=inputs["input_ids"][r : r + 1, real],
                attention_mask=inputs["attention_mask"][r : r + 1, real],
                pixel_values=inputs["pixel_values"][first : first + n],
            ).logits
            first += n
            torch.testing.assert_close(together[r][real], alone[0], atol=1e-5, rtol=1e-5)
