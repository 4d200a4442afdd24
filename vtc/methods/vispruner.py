# SPDX-License-Identifier: Apache-2.0
"""VisPruner: half of the budget to important patches, half to patches that are not duplicates.

Zhang et al., Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in
VLMs, ICCV 2025, arXiv 2412.01818 (the successor of FasterVLM). With A of the last but one block:

    important = the r K patches with the highest mean over heads of A[h, CLS, j], r = 0.5
    left      = all others; until as many are left as the budget has room for:
        split them alternately into A and B and give each a in A the edge max_b cos(x_a, x_b)
        remove the 8 patches of A with the highest edges (fewer in the last round)

Departures: similarity is that of the encoder's features; what is left stays in raster order, which
decides the split of the next round; r K is rounded down. ``saliency="received"`` is the published
substitute for encoders without [CLS].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hyperparameters import check_range
from ..method import Method
from ..reduction import Reduction, marked, top_k
from ..registry import register
from ..views.features import FeaturesView
from ._common import Saliency, check_saliency, row_blocks, saliency_of, unit

LAYER = -2
STEP = 8


def without_duplicates(similarity: Tensor, left: Tensor, k: int, step: int = STEP) -> Tensor:
    """Remove near duplicates until k tokens are left.

    Args:
        similarity: (B, N, N).
        left: (B, R) ascending indices of the tokens to start from.
        k: at least 1.

    Returns:
        (B, k) ascending indices.
    """
    rows = torch.arange(len(left), device=left.device)[:, None, None]
    while left.shape[1] > k:
        a, b = left[:, ::2], left[:, 1::2]
        r = min(step, left.shape[1] - k, a.shape[1])
        parts = (similarity[rows, a[:, i, None], b[:, None]] for i in row_blocks(b, a.shape[1]))
        edge = torch.cat([part.amax(2) for part in parts], 1)
        gone = 2 * edge.argsort(dim=1, descending=True, stable=True)[:, :r]
        left = left.gather(1, top_k(~marked(gone, left.shape[1]), left.shape[1] - r))
    return left


@register
@dataclass(frozen=True, kw_only=True)
class VisPruner(Method):
    """Keep patches with high [CLS] attention, and of the others those that are least alike.

    Args:
        important: share of the budget for the patches with the highest attention.
        saliency: "cls", attention of [CLS], or "received", the mean attention a patch receives.
    """

    important: float = 0.5
    saliency: Saliency = "cls"

    name = "vispruner"
    summary = (
        "Keeps what [CLS] attends to and no near duplicates of the rest (VisPruner, ICCV 2025)"
    )
    needs = frozenset({"cls"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "received"}
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (32, 64, 128)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self)
        check_range(self, "important", "a share of the budget")

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        n, k = v.count, v.budget(self)
        if k >= n:
            return None
        first = int(k * self.important)
        saliency = saliency_of(v, LAYER, self.saliency)
        chosen = marked(top_k(saliency, first), n)
        if first < k:
            x = unit(v.features)
            left = top_k(~chosen, n - first)
            left = without_duplicates(x @ x.transpose(1, 2), left, k - first)
            chosen = chosen | marked(left, n)
        return Reduction.from_keep(top_k(chosen, k), n).ranked(saliency)
