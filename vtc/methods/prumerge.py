# SPDX-License-Identifier: Apache-2.0
"""PruMerge and PruMerge+: keep the patches that stand out, add to each what lies near it.

Shang et al., LLaVA-PruMerge: Adaptive Token Reduction for Efficient Large Multimodal Models,
ICCV 2025, arXiv 2403.15388. With q, k, heads not split, of the block that reads the features x the
LLM gets (the last one of LLaVA's tower), and C their width:

    a      = softmax(q_cls k^T / sqrt(C))
    chosen = { j : a_j > Q3 + 1.5 (Q3 - Q1) }, the outliers by interquartile range: about 32 of 576
    plus   : besides, patches at a uniform stride; about 144 of 576 in all
    x_i'   = x_i + sum over the 32 nearest neighbours j of a_j x_j, by cosine of the keys
    not plus: one token more, sum a_j x_j over all patches that were not chosen

Departures: neighbours are taken from the patches that were not chosen; plus adds three strided
patches for each outlier, drawn from those that are none, our reading of "about 144"; an image
without outliers keeps its best patch; the token for the rest stands at the last patch that was not
chosen instead of behind all. With a budget, which the paper does not have, the best patches by a
within it are chosen (the token for the rest counts too, unless the budget is one token), and plus
fills what the outliers leave of it with strided patches. The sizes in the report put each patch
into one token: the one for the rest, or with plus its most similar one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hyperparameters import check_count
from ..method import Answer, Method
from ..reduction import Reduction, gather_tokens, marked, top_k
from ..registry import register
from ..views.features import FeaturesView
from ._common import into_chosen, outliers, row_blocks, unit

LAYER = -1
PER_OUTLIER = 3


def strided(free: Tensor, count: Tensor) -> Tensor:
    """``count`` (B,) of the True entries of free (B, N), evenly spread over them; (B, N) bool."""
    rank = free.long().cumsum(1)
    total, count = rank[:, -1:].clamp(min=1), count[:, None]
    return free & (rank * count // total > (rank - 1) * count // total)


@register
@dataclass(frozen=True, kw_only=True)
class PruMerge(Method):
    """Keep outliers of [CLS] similarity and add their neighbours; as many as stand out.

    Args:
        plus: PruMerge+, which also keeps patches at a uniform stride.
        neighbours: patches that are added to each kept one.
    """

    plus: bool = False
    neighbours: int = 32

    name = "prumerge"
    summary = "Keeps what stands out to [CLS], adds its neighbours; adaptive (PruMerge, ICCV 2025)"
    default_ratio = 0.055
    needs = frozenset({"cls"})
    merges = True
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", 32): {},
        ("llava-1.5", 144): {"plus": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "neighbours", "a count of patches", least=0)

    @property
    def compiles(self) -> bool:
        return self.budget_given

    @property
    def has_budget(self) -> bool:
        return self.budget_given

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,)

    def choose(self, a: Tensor, k: int | None) -> Tensor:
        """(B, N) bool, the patches to keep, k of each row or as many as the outliers say."""
        n = a.shape[1]
        if k is not None and not self.plus:
            return marked(top_k(a, k), n)
        chosen = outliers(a) | marked(top_k(a, 1), n)
        if not self.plus:
            return chosen
        if k is not None:
            chosen = chosen & marked(top_k(a, k), n)
            count = k - chosen.sum(1)
        else:
            found = chosen.sum(1)
            count = torch.minimum(PER_OUTLIER * found, n - found)
        return chosen | strided(~chosen, count)

    def on_features(self, v: FeaturesView) -> Answer:
        n, k = v.count, v.budget(self) if self.has_budget else None
        if n == 1 or (k is not None and k >= n):
            return None
        a = v.cls_similarity(LAYER)
        bundle = not self.plus and k != 1  # one token for all that is not chosen
        chosen = self.choose(a, k if k is None else k - bundle)
        rest = ~chosen
        saliency, a = a, a * rest  # only what was not chosen is added to others
        x, key = v.features.float(), unit(v.key(LAYER).flatten(2))

        index = torch.arange(n, device=a.device).expand_as(a)
        last = index.where(rest, -1).amax(1, keepdim=True)
        target = index.where(chosen, last) if bundle else into_chosen(key, chosen)
        reduction = Reduction.from_merge(target, k).ranked(saliency)

        tokens = reduction.select(x)
        for rows in row_blocks(a, reduction.count):  # of K x N similarities
            near = gather_tokens(key, reduction.keep[:, rows]) @ key.mT
            near = near.masked_fill_(chosen[:, None], -torch.inf)
            near = near.argsort(dim=2, descending=True, stable=True)[:, :, : self.neighbours]
            weight = a[:, None].expand(-1, near.shape[1], -1)
            weight = torch.zeros_like(weight).scatter(2, near, weight.gather(2, near))
            tokens[:, rows] += weight @ x
        if bundle:
            tokens = torch.where((reduction.keep == last)[..., None], a[:, None] @ x, tokens)
        return reduction, tokens.to(v.features.dtype)
