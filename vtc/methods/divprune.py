# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the subset of visual tokens with the largest minimum distance.

Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models,
CVPR 2025, arXiv 2503.02175. With d_ij = 1 - cos(x_i, x_j) of the projected features:

    first = argmax_i min_{j != i} d_ij
    next  = argmax over the others of the distance to the nearest chosen token, until k are chosen

Departures: each image is a pool of its own, on models with crops each crop, which share the budget
in proportion to their patches without padding, and newline tokens are no part; the paper pools the
whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..views.features import FeaturesView
from ._common import greedy_order


@register
@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Keep the visual tokens that are farthest from each other."""

    name = "divprune"
    summary = "Keeps the visual tokens farthest from each other (DivPrune, CVPR 2025)"
    default_ratio = 0.098
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", 56): {"keep_ratio": 0.098},
    }

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        return Reduction.from_keep(greedy_order(v.projected, k).sort(1).values, v.count)
