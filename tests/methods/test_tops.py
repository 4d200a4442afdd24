# SPDX-License-Identifier: Apache-2.0
"""`tops` by itself."""

from __future__ import annotations

import mini_llava as mini
import pytest
import torch
from naive_two_places import CASES, _no_grad, cosine, features_view, kept_by, random_tokens, stock
from torch import Tensor

import vtc
from vtc.methods._common import unit
from vtc.methods.tops import TOPS, greedy_set

__all__ = ["_no_grad"]  # fixtures


def naive_tops(x: Tensor, r: Tensor, k: int, cover: float, novel: float) -> list[int]:
    n = len(x)
    sim = [[cosine(x[i], x[j]) for j in range(n)] for i in range(n)]

    def scaled(values: list[float]) -> list[float]:
        low, high = min(values), max(values)
        return [(a - low) / max(high - low, 1e-6) for a in values]

    relevance = scaled(r.tolist())
    chosen = [max(range(n), key=lambda i: (relevance[i], -i))]
    while len(chosen) < k:
        best = [max(sim[j][s] for s in chosen) for j in range(n)]
        c = [
            sum(max(0.0, sim[i][j] - best[j]) for j in range(n) if j not in chosen)
            for i in range(n)
        ]
        d = [1 - best[i] for i in range(n)]
        for i in chosen:
            assert c[i] < 1e-9 and d[i] < 1e-9
        c, d = scaled(c), scaled(d)
        rest = [i for i in range(n) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (relevance[i] + cover * c[i] + novel * d[i], -i)))
    return chosen


def test_tops_by_hand() -> None:
    """Three directions: 0, 1, 2 alike; 3, 4 alike; 5 alone."""
    x = torch.eye(3)[[0, 0, 0, 1, 1, 2]][None]
    r = torch.tensor([[0.5, 1.0, 0.9, 0.2, 0.3, 0.0]])
    # Seed 1. Then c = (0 0 0 2 2 1) / 2, d = (0 0 0 1 1 1): 3 has .2 + 1 + 1, 4 .3 + 1 + 1,
    # 5 0 + .5 + 1. Then only 5 is new: c = d = 1 there: 2 against .9 of token 2.
    assert greedy_set(x, r, 5, 1, 1)[0].tolist() == [1, 4, 5, 2, 0]
    assert greedy_set(x, r, 3, 0, 0)[0].tolist() == [1, 2, 0]  # relevance alone
    assert greedy_set(x, r, 3, 0, 0.65)[0].tolist() == [1, 4, 2]
    assert greedy_set(x, r, 3, 0.65, 0)[0].tolist() == [1, 4, 2]
    assert greedy_set(x, torch.zeros_like(r), 3, 1, 1)[0].tolist() == [0, 3, 5]


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 1.0), (2.0, 0.0), (0.0, 0.7)])
def test_tops_is_the_naive_loop(weights: tuple[float, float]) -> None:
    x, r = random_tokens(3, 19)
    for k in (1, 2, 8, 19):
        order = greedy_set(x, r, k, *weights)
        for row in range(3):
            assert order[row].tolist() == naive_tops(x[row], r[row], k, *weights)


def test_tops_ragged_rows() -> None:
    x, r = random_tokens(4, 19, seed=5)
    n = torch.tensor([19, 7, 12, 3])
    valid = torch.arange(19) < n[:, None]
    # What stands in the padding must not matter: noise, or what would cover all the others best.
    middle = (unit(x) * valid[..., None]).sum(1, keepdim=True)
    for padding in (torch.full_like(x, 100.0), middle.expand_as(x)):
        loud = x.where(valid[..., None], padding)
        order = greedy_set(loud, r.where(valid, 9.0), 7, 1, 1, valid)
        for row in range(4):
            m = int(min(n[row], 7))
            want = naive_tops(x[row, : n[row]], r[row, : n[row]], m, 1, 1)
            assert order[row, :m].tolist() == want
    assert torch.equal(order[:3], greedy_set(x, r, 7, 1, 1, valid)[:3])


def test_tops_padding_does_not_set_the_scale() -> None:
    """c is 2 for token 1 and 1 for token 3; 1.25 (2 - 1) / 2 > 0.6, but not with 2.12 for 2."""
    basis = torch.eye(3)
    x = torch.stack([basis[0], basis[1], basis[1], basis[2], basis[1] + basis[2]])[None]
    r = torch.tensor([[1.0, 0.0, 0.0, 0.6, 0.0]])
    valid = torch.tensor([[True, True, True, True, False]])
    assert greedy_set(x[:, :4], r[:, :4], 2, 1.25, 1.0)[0].tolist() == [0, 1]
    assert greedy_set(x, r, 2, 1.25, 1.0, valid)[0].tolist() == [0, 1]
    assert greedy_set(x, r, 2, 1.15, 1.0, valid)[0].tolist() == [0, 3]


def test_tops_on_llava() -> None:
    """In front of the LLM by the CLS row, inside it by the prompt's rows; alone and both."""
    facts = stock()
    r = facts["cls"][-2]
    for k in (1, 4, 7):
        want = [sorted(naive_tops(facts["projected"][i], r[i], k, 1, 1)) for i in range(2)]
        assert kept_by(TOPS(keep_tokens=k, llm_share=1.0)) == want
    assert TOPS().captures(4) == (2,)


@pytest.mark.parametrize("name", CASES)
def test_tops_inside_the_llm(name: str) -> None:
    pad, images = CASES[name]
    facts = stock(pad, images)
    k = 9  # 18 may enter, so all 16 do
    got, image = kept_by(TOPS(keep_tokens=k, cover=0.5), pad, images), 0
    for row, n in enumerate(images):
        visual = facts["visual"][row]
        places = visual.nonzero()[:, 0]
        real = facts["inputs"]["attention_mask"][row].bool()
        text = [t for t in range(int(places[-1]) + 1, len(visual)) if real[t]]
        r = facts["llm"][2][row][:, text][:, :, places].mean((0, 1))
        order = naive_tops(facts["hidden"][3][row, places], r, k * n, 0.5, 1.0)
        mine = [i + 16 * j for j in range(n) for i in got[image + j]]
        image += n
        assert mine == sorted(order)


def test_tops_both_places() -> None:
    model = mini.build()
    vtc.wrap(model, TOPS(keep_tokens=4))
    model(**mini.prompt())
    report = model.vtc.report()
    assert report.tokens_per_layer == [8, 8, 8, 4, 4] and report.final_tokens == report.asked == 4
    assert len(model.vtc.vision.state.reduction.keep[0]) == 8
    assert TOPS(keep_ratio=0.25).decoder_layers(32) == (15,)


def test_tops_without_cls() -> None:
    method = TOPS(keep_tokens=3, saliency="received")
    assert "cls" not in method.needs
    v = features_view(cls=False)
    r = v.attention_received(-2)
    done = method.on_features(v)
    for row in range(2):
        assert done.keep[row].tolist() == sorted(  # type: ignore[union-attr]
            naive_tops(v.projected[row], r[row], 6, 1, 1)
        )
    model = mini.build("siglip")
    vtc.wrap(model, method)
    model(**mini.prompt())
    assert model.vtc.report().final_tokens == 3
