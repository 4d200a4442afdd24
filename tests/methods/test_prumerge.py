# SPDX-License-Identifier: Apache-2.0
"""`prumerge` by itself."""

from __future__ import annotations

from dataclasses import dataclass

import mini_anyres as anyres
import pytest
import torch
from naive_in_front import best, cosine, naive_outliers, run, stock

import vtc
from vtc.methods._common import outliers
from vtc.methods.prumerge import PruMerge, strided


def naive_prumerge(case, image, k=None, plus=False, neighbours=32):
    x, key, query = case.features[image], case.k[3][image], case.q[3][image]
    row = (key @ query[0] / key.shape[1] ** 0.5).softmax(0)[1:]
    key, n = key[1:], len(x)
    if k is None:
        chosen = naive_outliers(row) or best(row, range(n), 1)
    else:
        chosen = best(row, range(n), k if plus or k == 1 else k - 1)
    if plus:
        found = naive_outliers(row) or best(row, range(n), 1)
        chosen = best(row, found, len(found) if k is None else k)
        free = [i for i in range(n) if i not in chosen]
        m = min(3 * len(chosen), len(free)) if k is None else k - len(chosen)
        bounds = [j * m // len(free) for j in range(len(free) + 1)]
        chosen += [f for j, f in enumerate(free) if bounds[j + 1] > bounds[j]]
    rest = [i for i in range(n) if i not in chosen]
    tokens = {}
    for i in chosen:
        near = sorted(rest, key=lambda j: -cosine(key[i], key[j]))[:neighbours]
        tokens[i] = x[i] + sum(row[j] * x[j] for j in near)
    if not plus and k != 1:
        tokens[max(rest)] = sum(row[j] * x[j] for j in rest)
    return sorted(tokens), torch.stack([tokens[i] for i in sorted(tokens)])


@pytest.mark.parametrize(
    "settings",
    [
        dict(keep_tokens=6),
        dict(keep_tokens=1),
        dict(keep_tokens=6, plus=True),
        dict(keep_tokens=2, plus=True),
        dict(keep_tokens=6, neighbours=3),
        dict(keep_tokens=6, plus=True, neighbours=0),
        dict(),
        dict(plus=True),
        dict(plus=True, neighbours=2),
    ],
)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_prumerge_on_the_mini_llava(settings, seed):
    case = stock(seed)
    kept, tokens = run(case, PruMerge(**settings))
    arguments = {"k" if a == "keep_tokens" else a: x for a, x in settings.items()}
    for image in range(2):
        index, want = naive_prumerge(case, image, **arguments)
        assert kept[image] == index
        torch.testing.assert_close(tokens[image, : len(index)], want, atol=1e-5, rtol=1e-5)


def test_outliers_of_a_row():
    scores = torch.tensor([[1.0, 2, 3, 4, 5, 6, 7, 8, 14.5, 14.4], [0.0] * 10])
    # Q1 = 3.25 and Q3 = 7.75 of the first row: 7.75 + 1.5 * 4.5 = 14.5 is not above itself
    assert outliers(scores).nonzero().tolist() == []
    scores[0, 8] = 14.51
    assert outliers(scores).nonzero().tolist() == [[0, 8]]


@pytest.mark.parametrize("n", [1, 7, 48])
def test_strided_spreads_evenly(n):
    free = torch.rand(20, n, generator=torch.Generator().manual_seed(n)) < 0.7
    total = free.sum(1)
    for count in range(n + 1):
        wanted = torch.minimum(total, torch.tensor(count))
        got = strided(free, wanted)
        assert torch.equal(got.sum(1), wanted) and not (got & ~free).any()
    spread = strided(torch.ones(1, 48, dtype=torch.bool), torch.tensor([6]))
    assert spread[0].nonzero()[:, 0].diff().tolist() == [8] * 5


@torch.no_grad()
def test_class_similarity_of_a_thumbnail():
    """Up to the [CLS] column, which is the same factor for all patches, from the logits."""
    seen = []

    @dataclass(frozen=True, kw_only=True)
    class SpyPruMerge(PruMerge):
        def on_features(self, v):
            seen.append((v.total, v.cls_similarity(-1), v.cls_logits(-1).sum(1)))

    with vtc.compressing(anyres.build("next"), SpyPruMerge(keep_tokens=14)) as session:
        session.model(**anyres.prompt([[anyres.WIDE], [anyres.SQUARE]]))
    thumbnails = [(a, logits) for total, a, logits in seen if total == anyres.PATCHES]
    assert thumbnails
    for a, logits in thumbnails:
        want = (logits / 2**0.5).softmax(1)  # two heads
        torch.testing.assert_close(a / a.sum(1, keepdim=True), want, atol=1e-5, rtol=1e-4)
