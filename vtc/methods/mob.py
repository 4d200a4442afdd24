# SPDX-License-Identifier: Apache-2.0
"""MoB: cover the prompt with a part of the budget and the image with the rest.

Li et al., Why 1 + 1 < 1 in Visual Token Pruning: Beyond Naive Integration via Multi-Objective
Balanced Covering, NeurIPS 2025, arXiv 2505.10118. In front of LLM layer 2 (0-based), budget K:

    near    = union over prompt tokens i of the k visual tokens with the highest cos(h_i, h_j)
    prompt  = the K_p tokens of near with the highest max_i cos(h_i, h_j)
    visual  = K - K_p tokens by farthest point sampling on 1 - cos(h, h), away from all chosen ones

Departures: the published sets K_p 64 / 48 / 32 and k 4 / 6 / 8 are known to us without the budget
each belongs to, and K_p = 64 would leave nothing for the image at K = 64, so that both are read as
growing with the budget: K_p = 16 + K / 4 and k = 2 + K / 32, which is 32, 48, 64 and 4, 6, 8 at
K = 64, 128, 192, with K_p at most K / 2. Where ``near`` holds fewer than K_p tokens, the next best
aligned ones fill up. The layer number is read as FastV's K (two layers run at full length). K_p per
type of benchmark (the paper's prior) is not offered. Prompt tokens are the text behind the image.
All images of a row are one pool with the sum of their budgets; k follows the largest of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hyperparameters import check_count
from ..method import Method
from ..reduction import Reduction, gather_tokens, ranks
from ..registry import register
from ..views.decoder import DecoderView
from ._common import greedy_order, unit


def aligned(
    similarity: Tensor,
    rows: Tensor,
    k: int | Tensor,
    neighbours: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """The k tokens (B, N) bool of the prompt part; k is one count or (B, 1).

    Args:
        similarity: (B, M, N) of prompt tokens to visual tokens.
        rows: (B, M) bool, prompt tokens that exist.
        neighbours: (B,) visual tokens that each prompt token proposes.
        valid: (B, N) bool, False on entries that are no tokens.
    """
    batch, m, n = similarity.shape
    every = None if valid is None else valid[:, None].expand(batch, m, n).reshape(batch * m, n)
    near = ranks(similarity.reshape(batch * m, n), every).reshape(batch, m, n)
    near = ((near < neighbours[:, None, None]) & rows[..., None]).any(1)
    best = similarity.masked_fill(~rows[..., None], -torch.inf).amax(1)
    place = ranks(best, valid) + n * ~near  # those nobody proposes come last
    chosen = ranks(-place, valid) < k
    return chosen if valid is None else chosen & valid


@register
@dataclass(frozen=True, kw_only=True)
class MoB(Method):
    """Keep the visual tokens nearest to the prompt, then those farthest from all that is kept.

    Args:
        layer: LLM layers that see every visual token, at least 1.
        prompt_tokens: K_p, tokens of each image's budget spent on the prompt; None for 16 + K / 4.
        neighbours: k, visual tokens that each prompt token proposes; None for 2 + K / 32.
    """

    layer: int = 2
    prompt_tokens: int | None = None
    neighbours: int | None = None

    name = "mob"
    summary = "Covers the prompt, then the image, after LLM layer 2 (MoB, NeurIPS 2025)"
    default_ratio = 1 / 9
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "layer", "the number of LLM layers that see every token", least=1)
        check_count(self, "prompt_tokens", "a count", least=1, optional=True)
        check_count(self, "neighbours", "a count", least=1, optional=True)

    @property
    def compiles(self) -> bool:
        return False

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def split(self, budget: int) -> tuple[int, int]:
        """K_p and k of a budget K: tokens for the prompt, proposals of each prompt token."""
        share, near = self.prompt_tokens, self.neighbours
        if share is None:
            share = max(1, min(budget // 2, 16 + round(budget / 4)))
        return min(share, budget), 2 + round(budget / 32) if near is None else near

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        k = v.budget(self)
        part = v.per_row(lambda n: self.split(self.budget(n))[0])
        near = [max(self.split(self.budget(n))[1] for n in row or [1]) for row in v.images]

        rows = Reduction.from_mask(v.prompt)
        real = torch.ones_like(rows.keep, dtype=torch.bool) if rows.valid is None else rows.valid
        similarity = unit(gather_tokens(v.hidden, rows.keep)) @ unit(v.tokens).transpose(1, 2)
        wanted = part if isinstance(part, int) else part[:, None]
        proposals = torch.tensor(near, device=similarity.device)
        chosen = aligned(similarity, real, wanted, proposals, v.valid)

        rest = torch.as_tensor(k - part, device=chosen.device).expand(len(chosen))
        steps = k - part if isinstance(k, int) and isinstance(part, int) else int(rest.max())
        score = chosen.float() * 2
        if steps:
            order = greedy_order(v.tokens, steps, chosen, v.valid)
            taken = torch.arange(steps, device=order.device) < rest[:, None]
            score = score.scatter_add(1, order, taken.float())
        return Reduction.from_scores(score, k, v.valid)
