# SPDX-License-Identifier: Apache-2.0
"""`sparsevlm` by itself."""

from __future__ import annotations

import mini_llava as mini
import pytest
import torch
from naive_in_llm import naive_peaks

import vtc
from vtc.methods.sparsevlm import SparseVLM, density_peaks


def test_density_peaks_find_blobs():
    generator = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.0, 0], [9, 0], [0, 9]])
    label = torch.arange(30) % 3
    x = centres[label] + 0.3 * torch.randn(30, 2, generator=generator)
    into = density_peaks(x[None], 3)[0]
    assert (label[into] == label).all() and len(into.unique()) == 3
    assert torch.equal(into[into], into), "a centre belongs to itself"
    # Padding, wherever and whatever it is, changes nothing; each row has its own count.
    order = torch.arange(35)
    padded = torch.full((2, 35, 2), 4.0)
    padded[0, :30], padded[1, 5:] = x, x
    valid = torch.stack([order < 30, order >= 5])
    both = density_peaks(padded, torch.tensor([3, 3]), valid)
    assert torch.equal(both[0, :30], into) and torch.equal(both[1, 5:] - 5, into)
    uneven = density_peaks(padded, torch.tensor([1, 3]), valid)
    assert len(uneven[0, :30].unique()) == 1 and torch.equal(uneven[1, 5:] - 5, into)


@pytest.mark.parametrize("clusters", [1, 3, 7])
def test_density_peaks_by_loop(clusters):
    x = torch.randn(25, 6, generator=torch.Generator().manual_seed(clusters))
    assert density_peaks(x[None], clusters)[0].tolist() == naive_peaks(x, clusters)
    # Scaling changes densities so far that an exponential could underflow; none may be lost.
    far = density_peaks(100 * x[None], clusters)[0]
    assert len(far.unique()) == clusters


@pytest.mark.parametrize(
    ("n", "k", "split"),
    [
        (576, 300, (291, 82, 9)),  # 82 = int(.3 * 276), 82 // 10 + 1 clusters
        (10, 8, (8, 0, 0)),  # 30 % of two tokens is nothing to recycle
        (16, 1, (1, 0, 0)),  # the only token is the best one
        (100, 2, (1, 29, 1)),
    ],
)
def test_clusters_count_within_the_budget(n, k, split):
    assert SparseVLM().split(n, k) == split
    assert split[0] + split[2] == k
    assert SparseVLM(recycle=0).split(n, k) == (k, 0, 0)


@torch.no_grad()
def test_adaptive_sparsevlm_counts_by_rank():
    method = SparseVLM(adaptive=True)
    assert not method.has_budget and SparseVLM().has_budget
    few = mini.build(seed=2)
    vtc.wrap(few, SparseVLM(adaptive=True, deletion=1.0))
    few(**mini.prompt(1, batch=1, after=4))
    (kept,) = few.vtc.report().kept
    assert 1 <= len(kept) <= 4  # the rank of at most four raters' rows
    none = mini.build(seed=2)
    inputs = mini.prompt(1, batch=1, after=4)
    stock = none(**inputs).logits
    vtc.wrap(none, SparseVLM(adaptive=True, deletion=0.0))
    torch.testing.assert_close(none(**inputs).logits, stock)
