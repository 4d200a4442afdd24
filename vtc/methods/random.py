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

from ..hyperparameters import check_count
from ..method import Scorer
from ..registry import register
from ..views.features import FeaturesView
from ._common import noise


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
        check_count(self, "seed")

    def score(self, v: FeaturesView) -> Tensor:
        place = torch.arange(v.count, device=v.features.device)
        return noise(place, self.seed).expand(len(v.features), -1)
