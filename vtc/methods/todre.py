# SPDX-License-Identifier: Apache-2.0
"""ToDRE: a diverse subset in front of the LLM, and no visual tokens at all in its last layers.

Li et al., ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance, 2025,
arXiv 2505.18757 (v2).

Stage 1, between projector and LLM, on the projected features x, greedy max-sum diversification:

    C = {v0},  S_v = cos(x_v, x_v0)
    v* = argmin_{v not in C} S_v,  S_v += cos(x_v, x_v*)          until k tokens are chosen

The pivot v0 has the highest [CLS] attention in the last encoder block. This minimises the sum of
the similarities, where DivPrune minimises the largest one.

Stage 2, once 7/8 of the LLM layers have run (28 of 32), for each row of the batch:

    alpha = sum_{t in T, v in V} A[t, v] / sum_{t in T, all} A[t, .]      mean over heads
    alpha < tau: the row loses all its visual tokens in the layers that follow; else it keeps all

The budget governs stage 1. A row that stage 2 strips keeps no visual token at the end whatever the
budget says, so with stage 2 on the method has no budget (`has_budget` is False). Therefore stage 2
is on when ``tau`` is given, or with its published 0.10 when no budget is given; a budget without
``tau`` means stage 1 alone, which keeps exactly that many tokens.

Departures: T is the text behind the last image, for which the share in the other direction,
alpha_{v->t}, is 0 under a causal mask (counted with the system prompt, it would be dominated by the
attention sink), so the test is one on alpha_{t->v}; every image is a pool of its own, all crops of
it together with a pivot from the thumbnail, as in the paper, which leaves newline tokens open (they
are no part of the pool here), and all frames of a video with a pivot from any of them; survivors
keep their RoPE positions. ``pivot="random"`` is the paper's substitute for encoders without [CLS],
drawn by a hash of the patch index and the seed, so it depends neither on the batch nor on the
global random state. Version 1 of the paper has k-centre (max-min) instead of stage 1; this is
version 2. No code was published.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..budgets import relative_layers
from ..hyperparameters import check_choice, check_count, check_range, waive
from ..method import Method, StageName
from ..reduction import Reduction
from ..registry import register
from ..views.decoder import DecoderView
from ..views.features import FeaturesView
from ._common import noise, unit

PUBLISHED_TAU = 0.1
LAYER = 27  # of 32: layers 28 to 31 run without visual tokens


def max_sum_order(x: Tensor, pivot: Tensor, k: int) -> Tensor:
    """The k tokens of x (B, N, C) in the order they are chosen, (B, k) int64; ties to the first.

    Args:
        pivot: (B,) the first of them.
    """
    x = unit(x)
    chosen = [pivot[:, None]]
    total = torch.zeros_like(x[..., 0])
    for _ in range(k - 1):
        last = x.gather(1, chosen[-1][..., None].expand(-1, -1, x.shape[2]))
        total = (total + (x @ last.mT)[..., 0]).scatter(1, chosen[-1], torch.inf)
        chosen.append(total.argmin(1, keepdim=True))
    return torch.cat(chosen, 1)


def visual_share(v: DecoderView) -> Tensor:
    """(B,) share of the attention of the text behind the last image that visual tokens get."""
    rows = v.attention("prompt").sum(3).mean(1)  # a row of the softmax sums to 1
    return rows.sum(1) / v.prompt.sum(1)


@register
@dataclass(frozen=True, kw_only=True)
class ToDRE(Method):
    """Keep a diverse subset; late in the LLM drop it where the text no longer looks at it.

    Args:
        tau: rows whose text gives visual tokens a smaller share of its attention lose them all;
            0 never drops. None is 0.1, the published value, without a budget, and 0 with one.
        pivot: the first token, "cls", the one with the highest [CLS] attention, or "random".
        seed: of the random pivot.
    """

    tau: float | None = None
    pivot: Literal["cls", "random"] = "cls"
    seed: int = 0

    name = "todre"
    summary = (
        "Keeps a diverse subset; drops it late in the LLM once text ignores it (ToDRE, 2505.18757)"
    )
    needs = frozenset({"cls", "ran"})
    without_cls: ClassVar[dict[str, Any]] = {"pivot": "random"}
    joint = True
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-next", 288): {"keep_ratio": 0.1, "tau": PUBLISHED_TAU},
        ("llava-next", 720): {"keep_ratio": 0.25, "tau": PUBLISHED_TAU},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "tau", "a share of attention, 0 for no second stage", optional=True)
        check_choice(self, "pivot", ("cls", "random"))
        check_count(self, "seed")
        if self.pivot == "random":
            waive(self, "cls")
        if self.has_budget:  # nothing happens within the LLM
            waive(self, "ran")

    @property
    def threshold(self) -> float:
        """tau in use; 0 when there is no second stage."""
        if self.tau is not None:
            return self.tau
        return 0.0 if self.budget_given else PUBLISHED_TAU

    @property
    def compiles(self) -> bool:
        return self.has_budget

    @property
    def has_budget(self) -> bool:
        return self.threshold == 0.0

    @property
    def stages(self) -> frozenset[StageName]:
        return frozenset({"features"}) if self.has_budget else frozenset({"features", "decoder"})

    def captures(self, depth: int) -> tuple[int, ...]:
        return (depth - 1,) if self.pivot == "cls" else ()

    def decoder_layers(self, depth: int) -> Iterable[int]:
        return relative_layers((LAYER,), of=32, depth=depth)

    def first(self, v: FeaturesView) -> Tensor:
        """(B,) the pivot of each image."""
        if self.pivot == "cls":
            scores = v.cls_attention(-1).mean(1)
            if v.crops is not None:
                thumbnail = v.crops.crop.to(v.index.device)[v.index] == 0
                scores = scores + thumbnail  # attention is below 1: the thumbnail first
            return scores.argmax(1)
        return noise(v.index, self.seed).argmax(1)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        order = max_sum_order(v.projected, self.first(v), k)
        return Reduction.from_keep(order.sort(1).values, v.count)

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        keeps = visual_share(v) >= self.threshold
        if v.count == 0 or bool(keeps.all()):
            return None
        mask = keeps[:, None].expand(-1, v.count)
        return Reduction.from_mask(mask if v.valid is None else mask & v.valid)
