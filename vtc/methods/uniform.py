# SPDX-License-Identifier: Apache-2.0
"""Uniform pruning: a constant stride over the patches in raster order; a control.

kept_i = floor((i + 1/2) N / K),  i = 0 .. K - 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..views.features import FeaturesView


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(Method):
    """Keep patches at a uniform stride."""

    name = "uniform"
    summary = "Keeps patches at a uniform stride; a control"

    def on_features(self, v: FeaturesView) -> Reduction | None:
        n, k = v.count, v.budget(self)
        if k >= n:
            return None
        places = torch.arange(k, device=v.features.device)
        keep = (2 * places + 1) * n // (2 * k)
        return Reduction.from_keep(keep.expand(len(v.features), -1), n)
