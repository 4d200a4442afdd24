# SPDX-License-Identifier: Apache-2.0
"""TOPS: a set of tokens that is relevant, covers the others and does not repeat itself.

TOPS (2026), as summarised in its comparison tables. The set S grows by the token i with the highest

    r_i + lambda c_i + alpha d_i                               each scaled to [0, 1] by min and max
    c_i = sum_{j not in S} max(0, cos_ij - max_{k in S} cos_jk)      what i would cover (facility
                                                                     location gain)
    d_i = 1 - max_{k in S} cos_ik                                    how new i is

from the token with the highest r on. It runs twice: between projector and LLM, on projected
features with r the [CLS] attention of the last but one encoder block, and inside the LLM, on hidden
states with r the attention from text to visual tokens.

Departures and decisions: where inside the LLM, and how many tokens each of the two places keeps, is
in an appendix that was not at hand; here the second selection comes after half of the layers and
keeps half of what entered (``llm_share``), so k at the end means min(n, 2 k) at the start and about
1.5 k on average. No published setting is offered for that reason. lambda and alpha are 1, the paper
gives [0.5, 1]. The raters of the second selection are all text tokens behind the last image, mean
over heads and rows. Minimum and maximum are those of all tokens; for the chosen ones c and d are 0.
A crop of a high-resolution image is selected from like an image. Survivors keep their RoPE
positions.

Cost: every step is a pass over the N x N distances. Measured on one CPU core, 127 of 576 tokens
take 30 ms in front of the LLM, and 254 of 576 and then 127 of 254 take 60 ms; the prefill of a 0.5B
LLM with 127 visual tokens instead of 576 is 2400 ms shorter. On a GPU each step is about fifteen
small kernels, so that launches, not arithmetic, set the time; that has not been measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hyperparameters import check_range
from ..reduction import Reduction, marked
from ..registry import register
from ..views.decoder import DecoderView
from ..views.features import FeaturesView
from ._common import Saliency, attended, check_saliency, row_blocks, saliency_of, unit
from ._stages import TwoPlaces

LAYER = -2
TINY = 1e-6


def greedy_set(
    x: Tensor, r: Tensor, k: int, cover: float, novel: float, valid: Tensor | None = None
) -> Tensor:
    """The k tokens of x (B, N, C) in the order they are chosen, (B, k) int64; ties to the first.

    Args:
        r: (B, N) relevance.
        cover, novel: weights of c and d, the paper's lambda and alpha.
        valid: (B, N) bool, False on entries that are not tokens. A row with fewer than k tokens
            chooses all of them first; what follows is arbitrary.
    """
    x, r = unit(x), r.float()
    distance = (x @ x.mT).neg_().add_(1)  # N x N: every step reads all of it
    low, high = r, r
    if valid is not None:  # no token is far from others, covers one or needs to be covered
        distance.masked_fill_(~valid[:, None], 0).masked_fill_(~valid[..., None], 2)
        low, high = r.masked_fill(~valid, torch.inf), r.masked_fill(~valid, -torch.inf)
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    relevance = (r - low) / (high - low).clamp(min=TINY)
    if valid is not None:
        relevance = relevance.masked_fill(~valid, -torch.inf)
    weight = torch.tensor([cover, novel], device=x.device)[:, None]
    chosen = [relevance.argmax(1, keepdim=True)]
    nearest = torch.full_like(r, torch.inf)  # of each token, distance to the closest chosen one
    for _ in range(k - 1):
        last = chosen[-1]
        relevance = relevance.scatter(1, last, -torch.inf)
        row = distance.gather(1, last[..., None].expand(-1, -1, x.shape[1]))[:, 0]
        nearest = torch.minimum(nearest, row)
        gain = [(nearest[:, None] - distance[:, i]).clamp_(min=0).sum(2) for i in row_blocks(x)]
        # Both are 0 for the chosen, their smallest value.
        terms = torch.stack([torch.cat(gain, 1), nearest], 1)
        scale = weight / terms.amax(2, keepdim=True).clamp(min=TINY)
        chosen.append((relevance + (terms * scale).sum(1)).argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


@register
@dataclass(frozen=True, kw_only=True)
class TOPS(TwoPlaces):
    """Grow a set by relevance, coverage and diversity, in front of the LLM and again inside it.

    Args:
        cover: weight of coverage, the paper's lambda.
        novel: weight of diversity, the paper's alpha.
        llm_share: fraction of the tokens that entered the LLM which its middle layer keeps; 1 for
            one selection only, in front of it.
        saliency: "cls", attention of [CLS], or "received", the mean attention a patch receives,
            for encoders without [CLS].
    """

    cover: float = 1.0
    novel: float = 1.0
    llm_share: float = 0.5
    saliency: Saliency = "cls"

    name = "tops"
    summary = "Grows a relevant, covering, diverse set in front of the LLM and inside it (TOPS)"
    needs = frozenset({"cls", "ran"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "received"}
    default_ratio = 2 / 9

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cover", "novel"):
            check_range(self, name, "a weight, 0.5 to 1 in the paper", "[)", high=inf)
        check_saliency(self)

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        n, k = v.count, self.entering(v)
        if k >= n:
            return None
        r = saliency_of(v, LAYER, self.saliency)
        order = greedy_set(v.projected, r, k, self.cover, self.novel)
        return Reduction.from_keep(order.sort(1).values, n)

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        k = v.budget(self)
        r = attended(v, "prompt")
        if isinstance(k, int):
            order = greedy_set(v.tokens, r, k, self.cover, self.novel)
            return Reduction.from_keep(order.sort(1).values, v.count)
        order = greedy_set(v.tokens, r, int(k.max()), self.cover, self.novel, v.valid)
        wanted = torch.arange(order.shape[1], device=order.device) < k[:, None]
        # Column N takes what a short row does not want.
        mask = marked(order.where(wanted, v.count), v.count + 1)[:, : v.count]
        return Reduction.from_mask(mask if v.valid is None else mask & v.valid)
