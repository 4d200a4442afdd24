# SPDX-License-Identifier: Apache-2.0
"""GlobalCom2: the thumbnail decides how many tokens each crop keeps, and helps to choose them.

Liu et al., Global Compression Commander: Plug-and-Play Inference Acceleration for High-Resolution
Large Vision-Language Models, AAAI 2026, arXiv 2501.05179. With the scores s^G of the thumbnail,
s^L_j of crop j (of n), and the fraction R to keep:

    s_j     = sum of s^G over the region of the thumbnail that lies under crop j
    sigma   = softmax(s / tau),  tau = 10
    r_j     = min(1, R (1 + sigma_j - 1 / n))
    score_i = alpha u(s^G at i, bilinear) + (1 - alpha) u(s^L_j at i),  u(x) = x / |x| in crop j
    kept    = the best R N of the thumbnail by s^G, the best r_j n_j of each crop by score

n_j counts the patches of a crop that are not padding. A score is q_cls k / sqrt(d) in the last
encoder block, mean over heads: the code takes it before the softmax, and with probabilities sigma
is all but uniform at tau = 10. ``score="softmax"`` standardises the region sums instead (tau = 1).
Without [CLS], ``saliency="cosine"``: score = -cos(x_i, mean of x in the crop), as published.

Departures: with a budget exactly as many tokens stay as asked, divided in proportion to R N and
r_j n_j by largest remainder (``rounding="published"`` truncates each instead); survivors of padded
crops keep their place, which the code loses; thumbnail tokens stay in raster order, in the code by
falling score; newline tokens of padding rows are cut off with the padding, as LLaVA-NeXT does;
thumbnails without crops are compressed too, by s^G; every image of a prompt is treated on its own.
Behind a method that removes patches, those missing in the thumbnail count with the mean score of
the others. A canvas that OneVision resamples is scored after the same resampling, by the nearest
crop. Frames of a video are images without crops here and share its budget by their tokens; the
paper's variant for video is not offered, `vidcom2` is the one by its authors that is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budgets import apportion
from ..hyperparameters import check_choice, check_range
from ..layouts import CropLayout
from ..method import Method
from ..reduction import Reduction, top_k
from ..registry import register
from ..views.features import FeaturesView
from ._common import best_of_each, check_saliency, unit, unlike

LAYER = -1


def region_sums(thumbnail: Tensor, crops: tuple[int, int]) -> Tensor:
    """(n,) sums of scores (rows, columns) under each of (rows, columns) crops, in raster order.

    The last region of a row or column takes the remainder of the division.
    """
    height, width = (max(s // n, 1) for s, n in zip(thumbnail.shape, crops, strict=True))
    y = (torch.arange(thumbnail.shape[0]) // height).clamp(max=crops[0] - 1)
    x = (torch.arange(thumbnail.shape[1]) // width).clamp(max=crops[1] - 1)
    region = (y[:, None] * crops[1] + x).flatten().to(thumbnail.device)
    out = thumbnail.new_zeros(crops[0] * crops[1])
    return out.index_add(0, region, thumbnail.flatten())


def crop_ratios(sums: Tensor, ratio: float, temperature: float) -> Tensor:
    """(n,) fraction that each crop keeps, from the region sums (n,); their mean is ``ratio``."""
    share = ((sums - sums.max()) / temperature).softmax(0)
    return ratio * (1 + share - 1 / len(sums))


def at_canvas(thumbnail: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Scores (rows, columns) of the thumbnail on the patches of the canvas, bilinear, flat."""
    return F.interpolate(thumbnail[None, None], canvas, mode="bilinear")[0, 0].flatten()


def mix(overall: Tensor, local: Tensor, alpha: float) -> Tensor:
    """Scores of one crop's patches (m,) from the thumbnail's and its own, both of unit length."""
    return alpha * unit(overall) + (1 - alpha) * unit(local)


