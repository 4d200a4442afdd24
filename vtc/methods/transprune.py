# SPDX-License-Identifier: Apache-2.0
"""TransPrune: rank visual tokens by how much LLM layers change them, and by the instruction.

TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model, CVPR 2026,
arXiv 2507.20630. For a sub-block F (attention or MLP) with normed input u_j and output w_j, before
the residual add:

    TTV_F(j) = |w_j| / |u_j| * softmax_j(1 - cos(u_j, w_j))          token transition variation
    V_j      = sum of TTV_attention + TTV_mlp over layers 7..p (from 1)
    G_j      = mean over heads and instruction tokens i of A[h, i, j] in layer p + 1   (IGA)
    score    = alpha V / sum(V) + (1 - alpha) G / sum(G)

After layers p = 7, 9 and 12 (of 32, from 1) the best int(n r) of the original n tokens stay, with
r = .875, .625, .125 ("High", 1.557 TFLOPs at n = 576) or .5, .25, .0625 ("Low", 1.187 TFLOPs).

Departures: the softmax runs over all valid tokens of each sample, text included, where the
published code takes the whole batch, so that samples do not couple (the same for batch 1); the
paper's |cos| is ``direction="abs"``, the default is the published code's cos; V and G are
normalised as in the code and then mixed by the paper's alpha; Low is not in the code, its ratios
are solved from the published FLOPs. Position ids are kept by default, ``positions="compact"``
renumbers as published and `paper` asks for it. A budget f becomes f^.064, f^.226, f of the tokens,
which is High at f = .125; other depths use the same relative layers. All images of a row are one
pool with the sum of their budgets, and a prompt that ends with the image ranks by its last token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..hyperparameters import check_choice, check_range
from ..reduction import Reduction, gather_tokens
from ..registry import register
from ..views.decoder import DecoderView
from ._common import attended, unit
from ._stages import Staged

HIGH = (0.875, 0.625, 0.125)
LOW = (0.5, 0.25, 0.0625)


def transition(
    before: Tensor,
    after: Tensor,
    valid: Tensor | None = None,
    direction: Literal["code", "abs"] = "code",
) -> Tensor:
    """Token transition variation (B, T) of one sub-block, in fp32.

    Args:
        before: (B, T, D) normed input; after: (B, T, D) output before the residual add.
        valid: (B, T) bool, the tokens in the softmax; the others get 0.
        direction: 1 - cos ("code") or 1 - |cos| ("abs").
    """
    cos = (unit(before) * unit(after)).sum(-1)
    turn = 1 - (cos if direction == "code" else cos.abs())
    if valid is not None:
        turn = turn.masked_fill(~valid, -torch.inf)
    magnitude = after.float().norm(dim=-1) / before.float().norm(dim=-1).clamp(min=1e-6)
    variation = magnitude * turn.softmax(1)
    return variation if valid is None else variation.masked_fill(~valid, 0)


def share_of(x: Tensor, valid: Tensor | None) -> Tensor:
    """Non-negative scores (B, N) divided by their sum over the valid tokens of each row."""
    x = x if valid is None else x.masked_fill(~valid, 0)
    return x / (x.sum(1, keepdim=True) + 1e-8)


@register
@dataclass(frozen=True, kw_only=True)
class TransPrune(Staged):
    """Keep the visual tokens whose representation changes most and that the instruction attends to.

    Args:
        alpha: weight of the transitions; 1 - alpha is that of the instruction's attention.
        direction: "code", 1 - cos as in the published code, or "abs", 1 - |cos| as in the paper.
    """

    layers: tuple[int, ...] = (6, 8, 11)
    alpha: float = 0.5
    direction: Literal["code", "abs"] = "code"

    name = "transprune"
    summary = (
        "Keeps the tokens that LLM layers 7 to 12 change most and the instruction attends to "
        "(TransPrune, CVPR 2026)"
    )
    needs = frozenset({"ahead", "sublayers"})
    default_ratio = 0.125
    published = HIGH
    exponents = (math.log(0.875) / math.log(0.125), math.log(0.625) / math.log(0.125), 1.0)
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", 72): {"ratios": HIGH, "positions": "compact"},
        ("llava-1.5", 36): {"ratios": LOW, "positions": "compact"},
        ("llava-next", 360): {"ratios": HIGH, "positions": "compact"},
        ("llava-next", 180): {"ratios": LOW, "positions": "compact"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", "the weight of the transitions")
        check_choice(self, "direction", ("code", "abs"))

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        """Every layer from the first pruning layer to the last: transitions add up in all."""
        layers = self.stage_layers(depth)
        return tuple(range(layers[0], layers[-1] + 1))

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        tokens = v.text | v.visual
        change = transition(v.attention_input, v.attention_output, tokens, self.direction)
        change = change + transition(v.mlp_input, v.mlp_output, tokens, self.direction)
        change = gather_tokens(change, v.visual_index)
        if "change" in v.scratch:
            change = change + v.scratch["change"]
        v.scratch["change"] = change
        k = self.target(v)
        if k is None:
            return None
        guided = attended(v, "prompt", ahead=True)
        score = self.alpha * share_of(change, v.valid)
        score = score + (1 - self.alpha) * share_of(guided, v.valid)
        return Reduction.from_scores(score, k, v.valid)
