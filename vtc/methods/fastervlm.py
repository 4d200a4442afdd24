# SPDX-License-Identifier: Apache-2.0
"""FasterVLM: rank patches by the [CLS] attention of the last encoder block.

Zhang et al., [CLS] Attention is All You Need for Training-Free Visual Token Pruning, 2024,
arXiv 2412.01818.

    score_j = mean over heads of A[h, CLS, j] in the last block of the encoder

Departures: crops of a high-resolution image share the budget in proportion to their patches without
padding.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..method import Scorer
from ..registry import register
from ..views.features import FeaturesView


@register
@dataclass(frozen=True, kw_only=True)
class FasterVLM(Scorer):
    """Keep the patches that [CLS] attends to in the last encoder block."""

    name = "fastervlm"
    summary = "Keeps what [CLS] attends to in the last encoder block (FasterVLM, arXiv 2412.01818)"
    needs = frozenset({"cls"})

    def captures(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,)

    def score(self, v: FeaturesView) -> Tensor:
        return v.cls_attention(-1).mean(1)
