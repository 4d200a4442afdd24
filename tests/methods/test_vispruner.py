# SPDX-License-Identifier: Apache-2.0
"""`vispruner` by itself."""

from __future__ import annotations

import mini_llava as mini
import pytest
import torch
from naive_in_front import best, cosine, run, stock

from vtc.methods.vispruner import VisPruner, without_duplicates


def naive_vispruner(case, image, k, important=0.5):
    x, n = case.features[image], mini.PATCHES
    chosen = best(case.maps[2][image], range(n), int(k * important))
    left = [i for i in range(n) if i not in chosen]
    while len(left) + len(chosen) > k:
        a, b = left[::2], left[1::2]
        edge = {i: max(cosine(x[i], x[j]) for j in b) for i in a}
        r = min(8, len(left) + len(chosen) - k, len(a))
        gone = sorted(a, key=lambda i: (-edge[i], i))[:r]
        left = [i for i in left if i not in gone]
    return sorted(chosen + left)


@pytest.mark.parametrize("k", [2, 5, 6, 9, 13])
def test_vispruner_on_the_mini_llava(k):
    case = stock(k)
    kept, _ = run(case, VisPruner(keep_tokens=k))
    assert kept == [naive_vispruner(case, image, k) for image in range(2)]


def test_duplicates_leave_pair_by_pair():
    """Four directions, each twice in a row: of each pair the one in A goes first."""
    x = torch.eye(4).repeat_interleave(2, 0)[None] + 0.01 * torch.arange(8.0)[None, :, None]
    similarity = torch.nn.functional.normalize(x, dim=2)
    similarity = similarity @ similarity.transpose(1, 2)
    left = torch.arange(8)[None]
    assert without_duplicates(similarity, left, 4).tolist() == [[1, 3, 5, 7]]
    one_by_one = without_duplicates(similarity, left, 4, step=1)
    assert sorted(i // 2 for i in one_by_one[0].tolist()) == [0, 1, 2, 3]
    assert without_duplicates(similarity, left, 8).tolist() == left.tolist()
