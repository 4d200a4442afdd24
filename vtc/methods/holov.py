# SPDX-License-Identifier: Apache-2.0
"""HoloV: share the budget among stretches of the image, then keep the best of each.

Zou et al., Don't Just Chase "Highlighted Tokens" in MLLMs: Revisiting Visual Holistic Context
Retention, NeurIPS 2025, arXiv 2510.02912. The patches, in raster order, are cut into 16 contiguous
chunks ("crops"). With A the [CLS] attention of the last but one block, mean over heads:

    V_i     = variance over the other patches j of its chunk of cos(x_i, x_j)
    H       = A + gamma V,  gamma = mean |A| / mean |V|
    quota_c = K (mean of H in chunk c)^tau / sum over chunks of the same
    keep the quota_c patches of chunk c with the highest H

Departures: the mean in gamma runs over the image; x are the encoder's features; tau is 1 unless
given, the paper's value is not known to us; quotas become integers by largest remainder and never
exceed the chunk, so the budget is met exactly, where the published code pads with zeros; survivors
keep raster order instead of falling attention. ``variant="code"`` is what the published code does
otherwise: H = A + 0.09 gamma V for the quotas (its factor of 1000 on A cancels), no tau, and the
patches of a chunk ranked by A alone.
``saliency="received"`` is the usual substitute for encoders without [CLS] (VisionZip, VisPruner).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..hyperparameters import check_choice, check_count, check_range
from ..method import Method
from ..reduction import Reduction, ranks, top_k
from ..registry import register
from ..views.features import FeaturesView
from ._common import Saliency, best_of_each, check_saliency, row_blocks, saliency_of, unit

LAYER = -2
CODE_WEIGHT = 0.09


def quotas(weight: Tensor, room: Tensor, k: int) -> Tensor:
    """Share k tokens in proportion to weight (B, P), at most room (B, P) to each; (B, P) int64.

    Largest remainder, ties to the first; what exceeds the room of one goes to the others. Every row
    must have room for k.
    """
    weight = weight.float().clamp(min=1e-12)
    full = room == 0
    for _ in range(weight.shape[1]):  # at least one more is full each time, or none any more
        rest = k - (room * full).sum(1, keepdim=True)
        open_weight = weight.masked_fill(full, 0)
        share = rest * open_weight / open_weight.sum(1, keepdim=True).clamp(min=1e-12)
        full = full | (share >= room)
    whole = share.floor().long().where(~full, room)
    left = k - whole.sum(1, keepdim=True)
    remainder = (share - share.floor()).masked_fill(full, -1)
    return whole + (ranks(remainder) < left).long()


def variances(x: Tensor, chunk: Tensor) -> Tensor:
    """(B, N) variance of the cosines of each of x (B, N, C) to the others of its chunk (B, N)."""
    x = unit(x)
    parts = []
    for rows in row_blocks(x):
        cosine = x[:, rows] @ x.mT
        others = chunk[:, rows, None] == chunk[:, None, :]
        others.diagonal(rows.start, 1, 2).fill_(False)
        count = others.sum(2).clamp(min=1)
        mean = (cosine * others).sum(2) / count
        parts.append(((cosine - mean[..., None]).square() * others).sum(2) / count)
    return torch.cat(parts, 1)


@register
@dataclass(frozen=True, kw_only=True)
class HoloV(Method):
    """Give each stretch of the image a part of the budget, by attention and variety.

    Args:
        chunks: contiguous stretches of the image.
        tau: sharpness of the shares; 0 gives every chunk the same.
        variant: "paper", its formulas, or "code", what the published code does.
        saliency: "cls", attention of [CLS], or "received", the mean attention a patch receives.
    """

    chunks: int = 16
    tau: float = 1.0
    variant: Literal["paper", "code"] = "paper"
    saliency: Saliency = "cls"

    name = "holov"
    summary = "Shares the budget among stretches by attention and variety (HoloV, NeurIPS 2025)"
    needs = frozenset({"cls"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "received"}
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_saliency(self)
        check_count(self, "chunks", "a count of stretches", least=1)
        check_range(self, "tau", "an exponent", "[)", high=inf)
        check_choice(self, "variant", ("paper", "code"))
        if self.variant == "code" and self.tau != 1.0:
            raise ValueError('the published code has no tau; leave it out or give variant="paper"')

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        chunk = v.index.to(v.features.device) * self.chunks // v.total
        a = saliency_of(v, LAYER, self.saliency)
        variance = variances(v.features, chunk)
        gamma = a.mean(1, keepdim=True) / variance.mean(1, keepdim=True).clamp(min=1e-12)
        paper = self.variant == "paper"
        h = a + (1.0 if paper else CODE_WEIGHT) * gamma * variance

        empty = h.new_zeros(len(h), self.chunks)
        room = empty.long().scatter_add(1, chunk, torch.ones_like(chunk))
        mean = empty.scatter_add(1, chunk, h) / room.clamp(min=1)
        share = (mean / mean.amax(1, keepdim=True).clamp(min=1e-12)) ** self.tau
        quota = quotas(share, room, k)
        scores = h if paper else a
        chosen = best_of_each(scores, chunk, quota)
        return Reduction.from_keep(top_k(chosen, k), v.count).ranked(scores)
