# SPDX-License-Identifier: Apache-2.0
"""MustDrop: judge a visual token by what it is worth in encoding, prefill and decoding.

Liu et al., Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model,
arXiv 2411.10803.

    encoding  behind block 0, each 3 x 3 window of patches with a mean pairwise cosine >= 0.8
              becomes one token, their plain mean; of the N' tokens left, the ceil(0.08 N') with the
              highest attention of [CLS] in the last block (mean over heads) are the key set
    prefill   after the LLM layers 2, 6, 10, 14 of 32, with a_tj the attention (mean over heads) in
              that layer of text token t behind the last image to visual token j:
                  G_j = sum_t a_tj        I_j = max_t a_tj
                  j is dropped if G_j < theta_g sum_j G_j and I_j < theta_i, and is not a key token
    decoding  once after prefill, layers from the first of these on forget the keys and values of
              every visual token that did not reach the end; the layers before keep all

The thresholds do not fix a count. ``paper("llava-1.5", 192)`` and its siblings, or thresholds of
your own, prune as published. With a budget, the default, each of the four layers keeps a share such
that counts fall geometrically to exactly the budget: first the key tokens, then the others, both by
max(G_j / sum G / theta_g, I_j / theta_i); images of a row share its budget.

Departures: each image merges as many windows as pass, where the published code merges the minimum
over the batch (``batch_coupled=True``); merged tokens stand at the bottom right patch of the window
in raster order, not in front; windows that a grid leaves over, and those where an earlier method
has removed a patch, do not merge, and with a budget no more than leave so many tokens; several
images in a prompt are filtered together by the text behind the last one, and a row without such
text is not filtered by thresholds (with a budget its last token ranks); positions are "original"
by default. Layers are at the same relative depths in other LLMs. ``saliency="cosine"`` takes the
key set of encoders without [CLS] from how little a patch is like the mean feature.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..budgets import geometric_counts, relative_layers
from ..hyperparameters import check_count, check_layers, check_range, check_shares, waive
from ..method import Method, StageName
from ..reduction import Reduction, marked, ranks, top_k
from ..registry import register
from ..views.cache import CacheView
from ..views.decoder import DecoderView
from ..views.features import FeaturesView
from ..views.vision import VisionView
from ._common import check_saliency, saliency_of
from ._windows import merge_windows

LAYER = -1
PUBLISHED = {192: (0.001, 0.001), 128: (0.0012, 0.001), 64: (0.011, 0.01)}


def dual_filter(a: Tensor, theta_global: float, theta_individual: float) -> Tensor:
    """(B, N) bool, tokens to drop, from attention a (B, R, N) of text rows to visual tokens."""
    g, i = a.sum(1), a.amax(1)
    return (g < theta_global * g.sum(1, keepdim=True)) & (i < theta_individual)


def dual_score(a: Tensor, theta_global: float, theta_individual: float) -> Tensor:
    """(B, N) by how much a token passes `dual_filter`: at least 1 where it stays."""
    g = a.sum(1)
    share = g / g.sum(1, keepdim=True).clamp(min=1e-12)
    return torch.maximum(share / theta_global, a.amax(1) / theta_individual)


@register
@dataclass(frozen=True, kw_only=True)
class MustDrop(Method):
    """Merge alike windows in the encoder, filter by text attention in the LLM, evict KV at the end.

    Args:
        theta_global: smallest share of all text attention that saves a visual token.
        theta_individual: smallest attention from one text token that does. Give both for the
            published adaptive filter; beside a budget they only weigh the ranking.
        layers: LLM layers, of 32, after which the filter acts.
        schedule: fractions of the visual tokens that all but the last of them keep; falling
            geometrically when None. Only with a budget.
        merge_threshold: smallest mean cosine of windows that merge; None for no merging.
        window: edge of a window in patches.
        key_ratio: fraction of an image's tokens that are key tokens; 0 for none.
        saliency: key tokens by attention of [CLS], "cls", or by difference from the mean, "cosine".
        batch_coupled: merge as many windows in every image of a batch, as published.
        output_aware: evict KV of tokens that did not reach the end.
    """

    theta_global: float | None = None
    theta_individual: float | None = None
    layers: tuple[int, ...] = (2, 6, 10, 14)
    schedule: tuple[float, ...] | None = None
    merge_threshold: float | None = 0.8
    window: int = 3
    key_ratio: float = 0.08
    saliency: Literal["cls", "cosine"] = "cls"
    batch_coupled: bool = False
    output_aware: bool = True

    name = "mustdrop"
    summary = "Merges windows, filters by text attention, evicts KV (MustDrop, arXiv 2411.10803)"
    needs = frozenset({"cls", "ran"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "cosine"}
    outside_encoder: ClassVar[dict[str, Any]] = {"merge_threshold": None}
    alike: ClassVar[dict[str, Any]] = {"batch_coupled": True}
    merges = True
    track_size: ClassVar[bool] = False
    ragged = True
    vision_site: ClassVar[Literal["middle", "output"]] = "output"
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): {"theta_global": g, "theta_individual": i}
        for tokens, (g, i) in PUBLISHED.items()
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        thetas = (self.theta_global, self.theta_individual)
        if (thetas[0] is None) != (thetas[1] is None):
            raise ValueError(
                "a token is dropped if it is below both thresholds: give theta_global and "
                "theta_individual, or neither"
            )
        for theta in ("theta_global", "theta_individual"):
            check_range(self, theta, "a positive threshold", "(]", high=inf, optional=True)
        check_layers(self, "layers", "layers of 32", of=32)
        if self.schedule is not None and not self.has_budget:
            raise ValueError("schedule goes with a budget: give keep_ratio or keep_tokens")
        last = len(self.layers) - 1
        what = f"fractions for each of the {last + 1} layers but the last, which keeps the budget"
        check_shares(self, "schedule", what, count=last)
        check_range(self, "merge_threshold", "a mean cosine", low=-1, optional=True)
        check_count(self, "window", "an edge in patches", least=2)
        check_range(self, "key_ratio", "a fraction of the tokens")
        check_saliency(self, ("cls", "cosine"))
        if self.key_ratio == 0:
            waive(self, "cls")

    @property
    def compiles(self) -> bool:
        return False

    @property
    def has_budget(self) -> bool:
        return self.budget_given or self.theta_global is None

    @property
    def stages(self) -> frozenset[StageName]:
        idle = {"vision"} if self.merge_threshold is None else set()
        return super().stages - idle - (set() if self.output_aware else {"cache"})

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,) if "cls" in self.needs else ()

    def decoder_layers(self, depth: int) -> tuple[int, ...]:
        chosen = relative_layers(self.layers, of=32, depth=depth)
        return tuple(sorted({min(layer, max(depth - 2, 0)) for layer in chosen}))

    def counts(self, n: int) -> list[int]:
        """Visual tokens of an image with n of them after each of ``layers``, with a budget."""
        k = self.budget(n)
        if self.schedule is None:
            return geometric_counts(n, k, len(self.layers), floor=0.0)
        return [max(k, round(n * s)) for s in self.schedule] + [k]

    # ---- encoding ------------------------------------------------------------------------------

    def on_vision_layer(self, v: VisionView) -> Reduction | None:
        if v.layer != 0 or self.merge_threshold is None:
            return None
        place, prefix = v.index, v.prefix
        if v.valid is not None:
            place = place.where(v.valid[:, prefix:], v.total)
        most = None
        if self.has_budget:
            most = max(v.count - self.budget(v.total, v.grid), 0) // (self.window**2 - 1)
        x, how = v.x[:, prefix:], (self.window, self.merge_threshold, most, self.batch_coupled)
        into = merge_windows(x, place, v.grid, *how)
        if v.valid is not None:
            into = into.where(v.valid[:, prefix:], -1)
        reduction = Reduction.from_merge(v.in_sequence(into))
        nothing = reduction.valid is None and reduction.count == v.x.shape[1]
        return None if nothing else reduction

    def on_features(self, v: FeaturesView) -> None:
        if self.key_ratio == 0:
            return
        score = saliency_of(v, LAYER, self.saliency)
        key = top_k(score, ceil(self.key_ratio * v.count - 1e-9))
        v.scratch["key"] = marked(key, v.count)

    # ---- prefill -------------------------------------------------------------------------------

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        later = len(self.decoder_layers(v.depth)) - self.decoder_layers(v.depth).index(v.layer)

        def left(n: int) -> int:
            return self.counts(n)[-later]

        if self.has_budget and v.within(left):
            return None
        if self.key_ratio == 0:
            key = torch.zeros_like(v.visual_index, dtype=torch.bool)
        else:
            key = v.noted("key")
        a = v.attention("prompt").mean(1)
        thetas = self.theta_global or PUBLISHED[192][0], self.theta_individual or PUBLISHED[192][1]
        if self.has_budget:
            rank = ranks(dual_score(a, *thetas)) - key.long() * v.count  # key tokens come first
            return Reduction.from_scores(-rank, v.per_row(left), v.valid)
        unread = ~(v.prompt & v.text).any(1, keepdim=True)
        keep = ~dual_filter(a, *thetas) | key | unread
        if v.valid is not None:
            keep = keep & v.valid
        return None if int(keep.sum()) == int(v.visual.sum()) else Reduction.from_mask(keep)

    # ---- decoding ------------------------------------------------------------------------------

    def on_cache(self, v: CacheView) -> Reduction | None:
        first = self.decoder_layers(v.depth)[0]
        if not self.output_aware or v.step or v.reaches_end is None or v.layer < first:
            return None
        keep = ~v.visual | v.reaches_end
        if bool(keep.all()):
            return None
        return Reduction.from_mask(keep if v.valid is None else keep & v.valid)
