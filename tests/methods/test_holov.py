# SPDX-License-Identifier: Apache-2.0
"""`holov` by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import mini_llava as mini
import pytest
import torch
from naive_in_front import best, cosine, run, stock
from synthetic_views import N, features_view

from vtc.methods.holov import HoloV, best_of_each, quotas, variances
from vtc.reduction import Reduction


def largest_remainder(weight, room, k):
    """Shares by repeated division of what is left among those with room; exact for caps, too."""
    full = {c for c, r in enumerate(room) if r == 0}
    while True:
        rest = k - sum(room[c] for c in full)
        total = sum(w for c, w in enumerate(weight) if c not in full)
        share = {c: rest * w / total for c, w in enumerate(weight) if c not in full}
        more = {c for c, s in share.items() if s >= room[c]}
        if not more:
            break
        full |= more
    quota = [room[c] if c in full else math.floor(share[c]) for c in range(len(weight))]
    order = sorted(share, key=lambda c: (-(share[c] % 1), c))
    for c in order[: k - sum(quota)]:
        quota[c] += 1
    return quota


def naive_holov(case, image, k, chunks, tau, code):
    x, a, n = case.features[image], case.maps[2][image], mini.PATCHES
    chunk = [i * chunks // n for i in range(n)]
    variance = []
    for i in range(n):
        c = [cosine(x[i], x[j]) for j in range(n) if chunk[j] == chunk[i] and j != i]
        mean = sum(c) / max(len(c), 1)
        variance.append(sum((s - mean) ** 2 for s in c) / max(len(c), 1))
    gamma = float(a.mean()) / max(sum(variance) / n, 1e-12)
    h = [float(a[i]) + (0.09 if code else 1) * gamma * variance[i] for i in range(n)]
    members = [[i for i in range(n) if chunk[i] == c] for c in range(chunks)]
    weight = [(sum(h[i] for i in m) / len(m)) ** tau for m in members]
    quota = largest_remainder(weight, [len(m) for m in members], k)
    rank = a if code else h
    return sorted(i for m, q in zip(members, quota, strict=True) for i in best(rank, m, q))


@pytest.mark.parametrize("settings", [(16, 1.0, False), (3, 1.0, False), (3, 2.5, False)])
@pytest.mark.parametrize("k", [2, 6, 11])
def test_holov_on_the_mini_llava(settings, k):
    case, (chunks, tau, _) = stock(3), settings
    kept, _ = run(case, HoloV(keep_tokens=k, chunks=chunks, tau=tau))
    assert kept == [naive_holov(case, i, k, *settings) for i in range(2)]


@pytest.mark.parametrize("k", [2, 6, 11])
def test_holov_as_published_in_code(k):
    case = stock(4)
    kept, _ = run(case, HoloV(keep_tokens=k, chunks=3, variant="code"))
    assert kept == [naive_holov(case, i, k, 3, 1.0, True) for i in range(2)]
    paper, _ = run(case, HoloV(keep_tokens=k, chunks=3))
    assert paper != kept


def test_quotas_meet_the_budget_within_the_room():
    g = torch.Generator().manual_seed(0)
    room = torch.randint(0, 6, (64, 9), generator=g)
    weight = torch.rand(64, 9, generator=g).pow(4)
    for k in range(1, int(room.sum(1).min()) + 1):
        got = quotas(weight, room, k)
        assert (got.sum(1) == k).all() and (got <= room).all() and (got >= 0).all()
        for r in range(0, 64, 7):
            want = largest_remainder(weight[r].clamp(min=1e-12).tolist(), room[r].tolist(), k)
            assert got[r].tolist() == want
    full = quotas(weight[:1], room[:1], int(room[0].sum()))
    assert torch.equal(full, room[:1])
    even = quotas(torch.ones(1, 16), torch.full((1, 16), 36), 70)
    assert even[0].tolist() == [5] * 6 + [4] * 10


def test_variances_and_the_best_of_each_chunk():
    x = torch.tensor([[[1.0, 0], [0, 1], [-1, 0], [3, 0], [0, 2]]])
    chunk = torch.tensor([[0, 0, 0, 1, 1]])
    # cosines: token 0: {0, -1}; token 1: {0, 0}; token 2: {-1, 0}; the second chunk has one pair
    torch.testing.assert_close(variances(x, chunk), torch.tensor([[0.25, 0, 0.25, 0, 0]]))
    scores = torch.tensor([[1.0, 3, 3, 0.5, 2]])
    got = best_of_each(scores, chunk, torch.tensor([[2, 1]]))
    assert got[0].tolist() == [False, True, True, False, True]
    assert best_of_each(scores, chunk, torch.tensor([[1, 0]]))[0].tolist() == [0, 1, 0, 0, 0]


def test_holov_in_code_ranks_a_chunk_by_attention_alone():
    view = features_view(batch=4)
    attention = view.cls_attention(-2).mean(1)
    kept = {
        variant: HoloV(keep_tokens=20, chunks=3, variant=variant).on_features(view).keep
        for variant in ("paper", "code")
    }
    by_attention = {"paper": True, "code": True}
    for variant, keep in kept.items():
        for row in range(4):
            for chunk in range(3):
                members = range(chunk * N // 3, (chunk + 1) * N // 3)
                mine = [i for i in keep[row].tolist() if i in members]
                by_attention[variant] &= mine == sorted(best(attention[row], members, len(mine)))
    assert by_attention == {"paper": False, "code": True}


def test_holov_finds_its_chunks_by_place():
    """Behind a method that took whole rows away, a patch stays in the chunk it was in."""
    view = features_view()
    keep = torch.arange(N // 2, N)  # the lower half: chunks 8 to 15
    half = Reduction.from_keep(keep.expand(2, -1), N)
    lower = replace(view, features=half.select(view.features), size=half.select(view.size), index=half.keep)  # fmt: skip
    for p in lower.layers.values():
        p.later = Reduction.from_keep(torch.cat([torch.zeros(1).long(), keep + 1]).expand(2, -1), N + 1)  # fmt: skip
    got = HoloV(keep_tokens=8, tau=0.0).on_features(lower)
    chunks = lower.index.gather(1, got.keep) * 16 // N
    assert chunks.tolist() == [list(range(8, 16))] * 2
