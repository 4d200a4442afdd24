# SPDX-License-Identifier: Apache-2.0
"""VisionZip: keep the dominant patches, fold the rest into a few contextual ones.

Yang et al., VisionZip: Longer is Better but Not Necessary in Vision Language Models, CVPR 2025,
arXiv 2412.04467. All from the last but one encoder block:

    dominant   = the patches with the highest sum over heads of A[h, CLS, j]
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
from typing import Any, ClassVar, Literal

import torch

from ..method import Method, register
from ..reduction import Reduction, gather_tokens, top_k
from ..views import FeaturesView
from .tome import unit

LAYER = -2


@register
@dataclass(frozen=True, kw_only=True)
class VisionZip(Method):
    """Keep patches with high [CLS] attention and merge the others into contextual tokens.

    Args:
        saliency: "cls", attention of [CLS], or "received", the mean attention a patch receives.
        contextual: tokens of the budget that merge the rest; 10 of each 64 when None.
    """

    saliency: Literal["cls", "received"] = "cls"
    contextual: int | None = None

    name = "visionzip"
    summary = "Keeps what [CLS] attends to, merges the rest into a few (VisionZip, CVPR 2025)"
    needs = frozenset({"cls"})
    merges = True
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.saliency not in ("cls", "received"):
            raise ValueError(f'saliency is "cls" or "received"; got {self.saliency!r}')
        if self.contextual is not None and (
            isinstance(self.contextual, bool)
            or not isinstance(self.contextual, int)
            or self.contextual < 0
        ):
            raise ValueError(f"contextual is a count of tokens; got {self.contextual!r}")
        if self.saliency == "received":
            object.__setattr__(self, "needs", frozenset())

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
        if self.saliency == "cls":
            scores = v.cls_attention(LAYER).sum(1)
        else:
            scores = v.attention_received(LAYER)
        if contextual == 0:
            return Reduction.from_scores(scores, k)

        chosen = torch.zeros_like(scores, dtype=torch.bool)
        chosen.scatter_(1, top_k(scores, dominant), True)
        rest = top_k(~chosen, n - dominant)
        stride = (n - dominant) // contextual
        targets = rest[:, : stride * contextual : stride]

        key = unit(v.key(LAYER).mean(2))
        similarity = gather_tokens(key, rest) @ gather_tokens(key, targets).transpose(1, 2)
        into = torch.arange(n, device=rest.device).repeat(len(rest), 1)
        into.scatter_(1, rest, targets.gather(1, similarity.argmax(2)))
        into.scatter_(1, targets, targets)
        return Reduction.from_merge(into, k)
