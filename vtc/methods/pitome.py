# SPDX-License-Identifier: Apache-2.0
"""PiToMe: merge the tokens of large homogeneous regions, protect the distinctive ones.

Tran et al., Accelerating Transformers with Spectrum-Preserving Token Merging, NeurIPS 2024,
arXiv 2405.16148. In each encoder block l of L, with features v of unit length (no prefix tokens):

    S_ij = v_i . v_j                          m = margin (1 - l / L)
    E_i  = mean_j f(S_ij - m)                 "elu", code:    f(s) = s if s > 0 else alpha (e^s - 1)
                                              "paper", Eq. 4: s + m instead of s in the upper branch
    merge = the 2r tokens of highest energy   A, B = every other one of them, by energy
    each a in A folds into argmax_b S_ab      size-weighted mean, then m_b = m_b + sum m_a

The paper takes keys as features, weighs by size and uses proportional attention. The published
code differs from backbone to backbone; ``PiToMe.preset("llava", ratio=0.9)`` and its siblings are
the code. Two variants of the matching come from there: "pitome_bsm" splits all tokens by energy
rank and keeps the r best edges, without a protected set; "bsm" is ToMe's split by place.

Departures: survivors keep raster order instead of [protected by energy, B], so later "bsm" blocks
split differently; r never exceeds half of the patches (the code breaks there); with a budget each
block keeps a near-constant ratio such that exactly the asked number remains. Text encoders and the
"prune" mode of the code are not offered.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from ..budgets import geometric_counts
from ..errors import UnsupportedError
from ..hyperparameters import check_choice, check_count, check_no_budget, check_range
from ..kernels import similarity_reduce
from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..views.vision import VisionView
from ._matching import match, match_parity

Matching = Literal["pitome", "pitome_bsm", "bsm"]


def match_energy(x: Tensor, energy: Tensor, r: int, protect: bool = True) -> Tensor:
    """Token that each one folds into, (B, T) int64; itself where it stays.

    Args:
        x: (B, T, C), compared by their cosines; energy: (B, T), high in large homogeneous regions.
        r: tokens to remove, at most T / 2.
        protect: take only the 2r tokens of highest energy; else all, and the r best edges.
    """
    order = energy.argsort(dim=1, descending=True, stable=True)
    if protect:
        order = order[:, : 2 * r]
    return match(x, order[:, 0::2], order[:, 1::2], r)


BACKBONES: dict[str, dict[str, Any]] = {
    "timm": {"margin": 0.75, "first": "pitome_bsm", "proportional_attention": False},
    "mae": {
        "margin": 0.75,
        "first": "pitome",
        "matching": "pitome_bsm",
        "proportional_attention": False,
    },
    "blip": {"metric": "hidden", "skip_last": 1, "proportional_attention": False},
    "openclip": {"margin": 0.95, "metric": "hidden", "proportional_attention": False},
    "blip2": {"margin": 0.75, "margin_slope": 0.4},
    "llava": {
        "margin_depth": 24,
        "metric": "hidden",
        "vision_site": "output",
        "first": "bsm",
        "first_blocks": 13,
        "track_size": False,
        "proportional_attention": False,
    },
}
"""Choices of the published code for each backbone; "timm" is DeiT, "blip2" the EVA encoder."""


@register
@dataclass(frozen=True, kw_only=True)
class PiToMe(Method):
    """Merge high-energy tokens in every encoder block.

    Args:
        ratio: fraction of the tokens that each block keeps, in [0.5, 1], with the published
            rounding; instead of a budget.
        energy: "elu" (published code) or "paper" (Eq. 4).
        metric: "key", keys averaged over heads, or "hidden", the hidden states.
        margin, margin_slope, margin_depth: the margin in block l is margin - slope * l / depth;
            the slope is the margin and the depth that of the encoder unless given.
        alpha: weight of the negative branch of the energy.
        matching: "pitome", "pitome_bsm" or "bsm".
        first, first_blocks: another matching for the first blocks, half of them unless given.
        skip_last: blocks at the end that do not merge.
        vision_site: "middle", between attention and MLP, or "output" of the block.
        track_size: weigh the mean by token size; else each step takes the plain mean.
        proportional_attention: add the log of the token sizes to the attention scores.
    """

    ratio: float | None = None
    energy: Literal["elu", "paper"] = "elu"
    metric: Literal["key", "hidden"] = "key"
    margin: float = 0.9
    margin_slope: float | None = None
    margin_depth: int | None = None
    alpha: float = 1.0
    matching: Matching = "pitome"
    first: Matching | None = None
    first_blocks: int | None = None
    skip_last: int = 0
    vision_site: Literal["middle", "output"] = "middle"  # type: ignore[misc]
    track_size: bool = True  # type: ignore[misc]
    proportional_attention: bool = True  # type: ignore[misc]

    name = "pitome"
    summary = "Merges high-energy tokens in every encoder block (PiToMe, arXiv 2405.16148)"
    merges = True
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", tokens): dict(BACKBONES["llava"], ratio=ratio)
        for tokens, ratio in ((54, 0.9), (101, 0.925), (183, 0.95), (330, 0.975))
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_budget(self, "ratio")
        what = "the fraction of tokens that each block keeps, which can merge at most half"
        check_range(self, "ratio", what, low=0.5, optional=True)
        check_choice(self, "energy", ("elu", "paper"))
        check_choice(self, "metric", ("key", "hidden"))
        check_range(self, "margin", "a cosine", low=-1)
        check_choice(self, "matching", get_args(Matching))
        check_choice(self, "first", (None, *get_args(Matching)))
        check_choice(self, "vision_site", ("middle", "output"))
        check_count(self, "margin_depth", "a count of blocks", least=1, optional=True)
        check_count(self, "first_blocks", "a count of blocks", least=0, optional=True)
        check_count(self, "skip_last", "a count of blocks", least=0)

    @classmethod
    def preset(cls, backbone: str, **kwargs: Any) -> PiToMe:
        """The published code's settings for a backbone, with a ratio or budget of yours."""
        if backbone not in BACKBONES:
            raise UnsupportedError(
                f'pitome: no preset for "{backbone}"; known: {", ".join(BACKBONES)}'
            )
        return cls(**{**BACKBONES[backbone], **kwargs})

    @property
    def has_budget(self) -> bool:
        return self.ratio is None

    def matching_at(self, layer: int, depth: int) -> Matching:
        """The matching that block ``layer`` of ``depth`` uses."""
        first_blocks = -(-depth // 2) if self.first_blocks is None else self.first_blocks
        return self.first if self.first and layer < first_blocks else self.matching

    def schedule(self, n: int, depth: int, prefix: int = 0) -> list[int]:
        """Patch tokens left after each block, from n; "bsm" blocks count the prefix in a ratio."""
        steps = max(depth - self.skip_last, 0)
        if self.ratio is None:
            counts = geometric_counts(n, self.budget(n), steps)
            return counts + [self.budget(n)] * (depth - steps)
        counts = []
        for layer in range(depth):
            tokens = n + (prefix if self.matching_at(layer, depth) == "bsm" else 0)
            if layer < steps:
                n -= min(math.floor(tokens - tokens * self.ratio), n // 2)
            counts.append(n)
        return counts

    def on_vision_layer(self, v: VisionView) -> Reduction | None:
        target = self.schedule(v.total, v.depth, v.prefix)[v.layer]
        r = min(v.count - target, v.count // 2)
        if r <= 0:
            return None
        x = v.key_mean if self.metric == "key" else v.x
        matching = self.matching_at(v.layer, v.depth)
        if matching == "bsm":
            into = match_parity(x, r, v.prefix)
        else:
            slope = self.margin if self.margin_slope is None else self.margin_slope
            margin = self.margin - slope * v.layer / (self.margin_depth or v.depth)
            patches = x[:, v.prefix :]
            energy = similarity_reduce.energy(patches, margin, self.alpha, self.energy)
            into = v.in_sequence(match_energy(patches, energy, r, protect=matching == "pitome"))
        return Reduction.from_merge(into, v.x.shape[1] - r)
