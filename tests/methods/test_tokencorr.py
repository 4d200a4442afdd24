# SPDX-License-Identifier: Apache-2.0
"""`tokencorr` by itself."""

from __future__ import annotations

import math

import mini_llava as mini
import pytest
import torch
from naive_in_front import best, cosine, naive_outliers, run, stock
from synthetic_views import features_view

import vtc
from vtc.errors import UnsupportedError
from vtc.methods.tokencorr import TokenCorr, gumbel, informative


@pytest.mark.parametrize("block", [{"early": 99}, {"late": -99}])
def test_blocks_beyond_the_tower_are_refused_at_wrap(block):
    model = mini.build("clip")
    with pytest.raises(UnsupportedError, match=f"block {next(iter(block.values()))} .*give one"):
        vtc.wrap(model, TokenCorr(**block))
    assert not hasattr(model, "vtc")


def naive_tokencorr(case, image, k=None, similarity=0.95, duplicates=8):
    key, n = case.k[1][image][1:], mini.PATCHES
    s = [[cosine(key[i], key[j]) for j in range(n)] for i in range(n)]
    local, late = case.maps[1][image], case.maps[3][image]
    stands_out = naive_outliers(late)
    if k is None:
        redundant = [sum(s[i][j] > similarity for j in range(n) if j != i) > duplicates for i in range(n)]  # fmt: skip
        count = max(1, math.ceil(round(n * (1 - sum(redundant) / n), 9)))
        chosen = set(best(local, range(n), count)) | set(stands_out)
    else:
        chosen = set(best(late, stands_out, k))
        chosen |= set(best(local, [i for i in range(n) if i not in chosen], k - len(chosen)))
    groups = {i: [i] for i in sorted(chosen)}
    for i in range(n):
        if i not in chosen:
            groups[max(sorted(chosen), key=lambda j: s[i][j])].append(i)
    x = case.features[image]
    return sorted(chosen), torch.stack([x[g].mean(0) for g in groups.values()])


@pytest.mark.parametrize(
    "settings",
    [
        dict(keep_tokens=6),
        dict(keep_tokens=1),
        dict(similarity=0.3, duplicates=2),
        dict(similarity=0.1, duplicates=3),
        dict(similarity=-1.0, duplicates=0),  # every patch is redundant
    ],
)
def test_tokencorr_on_the_mini_llava(settings):
    case = stock(5)
    kept, tokens = run(case, TokenCorr(**settings))
    arguments = {"k" if a == "keep_tokens" else a: x for a, x in settings.items()}
    for image in range(2):
        index, want = naive_tokencorr(case, image, **arguments)
        assert kept[image] == index and len(index) < mini.PATCHES
        torch.testing.assert_close(tokens[image, : len(index)], want, atol=1e-5, rtol=1e-5)


def test_informative_counts_near_duplicates():
    angle = torch.tensor([0.0, 1, 2, 90, 91, 180]).deg2rad()
    x = torch.stack([angle.cos(), angle.sin()], 1)[None]
    assert informative(x, 0.9, 0).tolist() == [1]  # only the last has no near duplicate
    assert informative(x, 0.9, 1).tolist() == [3]
    assert informative(x, 0.9, 2).tolist() == [6]
    assert informative(torch.ones(1, 6, 2), 0.9, 2).tolist() == [1]  # a blank image keeps one


def test_the_draw_follows_its_distribution():
    p = torch.tensor([0.5, 0.3, 0.15, 0.05])
    index = torch.arange(4)[None]
    draws = [int((p.log() + gumbel(index, seed)).argmax()) for seed in range(4000)]
    share = torch.bincount(torch.tensor(draws), minlength=4) / 4000
    torch.testing.assert_close(share, p, atol=0.03, rtol=0)
    view, kept = features_view(batch=1), set()
    for seed in range(5):
        method = TokenCorr(keep_tokens=8, deterministic=False, seed=seed)
        kept.add(tuple(method.on_features(view).keep[0].tolist()))
    assert len(kept) > 1
