# SPDX-License-Identifier: Apache-2.0
"""`diprune` by itself."""

from __future__ import annotations

import torch

from vtc.methods.diprune import DIPrune, ranks


def test_ranks():
    scores = torch.tensor([[1.0, 3.0, 3.0, 2.0]])
    assert ranks(scores).tolist() == [[3, 0, 1, 2]]
    assert ranks(scores, torch.tensor([[True, False, True, True]])).tolist() == [[2, 3, 0, 1]]


def test_diprune_score_by_hand():
    now, before = torch.tensor([[4.0, 3, 2, 1]]), torch.tensor([[1.0, 3, 4, 2]])
    # Ranks now 0 1 2 3, before 3 1 0 2: dR = 3 0 -2 -1 and M = 2.
    expected = torch.tensor([[0.6 * 1 + 0.4, 0.45 + 0.2, 0.3 + 0.0, 0.15 + 0.4 * 0.25]])
    torch.testing.assert_close(DIPrune(margin=0.5).score(now, before), expected)
    pad = torch.nn.functional.pad
    valid = torch.tensor([[True] * 4 + [False]])
    mine = DIPrune(margin=0.5).score(pad(now, (0, 1), value=9), pad(before, (0, 1)), valid)
    torch.testing.assert_close(mine[:, :4], expected)
