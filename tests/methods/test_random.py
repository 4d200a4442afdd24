# SPDX-License-Identifier: Apache-2.0
"""`random` by itself."""

from __future__ import annotations

import torch
from synthetic_views import features_view

from vtc.methods.random import Random


def test_random_is_the_same_for_every_image_and_nested_in_the_budget():
    a = Random(keep_tokens=10).on_features(features_view(batch=3)).keep
    assert (a == a[0]).all()
    assert torch.equal(
        a[:1], Random(keep_tokens=10).on_features(features_view(batch=1, seed=9)).keep
    )
    more = Random(keep_tokens=20).on_features(features_view()).keep
    assert set(a[0].tolist()) < set(more[0].tolist())
    other = [
        tuple(Random(keep_tokens=10, seed=s).on_features(features_view()).keep[0].tolist())
        for s in range(30)
    ]
    assert len(set(other)) == 30
    assert Random(seed=-3, keep_tokens=10).on_features(features_view()).count == 10


def test_random_is_fair():
    """Over many seeds each place is kept about equally often, and halves are balanced."""
    view = features_view(batch=1, grid=(10, 10))
    kept = torch.zeros(100)
    for seed in range(1000):
        kept[Random(keep_tokens=30, seed=seed).on_features(view).keep[0]] += 1
    assert kept.min() > 230 and kept.max() < 370  # 300 expected, sd 14.5
    assert abs(kept[:50].sum() - 15000) < 600
