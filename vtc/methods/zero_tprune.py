# SPDX-License-Identifier: Apache-2.0
"""Zero-TPrune: rank patches by PageRank on the attention graph of an encoder block, prune the rest.

Wang et al., Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in
Pre-Trained Transformers, CVPR 2024, arXiv 2305.17328. Behind a few encoder blocks, with the
attention A_h (N x N, [CLS] included) and keys of that block, three stages in this order:

    WPR     s <- A_h^T s for every head h, so each token hands its votes to what it attends to;
            in the beginning [CLS] has sqrt(N) times the votes of any other token
    EIR     s_i = sqrt(sum_h eta_h s_hi^2 / sum_h eta_h)
    VHF     eta_h = 1 if v_min <= Var_i(s_h) <= v_max, else 0
    I'      importance by one vote
    S       halve the patches by importance; every patch of the less important half has its nearest
            neighbour (cosine of keys) in the other half; the most similar r_s of them are dropped
    I       importance of what is left by some dozen votes in early blocks and one vote in late
            ones; the best k stay

S comes before I, or large groups of alike patches vote each other up. The paper finds the share
kept in each layer by Monte-Carlo search. ``paper("deit-s", 66)`` is one such setting as remembered
from the paper, not verified: its cost of 3.06 GFLOPs stands beside the published 3.08.

Departures: the published v_min = 0.01 exceeds any variance of scores that sum to 1, so scores are
scaled to mean 1 for VHF (``vhf_scale="none"``: as written), and where no head passes all count;
Algorithm 1 (A^T s) is followed, not Eq. 1; the heads' keys are concatenated for the cosine; the
I-stage takes rows and columns of the patches left and scales rows to sum 1; votes are a fixed
number, not until convergence; [CLS] and registers take part in votes, and are never compared or
dropped; counts are rounded to nearest. With a budget the shares of the DeiT-S setting are stretched
geometrically, so that exactly the asked number remains, over the same relative depths of any
encoder. Encoders without [CLS] start from equal votes, the paper's "uni" variant. In the tower of
a multimodal LLM this is our extension, without published numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..hyperparameters import check_choice, check_range, require
from ..kernels.similarity_reduce import best_match
from ..reduction import Reduction, gather_tokens, top_k
from ..registry import register
from ..views.vision import VisionView
from ._common import unit
from ._stages import RATIOS, StagedBlocks


def page_rank(attention: Tensor, start: Tensor, votes: int) -> Tensor:
    """s <- A^T s, ``votes`` times: attention (..., T, T) of rows summing to 1, start (..., T)."""
    s = start.unsqueeze(-2)
    for _ in range(votes):
        s = s @ attention
    return s.squeeze(-2)


def first_votes(tokens: int, cls: bool, device: Any = None) -> Tensor:
    """(T,) start of `page_rank`, of sum 1: sqrt(T) times more for [CLS] in front, or uniform."""
    s = torch.ones(tokens, device=device)
    if cls:
        s[0] = tokens**0.5
    return s / s.sum()


def across_heads(
    scores: Tensor, v_min: float = 0.01, v_max: float = 0.7, scale: bool = True
) -> Tensor:
    """EIR and VHF: scores (B, H, T) that sum to 1 over T, to importance (B, T).

    Args:
        v_min, v_max: heads with a variance outside do not count.
        scale: measure the variance on scores of mean 1.
    """
    s = scores * scores.shape[2] if scale else scores
    variance = s.var(2, correction=0)
    eta = ((variance >= v_min) & (variance <= v_max)).to(scores)
    eta = eta.where(eta.any(1, keepdim=True), 1.0)  # if no head passes, all do
    return ((eta[..., None] * scores**2).sum(1) / eta.sum(1, keepdim=True)).sqrt()


def most_similar(x: Tensor, importance: Tensor, r: int) -> Tensor:
    """The S-stage: (B, r) tokens of the less important half nearest to one of the other half.

    Args:
        x: (B, N, C) of unit length; importance: (B, N); r: at most N / 2.
    """
    order = importance.argsort(dim=1, descending=True, stable=True)
    better = x.shape[1] - x.shape[1] // 2
    b, a = order[:, :better], order[:, better:].sort(dim=1).values
    edge, _ = best_match(gather_tokens(x, a), gather_tokens(x, b), normalize=False)
    return a.gather(1, top_k(edge, r))


@register
@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(StagedBlocks):
    """Prune patches by PageRank on the attention of a few encoder blocks, without training.

    When and how many, the parameters of `StagedBlocks` say.

    Args:
        start: "cls", [CLS] has more votes at first, or "uniform"; None: "cls" where there is one.
        v_min, v_max: heads with a variance outside do not count.
        vhf_scale: "mean1", variance of scores scaled to mean 1, or "none", of scores of sum 1.
        similarity: cosine of the "concat"enated keys of all heads, or the "mean" of their cosines.
    """

    start: Literal["cls", "uniform"] | None = None
    v_min: float = 0.01
    v_max: float = 0.7
    vhf_scale: Literal["mean1", "none"] = "mean1"
    similarity: Literal["concat", "mean"] = "concat"

    name = "zero-tprune"
    summary = "Prunes by PageRank on the attention of encoder blocks (Zero-TPrune, CVPR 2024)"
    vision_site: ClassVar[Literal["middle", "output"]] = "output"
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("deit-s", 66): {"ratios": RATIOS, "similar": 10},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for bound in ("v_min", "v_max"):
            check_range(self, bound, "a variance", high=inf)
        if self.v_min > self.v_max:
            raise ValueError(f"v_min <= v_max is needed; got {self.v_min}, {self.v_max}")
        check_choice(self, "start", (None, "cls", "uniform"))
        check_choice(self, "vhf_scale", ("mean1", "none"))
        check_choice(self, "similarity", ("concat", "mean"))
        if self.start == "cls":
            require(self, "cls")

    def on_vision_layer(self, v: VisionView) -> Reduction | None:
        plan = self.schedule(v.total, v.depth).get(v.layer)
        if plan is None or v.count <= plan[1]:
            return None
        similar, left, votes = plan
        n, prefix, batch = v.count, v.prefix, len(v.x)
        heads = v.projections.by_heads()
        keep = torch.arange(n, device=v.x.device).expand(batch, n)

        r = min(similar, n - left, n // 2)
        if r > 0:
            vote = self._importance(v, heads, None, 1)
            gone = most_similar(self._keys(v), vote[:, prefix:], r)
            keep = top_k(torch.ones_like(keep).scatter(1, gone, 0), n - r)

        if n - r > left:
            rank = self._importance(v, heads, v.in_sequence(keep), votes)
            keep = keep.gather(1, top_k(rank[:, prefix:], left))
        return Reduction.from_keep(v.in_sequence(keep), prefix + n)

    def _keys(self, v: VisionView) -> Tensor:
        """(B, N, C) of unit length: keys of the patches."""
        key = v.key[:, :, v.prefix :].transpose(1, 2)
        if self.similarity == "concat":
            return unit(key.flatten(2))
        return unit(key).flatten(2) * key.shape[2] ** -0.5

    def _importance(self, v: VisionView, heads: Any, among: Tensor | None, votes: int) -> Tensor:
        """(B, T) importance after that many votes among the tokens (B, T), or all of them."""
        cls = v.has_cls and self.start != "uniform"
        scores = []
        if votes == 1 and among is None and v.projections.later is None:  # no map at all
            start = first_votes(v.x.shape[1], cls, v.x.device)
            scores.append(v.projections.received(start.expand(len(v.x), v.key.shape[1], -1)))
            heads = []
        for part in heads:  # a few maps at a time
            a = part.folded_attention()
            if among is not None:
                a = a.gather(2, among[:, None, :, None].expand(-1, a.shape[1], -1, a.shape[3]))
                a = a.gather(3, among[:, None, None, :].expand(*a.shape[:3], -1))
                a = a / a.sum(3, keepdim=True).clamp(min=1e-12)
            start = first_votes(a.shape[3], cls, a.device).expand(*a.shape[:2], -1)
            scores.append(page_rank(a, start, votes))
        return across_heads(torch.cat(scores, 1), self.v_min, self.v_max, self.vhf_scale == "mean1")
