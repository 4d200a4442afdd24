# SPDX-License-Identifier: Apache-2.0
"""Checks that a `Reduction` is well-formed."""

from __future__ import annotations

import torch


def valid_of(r):
    """(B, K) bool, the slots that are no padding."""
    return torch.ones_like(r.keep, dtype=torch.bool) if r.valid is None else r.valid


def well_formed(r):
    """Check the promises of Reduction's docstring."""
    assert r.group.shape == (r.batch, r.source_count) and r.keep.shape == (r.batch, r.count)
    for keep, group, alive in zip(r.keep, r.group, valid_of(r), strict=True):
        survivors = keep[alive]
        assert (survivors.diff() > 0).all()
        slots = torch.arange(r.count)[alive]
        assert group[survivors].tolist() == slots.tolist()
        assert set(group.tolist()) - {-1} == set(slots.tolist())
