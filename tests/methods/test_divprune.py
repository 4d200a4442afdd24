# SPDX-License-Identifier: Apache-2.0
"""`divprune` by itself."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from synthetic_views import features_view

from vtc.methods._common import greedy_order, unit
from vtc.methods.divprune import DivPrune


def test_divprune_paper():
    assert DivPrune.paper("llava-1.5", tokens=56).budget(576) == 56


def test_divprune_works_on_projected_features_and_their_directions():
    v = features_view()
    keep = DivPrune(keep_tokens=7).on_features(v).keep
    assert torch.equal(keep, greedy_order(v.projected, 7).sort(1).values)
    scaled = v.features * torch.rand(*v.features.shape[:2], 1).add(0.5)
    assert torch.equal(DivPrune(keep_tokens=7).on_features(replace(v, features=scaled)).keep, keep)
    assert DivPrune().budget(576) == 56
    assert math.isclose(DivPrune.default_ratio, 0.098)


def test_divprune_does_not_depend_on_the_order_of_the_tokens():
    x = torch.randn(2, 40, 8, generator=torch.Generator().manual_seed(0))
    shuffle = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    assert torch.equal(shuffle[greedy_order(x[:, shuffle], 12)], greedy_order(x, 12))


def test_divprune_never_takes_a_token_twice():
    x = torch.ones(1, 9, 4)
    assert sorted(greedy_order(x, 9)[0].tolist()) == list(range(9))
    assert greedy_order(x, 3)[0].tolist() == [0, 1, 2]


def test_divprune_maximises_the_smallest_distance_step_by_step():
    x = unit(torch.randn(1, 20, 4, generator=torch.Generator().manual_seed(5)))
    d = 1 - x[0] @ x[0].T
    order = greedy_order(x, 8)[0].tolist()
    nearest_other = d.clone().fill_diagonal_(9).amin(1)
    assert order[0] == nearest_other.argmax()
    for i in range(1, 8):
        others = [j for j in range(20) if j not in order[:i]]
        assert order[i] == max(others, key=lambda j: d[j, order[:i]].min().item())