@register
@dataclass(frozen=True, kw_only=True)
class GlobalCom2(Method):
    """Share the budget among crops by what the thumbnail says, rank by thumbnail and crop.

    Args:
        score: "logits" (published code) or "softmax".
        saliency: "cls", scores of [CLS], or "cosine", the negative cosine to the mean feature.
        temperature: tau; 10, or 1 with "softmax", unless given.
        alpha: weight of the thumbnail's scores in a crop, in [0, 1].
        geometry: "grid", equal regions of the thumbnail (published code), or "exact", where the
            part of each crop that is not padding lies in the image.
        rounding: "exact" meets the budget; "published" keeps int(N R) and int(n_j r_j) tokens.
    """

    score: Literal["logits", "softmax"] = "logits"
    saliency: Literal["cls", "cosine"] = "cls"
    temperature: float | None = None
    alpha: float = 0.5
    geometry: Literal["grid", "exact"] = "grid"
    rounding: Literal["exact", "published"] = "exact"

    name = "globalcom2"
    summary = "Thumbnail scores share the budget among crops (GlobalCom2, AAAI 2026)"
    needs = frozenset({"cls"})
    without_cls: ClassVar[dict[str, Any]] = {"saliency": "cosine"}
    joint = True
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-next", tokens): {"keep_ratio": ratio, "rounding": "published"}
        for tokens, ratio in ((1440, 0.5), (720, 0.25), (288, 0.1))
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "score", ("logits", "softmax"))
        check_saliency(self, ("cls", "cosine"))
        check_choice(self, "geometry", ("grid", "exact"))
        check_choice(self, "rounding", ("exact", "published"))
        check_range(self, "temperature", "a divisor", "(]", high=inf, optional=True)
        check_range(self, "alpha", "a weight")
        if self.saliency == "cosine" and self.score != "logits":
            raise ValueError('saliency="cosine" has no scores of [CLS]: leave score out')
        if self.rounding == "published" and self.keep_tokens is not None:
            raise ValueError('rounding="published" truncates fractions: give keep_ratio')

    @property
    def has_budget(self) -> bool:
        return self.rounding == "exact"

    def captures(self, depth: int) -> tuple[int, ...]:
        return (LAYER % depth,) if self.saliency == "cls" else ()

    def ratios(self, sums: Tensor, ratio: float) -> Tensor:
        """(n,) fraction that each crop keeps, at most 1, from its region sum (n,)."""
        temperature = self.temperature
        if self.saliency == "cls" and self.score == "softmax":
            sums = (sums - sums.mean()) / sums.std(correction=0).clamp(min=1e-6)
            temperature = 1.0 if temperature is None else temperature
        temperature = 10.0 if temperature is None else temperature
        return crop_ratios(sums, ratio, temperature).clamp(max=1)

    def counts(
        self, k: int, ratio: float, thumbnail: int, scales: Sequence[float], sizes: Sequence[int]
    ) -> list[int]:
        """Tokens that the thumbnail and each crop keep.

        Args:
            k: all of them together, unless rounded as published; ratio: R.
            thumbnail: its patches; scales, sizes: r_j and n_j of each crop.
        """
        sizes = [thumbnail, *sizes]
        shares = [n * r for n, r in zip(sizes, (ratio, *scales), strict=True)]
        if self.rounding == "published":
            return [int(share) for share in shares]
        return apportion(k, shares, sizes)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if self.rounding == "published":
            ratio = self.default_ratio if self.keep_ratio is None else self.keep_ratio
            if ratio == 1:
                return None
        elif k >= v.count:
            return None
        else:
            ratio = k / v.total
        layout = v.crops
        if v.frame is not None:
            sizes = torch.bincount(v.frame[0], minlength=v.frames or 0).tolist()
            quota = apportion(k, sizes, sizes)
            if self.rounding == "published":
                quota = [int(n * ratio) for n in sizes]
            counts = torch.tensor([quota], device=v.frame.device)
            scores = self.scores(v, v.frame)
            return Reduction.from_mask(best_of_each(scores, v.frame, counts)).ranked(scores)
        if layout is None:
            every = torch.zeros_like(v.index)
            size = int(v.total * ratio) if self.rounding == "published" else k
            return Reduction.from_scores(self.scores(v, every), min(size, v.count))
        index = v.index[0]
        scores = self.scores(v, layout.crop.to(index.device)[index][None])[0].detach()
        kept = torch.zeros_like(scores, dtype=torch.bool)
        for here, ranks, count in self.plan(scores, layout, index, k, ratio):
            kept[here[top_k(ranks[None], count)[0]]] = True
            scores[here] = ranks
        return Reduction.from_mask(kept[None]).ranked(scores[None])

    def scores(self, v: FeaturesView, crop: Tensor) -> Tensor:
        """(B, N) of patches that lie in ``crop`` (B, N), each by its own view of the image."""
        if self.saliency == "cls":
            row = v.cls_logits(LAYER) if self.score == "logits" else v.cls_attention(LAYER)
            return row.mean(1)
        crop = crop.expand(v.features.shape[:2])
        return unlike(v.features, crop, int(crop.max()) + 1)

    def plan(
        self, scores: Tensor, layout: CropLayout, index: Tensor, k: int, ratio: float
    ) -> list[tuple[Tensor, Tensor, int]]:
        """For thumbnail and crops: their tokens, the scores of these, and how many stay.

        Args:
            scores: (N,) of the tokens at index (N,) of the image's patches.
        """
        n = layout.thumbnail
        first = (index < n).nonzero()[:, 0]
        if 0 in layout.canvas:  # no crops, or an image so narrow that no column of them is left
            return [(first, scores[first], self.counts(k, ratio, len(first), [], [])[0])]
        # Where an earlier method has removed patches of the thumbnail, the mean of the others.
        mean = scores[first].mean() if len(first) else scores.new_zeros(())
        thumbnail = mean.expand(n).scatter(0, index[first], scores[first])
        thumbnail = thumbnail.reshape(layout.side)
        overall = at_canvas(thumbnail, layout.canvas)
        crop = layout.crop.to(index.device)
        amount = layout.crops[0] * layout.crops[1]
        if self.geometry == "grid":
            sums = region_sums(thumbnail, layout.crops)
        else:  # cells of the thumbnail, counted in patches of the canvas
            under, cell = crop[n:] - 1, n / len(overall)
            sums = overall.new_zeros(amount).index_add(0, under, overall) * cell
        scales = self.ratios(sums, ratio).tolist()
        members = [(crop[index] == j + 1).nonzero()[:, 0] for j in range(amount)]
        counts = self.counts(k, ratio, len(first), scales, [len(m) for m in members])
        out = [(first, scores[first], counts[0])]
        for m, count in zip(members, counts[1:], strict=True):
            out.append((m, mix(overall[index[m] - n], scores[m], self.alpha), count))
        return out
