# SPDX-License-Identifier: Apache-2.0
"""`mob` by itself."""

from __future__ import annotations

import torch

from vtc.methods._common import greedy_order, unit
from vtc.methods.mob import aligned


def test_mob_prompt_part():
    similarity = torch.tensor([[[0.9, 0.8, 0.1, 0.2], [0.0, 0.1, 0.3, 0.2], [1.0, 1.0, 1.0, 1.0]]])
    rows = torch.tensor([[True, True, False]])

    def chosen(k, neighbours):
        out = aligned(similarity, rows, k, torch.tensor([neighbours]))
        return out[0].nonzero()[:, 0].tolist()

    assert chosen(2, 1) == [0, 2]  # proposals are 0 and 2; token 1 is not among them
    assert chosen(2, 2) == [0, 1]
    assert chosen(3, 1) == [0, 1, 2]  # filled up by alignment


def test_farthest_points_keep_away_from_a_start():
    x = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(5))
    start = torch.zeros(2, 20, dtype=torch.bool)
    start[0, [3, 7]], start[1, 11] = True, True
    valid = torch.ones_like(start)
    valid[1, 15:] = False
    order = greedy_order(x, 6, start, valid)
    for row in range(2):
        d = 1 - unit(x[row]) @ unit(x[row]).T
        chosen = start[row].nonzero()[:, 0].tolist()
        for token in order[row].tolist():
            others = [j for j in range(20) if valid[row, j] and j not in chosen]
            assert token == max(others, key=lambda j: d[j, chosen].min().item())
            chosen.append(token)
    short = greedy_order(x[1:, :15], 6)
    assert torch.equal(greedy_order(x[1:], 6, valid=valid[1:]), short)
