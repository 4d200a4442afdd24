# SPDX-License-Identifier: Apache-2.0
"""`vscan` by itself."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mini_llava as mini
import pytest
import torch
from naive_two_places import _no_grad, cosine, features_view, stock
from torch import Tensor

import vtc
from vtc.methods._stages import entering
from vtc.methods.vscan import VScan, best_of_windows, windows
from vtc.report.flops import llm_flops

__all__ = ["_no_grad"]  # fixtures


def test_vscan_windows() -> None:
    index = torch.arange(576)[None]
    window = windows(index, (24, 24), 6)
    assert window[0].bincount().tolist() == [36] * 16
    assert window[0].reshape(24, 24)[5, 5] == 0 and window[0].reshape(24, 24)[6, 5] == 4
    assert window[0].reshape(24, 24)[0, 6] == 1 and window[0, -1] == 15
    sizes = windows(torch.arange(256)[None], (16, 16), 6)[0].bincount()
    assert len(sizes) == 9 and set(sizes.tolist()) == {25, 30, 36}
    assert windows(torch.arange(16)[None], (4, 4), 6).max() == 0
    assert windows(torch.arange(4)[None], (2, 2), 6).max() == 0


def test_vscan_windows_give_equally() -> None:
    scores = torch.rand(3, 576, generator=torch.Generator().manual_seed(1))
    window = windows(torch.arange(576).expand(3, -1), (24, 24), 6)
    for k in (48, 50, 96):
        chosen = best_of_windows(scores, window, k)
        for row in range(3):
            taken = window[row, chosen[row]].bincount(minlength=16)
            assert taken.min() == k // 16 and taken.max() == -(-k // 16)
            third = []  # the best of what every window offers next
            for w in range(16):
                inside = [i for i in range(576) if window[row, i] == w]
                ranked = sorted(inside, key=lambda i: -float(scores[row, i]))
                assert set(ranked[: k // 16]) <= set(chosen[row].tolist())
                third.append((float(scores[row, ranked[k // 16]]), ranked[k // 16]))
            extra = {i for _, i in sorted(third, reverse=True)[: k % 16]}
            assert extra <= set(chosen[row].tolist())


def test_vscan_windows_that_are_used_up() -> None:
    window = torch.tensor([[0, 0, 0, 0, 0, 2]])  # window 1 is empty, window 2 has one token
    scores = torch.tensor([[0.1, 0.5, 0.3, 0.3, 0.2, 0.01]])
    assert best_of_windows(scores, window, 4).tolist() == [[1, 5, 2, 3]]


def naive_vscan(v: Any, row: int, k: int, side: int, early: Tensor, late: Tensor) -> dict:
    """Token -> the token it goes to."""
    rows, columns = v.grid
    down, across = max(1, round(rows / side)), max(1, round(columns / side))
    cells: dict[tuple[int, int], list[int]] = {}
    for i in range(v.count):
        r, c = divmod(int(v.index[row, i]), columns)
        cells.setdefault((r * down // rows, c * across // columns), []).append(i)
    local: list[int] = []
    for turn in range(v.count):
        offers = []
        for inside in cells.values():
            ranked = sorted(inside, key=lambda i: (-float(early[row, i]), i))
            offers += ranked[turn : turn + 1]
        offers.sort(key=lambda i: (-float(early[row, i]), i))
        local += offers[: k // 2 - len(local)]
    others = [i for i in range(v.count) if i not in local]
    others.sort(key=lambda i: (-float(late[row, i]), i))
    kept = sorted(local + others[: k - len(local)])
    x = v.features[row]
    return {
        i: i if i in kept else max(kept, key=lambda j: (cosine(x[i], x[j]), -j))
        for i in range(v.count)
    }


@pytest.mark.parametrize("k", [1, 2, 5, 9, 12])
@pytest.mark.parametrize("side", [2, 3, 6])
def test_vscan_is_the_naive_loop(k: int, side: int) -> None:
    v = features_view()
    method = VScan(keep_tokens=k, window=side)
    done = method.on_features(v)
    assert done is not None and done.count == 3 * k
    assert method.captures(6) == (1, 4)
    early, late = v.cls_attention(1).mean(1), v.cls_attention(4).mean(1)
    for row in range(2):
        want = naive_vscan(v, row, 3 * k, side, early, late)
        got = done.keep[row][done.group[row]].tolist()
        assert got == [want[i] for i in range(v.count)]


def test_vscan_behind_another_method() -> None:
    v = features_view()
    keep = torch.tensor([0, 3, 4, 9, 17, 18, 22, 30, 31, 40, 44, 47])
    part = replace(v, features=v.features[:, keep], index=v.index[:, keep], size=v.size[:, keep])
    early = torch.rand(2, 12, generator=torch.Generator().manual_seed(3))
    late = early.flip(1)
    part.cls_attention = lambda layer: (early if layer == 1 else late)[:, None]  # type: ignore
    done = VScan(keep_tokens=2, window=3).on_features(part)
    assert done is not None
    for row in range(2):
        want = naive_vscan(part, row, 6, 3, early, late)
        assert done.keep[row][done.group[row]].tolist() == [want[i] for i in range(12)]
    assert VScan(keep_tokens=4).on_features(part) is None  # 12 may enter and 12 are there


def test_vscan_schedule_and_published_settings() -> None:
    for mean in (64, 128, 192):
        method = VScan.paper("llava-1.5", mean)
        final = method.budget(576)
        start = entering(final, 576, method.llm_share)
        assert (final, start) == (mean // 2, 3 * mean // 2)
        (layer,) = method.decoder_layers(32)
        counts = [start] * (layer + 1) + [final] * (31 - layer)
        assert sum(counts) / 32 == mean
        assert llm_flops(counts, 4096, 11008) / llm_flops([576] * 32, 4096, 11008) < mean / 576
    assert VScan().captures(24) == (5, 22)
    assert VScan().decoder_layers(5) == (2,) and VScan().decoder_layers(24) == (11,)
    assert entering(100, 120, 1 / 3) == 120 and entering(7, 120, 1.0) == 7
    assert VScan().budget(576) == 64


def test_vscan_on_llava() -> None:
    """Both stages: what is merged where, and what the last prompt token leaves in the LLM."""
    facts = stock()
    v = features_view(grid=(4, 4))
    v.features = facts["features"]
    model = mini.build()
    vtc.wrap(model, "vscan", keep_tokens=3)
    model(**facts["inputs"])
    report, done = model.vtc.report(), model.vtc.vision.state.reduction
    assert report.tokens_per_layer == [9, 9, 9, 3, 3] and report.asked == 3
    merged = mini.build(attention="eager")
    embeds = merged.get_input_embeddings()(facts["inputs"]["input_ids"])
    before = [i for i in range(embeds.shape[1]) if not facts["visual"][0, i]]
    for row in range(2):
        want = naive_vscan(v, row, 9, 6, facts["cls"][0], facts["cls"][2])
        assert done.keep[row][done.group[row]].tolist() == [want[i] for i in range(16)]
        # The LLM on the merged tokens, with a stock model at the original positions.
        kept = sorted(set(want.values()))
        pooled = [facts["features"][row, [i for i in want if want[i] == j]].mean(0) for j in kept]
        tokens = merged.model.multi_modal_projector(torch.stack(pooled))
        places = sorted([*before[:3], *(3 + j for j in kept), *before[3:]])
        x = embeds[row, places].clone()
        x[3:12] = tokens
        maps = merged.model.language_model(
            inputs_embeds=x[None], position_ids=torch.tensor([places]), output_attentions=True
        ).attentions[2]
        scores = maps[0, :, -1, 3:12].mean(0)
        best = sorted(scores.argsort(descending=True)[:3].tolist())
        assert report.kept[row].tolist() == [kept[i] for i in best]
