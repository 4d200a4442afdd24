# SPDX-License-Identifier: Apache-2.0
"""DART: keep a few pivots and the visual tokens that duplicate them least.

Wen et al., Stop Looking for "Important Tokens" in Multimodal Language Models: Duplication Matters
More, EMNLP 2025, arXiv 2502.11494. In front of LLM layer 2 (0-based), with a budget k:

    pivots = the 4 visual and the 4 text tokens whose keys in layer 1 have the largest L1 norm
    for each pivot p in turn: keep the ceil(k / 8) visual tokens with the smallest cos(h_p, h_j)
    that are not kept yet

Departures: the layer number is read as FastV's K, so that two layers run at full length and the
keys of the second, over all KV heads, choose the pivots. The L1 norm of a rotated key changes with
its position, and so with the padding of the batch; here it is sum sqrt(k_c^2 + k_(c + d/2)^2) over
the pairs that RoPE rotates (whichever they are in a model), the mean of the L1 norm over all angles
but for a factor. Visual pivots stay and count within the budget; the last pivots find less than
their share left, and exactly k tokens remain. Visual pivots go first, by falling norm, then text
pivots. "Text" is the text behind the image; with fewer than 8 pivots each takes ceil(k / pivots).
All images of a row are one pool with the sum of their budgets.
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
from ._common import unit


def pair_norm(key: Tensor, partners: Tensor | None = None) -> Tensor:
    """(B, T) norm of keys (B, H, T, d): L1 over RoPE's pairs, L2 inside each.

    Args:
        partners: (d,) the other channel of each one's pair; None: (c, c + d/2) are the pairs.
    """
    key = key.float()
    if partners is None:
        return key.unflatten(3, (2, -1)).norm(dim=3).sum((1, 3))
    partners = partners.to(key.device)
    single = partners == torch.arange(len(partners), device=key.device)
    other = key[..., partners].masked_fill(single, 0)
    return (torch.stack([key, other], -1).norm(dim=-1) / (2 - single.int())).sum((1, 3))


def least_alike(
    similarity: Tensor, alive: Tensor, kept: Tensor, k: Tensor, valid: Tensor | None = None
) -> Tensor:
    """Tokens (B, N) bool that stay: those kept before, and for each pivot the least similar others.

    Args:
        similarity: (B, P, N) of the pivots to the visual tokens.
        alive: (B, P) bool, pivots that exist; they take turns in their order.
        kept: (B, N) bool, at most k of each row; k: (B,) tokens to keep in all.
        valid: (B, N) bool, False on entries that are no tokens.
    """
    pivots = alive.sum(1)
    quota = (k + pivots - 1) // pivots.clamp(min=1)
    for p in range(similarity.shape[1]):
        free = ~kept if valid is None else ~kept & valid
        share = torch.minimum(quota, k - kept.sum(1)) * alive[:, p]
        kept = kept | ((ranks(-similarity[:, p], free) < share[:, None]) & free)
    return kept


@register
@dataclass(frozen=True, kw_only=True)
class DART(Method):
    """Keep pivots with large keys and the visual tokens least similar to them.

    Args:
        layer: LLM layers that see every visual token, at least 1.
        visual_pivots, text_pivots: pivots of either kind.
    """

    layer: int = 2
    visual_pivots: int = 4
    text_pivots: int = 4

    name = "dart"
    summary = "Keeps the tokens least similar to a few pivots after LLM layer 2 (DART, EMNLP 2025)"
    needs = frozenset({"ran"})
    default_ratio = 1 / 9
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"keep_tokens": tokens} for tokens in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "layer", "the number of LLM layers that see every token", least=1)
        check_count(self, "visual_pivots", "a count of tokens", least=1)
        check_count(self, "text_pivots", "a count of tokens", least=0)

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer - 1,)

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        budget = v.budget(self)
        k = torch.as_tensor(budget, device=v.hidden.device).expand(len(v.hidden))
        norm = pair_norm(v.key, v.key_partners)

        visual_rank = ranks(norm.gather(1, v.visual_index), v.valid)
        visual = visual_rank.argsort(dim=1)[:, : self.visual_pivots]
        text = ranks(norm, v.prompt).argsort(dim=1)[:, : self.text_pivots]
        pivots = torch.cat([v.visual_index.gather(1, visual), text], 1)
        real = torch.ones_like(visual, dtype=torch.bool)
        if v.valid is not None:
            real = v.valid.gather(1, visual)
        alive = torch.cat([real, v.prompt.gather(1, text)], 1)

        similarity = unit(gather_tokens(v.hidden, pivots)) @ unit(v.tokens).transpose(1, 2)
        first = visual_rank < torch.minimum(k, k.new_tensor(self.visual_pivots))[:, None]
        if v.valid is not None:
            first = first & v.valid
        kept = least_alike(similarity, alive, first, k, v.valid)
        return Reduction.from_scores(kept, budget, v.valid)
