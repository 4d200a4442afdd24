# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: rank by the text tokens that are about the image, recycle a part of what is dropped.

Zhang et al., SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference,
ICML 2025, arXiv 2410.04417. Once, on the input of the LLM:

    r_i    = mean over visual j of softmax_i(h_i . h_j), i over the text behind the image
    raters = text tokens with r_i >= mean(r)

After 0-based LLM layers 2, 6 and 15 (of 32):

    score_j  = mean over heads and raters of A[h, i, j] in the layer just run
    recycled = the best 30 % of the removed tokens, in C = m // 10 + 1 clusters of density peaks:
               rho_i = exp(-mean of d^2 to the 5 nearest), delta_i = min d_ij to a denser token,
               centres are the C largest rho delta, every other token joins the nearest centre

Departures: a cluster becomes its mean, at the place of its centre, where the published code appends
clusters behind the others; clusters count within the budget, so exactly the budget remains (m is
30 % of n - budget, and budget - C tokens stay as they are); d^2 is divided by the channels. The
paper names the settings 192, 128, 96 and 64 after the average over the layers: they end at 110, 36,
26 and 17 tokens. Position ids are kept by default, ``positions="compact"`` renumbers as published
and `paper` asks for it. A budget f becomes f^.39, f^.64, f of the tokens, as in the setting 192.
``adaptive=True`` is the paper's original rule, in which floor(deletion (n - rank)) tokens go, rank
being that of the raters' attention; the paper's factor is not known to us, .5 is ours. Other depths
prune at the same relative depth. All images of a row are one pool with the sum of their budgets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..hyperparameters import check_range
from ..reduction import Reduction, gather_tokens, ranks
from ..registry import register
from ..views.decoder import DecoderView
from ._common import density_peaks
from ._stages import Staged

RANK_TOLERANCE = 1e-5  # singular values below this share of the largest are zeros
COUNTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
SHARES = {tokens: tuple(c / 576 for c in counts) for tokens, counts in COUNTS.items()}


