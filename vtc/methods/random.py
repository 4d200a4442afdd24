# SPDX-License-Identifier: Apache-2.0
"""Random pruning, the control that every method should beat.

Tokens are ranked by a hash (Wellons' lowbias32) of their place and the seed. Every image with the
same number of tokens keeps the same places, so a result depends neither on the batch nor on the
global random state, and a smaller budget keeps a subset of a larger one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..method import Scorer, register
from ..views import FeaturesView


def hash32(x: Tensor) -> Tensor:
    """Pseudo-random bits in [0, 2^32) of the lower 32 bits of an int64 tensor."""
    mask = 0xFFFFFFFF
    x = x & mask
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
    x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
    return x ^ (x >> 16)


@register
@dataclass(frozen=True, kw_only=True)
class Random(Scorer):
    """Keep a random subset of the patches, the same for every image of that size.

    Args:
        seed: another seed, another subset.
    """

    seed: int = 0

    name = "random"
    summary = "Keeps a random subset; a control"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"seed is an integer; got {self.seed!r}")

    def score(self, v: FeaturesView) -> Tensor:
        place = torch.arange(v.count, device=v.features.device)
        seed = hash32(torch.full_like(place, self.seed & 0xFFFFFFFF) + 1)
        return hash32(place + seed).expand(len(v.features), -1)
