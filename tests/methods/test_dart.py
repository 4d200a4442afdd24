# SPDX-License-Identifier: Apache-2.0
"""`dart` by itself."""

from __future__ import annotations

import pytest
import torch

from vtc.methods.dart import least_alike, pair_norm


def test_pair_norm_does_not_see_rope():
    key = torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(0))
    angle = torch.rand(7, 4, generator=torch.Generator().manual_seed(1)) * 7
    a, b = key.unflatten(3, (2, 4)).unbind(3)
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], 3)
    torch.testing.assert_close(pair_norm(turned), pair_norm(key))
    assert pair_norm(torch.tensor([3.0, 1, 4, 0]).expand(1, 1, 1, 4)).item() == pytest.approx(6)
    # Neighbours, as in Cohere, and a channel that is not turned at all, as in GLM.
    few = torch.tensor([3.0, 4, 1, 0, -7]).expand(1, 1, 1, 5)
    assert pair_norm(few, torch.tensor([1, 0, 3, 2, 4])).item() == pytest.approx(5 + 1 + 7)
    torch.testing.assert_close(pair_norm(key, torch.arange(8).roll(4)), pair_norm(key))


def test_dart_takes_the_least_alike_of_each_pivot_in_turn():
    similarity = torch.tensor([[[0.9, 0.1, 0.2, 0.3, 0.4, 0.5], [0.0, 0.1, 0.7, 0.6, 0.9, 0.8]]])
    start = torch.tensor([[True, False, False, False, False, False]])
    alive = torch.ones(1, 2, dtype=torch.bool)

    def kept(k, alive=alive, valid=None):
        out = least_alike(similarity, alive, start, torch.tensor([k]), valid)
        return out[0].nonzero()[:, 0].tolist()

    assert kept(1) == [0]
    assert kept(3) == [0, 1, 2]  # two to the first pivot, nothing left for the second
    assert kept(4) == [0, 1, 2, 3]  # two, then the second pivot takes token 3
    assert kept(5) == [0, 1, 2, 3, 5]
    assert kept(6) == [0, 1, 2, 3, 4, 5]
    only = torch.tensor([[False, True]])
    assert kept(3, only) == [0, 1, 3]
    assert kept(3, valid=torch.tensor([[True, False, True, True, True, True]])) == [0, 2, 3]