@register
@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Keep what text tokens about the image attend to; cluster the best of the rest.

    Args:
        recycle: share of the removed tokens that is merged into clusters; 0 drops them all.
        adaptive: the rank of the raters' attention decides how many tokens go, not a budget.
        deletion: with ``adaptive``, the share of the redundant tokens (n - rank) that goes.
    """

    layers: tuple[int, ...] = (2, 6, 15)
    recycle: float = 0.3
    adaptive: bool = False
    deletion: float = 0.5

    name = "sparsevlm"
    summary = (
        "Keeps what text about the image attends to, at three depths of the LLM, and merges some "
        "of the rest (SparseVLM, ICML 2025)"
    )
    merges = True
    needs = frozenset({"ran"})
    default_ratio = SHARES[192][-1]
    published = SHARES[192]
    exponents = tuple(math.log(s) / math.log(SHARES[192][-1]) for s in SHARES[192])
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"ratios": shares, "positions": "compact"}
        for tokens, shares in SHARES.items()
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "recycle", "a share of the removed tokens")
        check_range(self, "deletion", "a share of the redundant tokens")
        if self.adaptive and (self.budget_given or self.ratios is not None):
            raise ValueError(
                "adaptive=True takes the number of tokens from the attention: give no keep_ratio, "
                "keep_tokens or ratios with it"
            )

    @property
    def compiles(self) -> bool:
        return False

    @property
    def has_budget(self) -> bool:
        return not self.adaptive

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        return (-1, *self.stage_layers(depth))

    def split(self, n: int, k: int) -> tuple[int, int, int]:
        """Of n tokens and a budget k: tokens kept as they are, tokens recycled, clusters."""
        pool = int((n - k) * self.recycle + 1e-6)
        clusters = min(pool // 10 + 1, k - 1) if pool else 0
        return k - clusters, pool if clusters else 0, clusters

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.layer == -1:
            v.memo["raters"] = raters(v)
            return None
        k = None if self.adaptive else self.target(v)
        if k is None and not self.adaptive:
            return None
        attention = rater_attention(v)
        scores = attention.sum(1)
        rank = ranks(scores, v.valid)
        k = self.adaptive_count(v, attention) if k is None else k
        if isinstance(k, int):
            return self._recycled(v, rank, *self.split(v.count, k), k).ranked(scores)
        now = torch.full_like(k, v.count) if v.valid is None else v.valid.sum(1)
        k = torch.minimum(k, now)
        parts = [self.split(n, b) for n, b in zip(now.tolist(), k.tolist(), strict=True)]
        kept, pool, clusters = torch.tensor(parts, device=rank.device).unbind(1)
        return self._recycled(v, rank, kept, pool, clusters, None).ranked(scores)

    def adaptive_count(self, v: DecoderView, attention: Tensor) -> Tensor:
        """Tokens (B,) that stay by the rank of the raters' attention (B, R, N)."""
        now = attention.new_full((len(attention),), v.count, dtype=torch.long)
        now = now if v.valid is None else v.valid.sum(1)
        singular = torch.linalg.svdvals(attention)
        rank = (singular > RANK_TOLERANCE * singular.amax(1, keepdim=True)).sum(1)
        return (now - (self.deletion * (now - rank)).floor().long()).clamp(min=1)

    def _recycled(
        self,
        v: DecoderView,
        rank: Tensor,
        kept: int | Tensor,
        pool: int | Tensor,
        clusters: int | Tensor,
        k: int | None,
    ) -> Reduction:
        """The tokens of rank below ``kept`` stay, the next ``pool`` of them fold into clusters."""
        batch, n = rank.shape
        kept, pool, clusters = (
            torch.as_tensor(c, device=rank.device).expand(batch) for c in (kept, pool, clusters)
        )
        index = torch.arange(n, device=rank.device).expand(batch, n)
        target = index.where(rank < kept[:, None], -1)
        widest = self.split(n, k)[1] if k is not None else int(pool.max())
        if widest:
            chosen = (rank >= kept[:, None]) & (rank < (kept + pool)[:, None])
            columns = (~chosen).long().argsort(dim=1, stable=True)[:, :widest]
            real = torch.arange(widest, device=rank.device) < pool[:, None]
            centre = density_peaks(gather_tokens(v.tokens, columns), clusters, real)
            into = columns.gather(1, centre)
            target = target.scatter(1, columns, into.where(real, target.gather(1, columns)))
        return Reduction.from_merge(target, k)


def raters(v: DecoderView) -> Tensor:
    """(B, M) bool in the order of ``v.text_index``: text about the image, from the LLM's input."""
    index, real = v.text_index
    prompt = v.prompt.gather(1, index) & real
    text, tokens = gather_tokens(v.hidden, index).float(), v.tokens.float()
    similarity = (text @ tokens.transpose(1, 2)).masked_fill(~prompt[..., None], -1e30).softmax(1)
    if v.valid is not None:
        similarity = similarity.masked_fill(~v.valid[:, None], 0)
    # The mean over visual tokens times their number.
    total = similarity.sum(2).masked_fill(~prompt, 0)
    mean = total.sum(1, keepdim=True) / prompt.sum(1, keepdim=True).clamp(min=1)
    return prompt & (total >= mean)


def rater_attention(v: DecoderView) -> Tensor:
    """(B, R, N) attention of the raters in the layer just run, mean over heads; padding is zero."""
    index, real = v.text_index
    chosen = torch.zeros_like(v.text).scatter(1, index, v.memo["raters"] & real)
    chosen = chosen.where(chosen.any(1, keepdim=True), v.prompt)  # no text behind the image
    rows = Reduction.from_mask(chosen)
    attention = v.attention(rows.keep).mean(1)
    # Rows that fill a short list may be padding, whose attention is not a number.
    return attention if rows.valid is None else attention.masked_fill(~rows.valid[..., None], 0)
