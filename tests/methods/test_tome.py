# SPDX-License-Identifier: Apache-2.0
"""`tome` by itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from synthetic_views import encode, vision_view

from vtc.methods._common import unit
from vtc.methods._matching import match, match_parity
from vtc.methods.tome import ToMe, even_counts


@pytest.mark.parametrize("n", [1, 2, 7, 48, 196, 576])
@pytest.mark.parametrize("steps", [1, 2, 5, 12, 23])
def test_even_counts_reach_everything_that_can_be_reached(n, steps):
    for k in range(1, n + 1):
        if n > k << steps:
            with pytest.raises(ValueError, match="at most half"):
                even_counts(n, k, steps)
            continue
        counts = [n, *even_counts(n, k, steps)]
        removed = [a - b for a, b in pairwise(counts)]
        assert counts[-1] == k and len(removed) == steps
        assert all(0 <= r <= a // 2 for r, a in zip(removed, counts, strict=False))
        if n - k <= steps * k:  # even removal never needs more than half
            assert max(removed) - min(removed) <= 1


def test_tome_published_schedule_is_r_per_block():
    assert ToMe(r=5).schedule(48, 6) == [43, 38, 33, 28, 23, 18]
    assert ToMe(r=30).schedule(48, 6) == [24, 12, 6, 3, 2, 1]
    _, counts = encode(ToMe(r=5))
    assert ToMe(r=5).schedule(48, 6, prefix=1) == counts
    assert counts == [43, 38, 33, 28, 23, 18]
    assert ToMe(r=0).on_vision_layer(vision_view()) is None


@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_tome_is_bipartite_and_takes_the_best_edges(prefix):
    v = vision_view(prefix=prefix, batch=1)
    r = 9
    x = unit(v.key_mean)
    into = match_parity(x, r, prefix)[0]
    moved = torch.nonzero(into != torch.arange(len(into)))[:, 0]
    assert len(moved) == r
    assert (moved % 2 == 0).all() and (into[moved] % 2 == 1).all()
    assert (moved >= prefix).all() and (into[moved] >= prefix).all()
    s = x[0] @ x[0].T
    candidates = [a for a in range(len(s)) if a % 2 == 0 and a >= prefix]
    odd = [b for b in range(len(s)) if b % 2 == 1 and b >= prefix]
    edges = {a: max((s[a, b].item(), -b) for b in odd) for a in candidates}
    best = sorted(candidates, key=lambda a: (-edges[a][0], a))[:r]
    assert sorted(best) == moved.tolist()
    assert all(into[a] == -edges[a][1] for a in best)


def test_equal_edges_go_to_the_first_tokens():
    many = match_parity(unit(torch.ones(1, 700, 3)), 5, 0)[0]
    assert torch.nonzero(many != torch.arange(700))[:, 0].tolist() == [0, 2, 4, 6, 8]
    x = unit(torch.ones(1, 8, 3))
    assert match_parity(x, 2, 0)[0].tolist() == [1, 1, 1, 3, 4, 5, 6, 7]
    assert match_parity(x, 2, 1)[0].tolist() == [0, 1, 1, 3, 1, 5, 6, 7]


def test_matching_takes_unsorted_sides():
    x = unit(torch.tensor([[[1.0, 0], [0, 1], [1, 0.1], [0.1, 1]]]))
    into = match(x, torch.tensor([[2, 1]]), torch.tensor([[3, 0]]), 2)
    assert into[0].tolist() == [0, 3, 0, 3]
    assert match(x, torch.tensor([[2, 1]]), torch.tensor([[3, 0]]), 1)[0].tolist() == [0, 1, 0, 3]
