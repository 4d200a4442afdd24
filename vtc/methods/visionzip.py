# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the dominant patches, fold the rest into a few contextual ones.

Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025,
arXiv 2412.04467. All from the last but one encoder block:

    dominant   = the patches with the highest mean over heads of A[h, CLS, j]
    targets    = a uniform stride over the other patches
    contextual = every remaining patch folds into the target of the most similar head-mean key

A budget K is split as 54 : 10, so 64 = 54 + 10, 128 = 108 + 20 and 192 = 162 + 30.

Departures: a target and what it absorbs become their size-weighted mean, where the published code
takes target + mean(absorbed) without renormalising, about twice the norm and half of its weight on
the target alone; survivors keep raster order instead of [dominant, contextual]; the published 54
counts [CLS], which goes to the LLM there and not here, so one more patch is dominant.
``saliency="received"`` is the published substitute for encoders without [CLS].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from ..hyperparameters import check_count
from ..method import Method
from ..reduction import Reduction, marked, top_k
from ..registry import register
from ..views.features import FeaturesView
from ._common import Saliency, check_saliency, into_nearest, saliency_of

LAYER = -2


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """Keep patches with high [CLS] attention and merge the others into contextual tokens.

    Args:
        saliency: "cls", attention of [CLS], or "received", the mean attention a patch receives.
        contextual: tokens of the budget that merge the rest; 10 of each 64 when None.
    """

    saliency: Saliency = "cls"
    contextual: int | None = None

    name = "visionzip"
    summary = "Keeps what [CLS] attends to, merges the rest into a few (VisionZip, CVPR 2025)"
    needs = frozenset({"cls"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "received"}
    merges = True
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self)
        check_count(self, "contextual", "a count of tokens", least=0, optional=True)

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,)

    def split(self, k: int) -> tuple[int, int]:
        """Dominant and contextual tokens of a budget k."""
        contextual = round(k * 10 / 64) if self.contextual is None else self.contextual
        if contextual > k:
            raise ValueError(f"contextual={contextual} exceeds the budget of {k} tokens")
        return k - contextual, contextual

    def on_features(self, v: FeaturesView) -> Reduction | None:
        n, k = v.count, v.budget(self)
        if k >= n:
            return None
        dominant, contextual = self.split(k)
        scores = saliency_of(v, LAYER, self.saliency)
        if contextual == 0:
            return Reduction.from_scores(scores, k)

        chosen = marked(top_k(scores, dominant), n)
        rest = top_k(~chosen, n - dominant)
        stride = (n - dominant) // contextual
        targets = rest[:, : stride * contextual : stride]

        key = v.key(LAYER).mean(2)
        index = torch.arange(n, device=rest.device).expand_as(chosen)
        into = index.where(chosen, into_nearest(key, targets))
        return Reduction.from_merge(into, k).ranked(scores)
