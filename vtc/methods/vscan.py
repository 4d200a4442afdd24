# SPDX-License-Identifier: Apache-2.0
"""VScan: local and global [CLS] attention in front of the LLM, the prompt's attention inside it.

Zhang et al., VScan: Rethinking Visual Token Reduction for Efficient Large Vision-Language Models,
2025, arXiv 2505.22654. Between encoder and LLM, K tokens stay:

    local   K // 2: [CLS] attention in encoder block 5 of 24, windows of 6 x 6 patches, the same
            number of tokens from each
    global  the rest of K: [CLS] attention in the last but one block
    merge   every other token goes to the most similar one that stays, which becomes their mean

After LLM layer 15 (0-based, of 32) a third of them stays, ranked by the attention of the last
prompt token in that layer. The budget is the final one: k tokens at the end, min(n, 3 k) enter the
LLM. At a third, the mean over the LLM layers is 2 k, and the published 64, 128 and 192 are such
means: k = 32, 64, 96 (`paper`).

Departures and decisions: local tokens are chosen first and global ones among the others, so the two
never overlap and K is exact; where K // 2 is not a multiple of the windows, the windows whose next
token has the highest attention give one more; grids that 6 does not divide get windows as even as
possible; similarity is the cosine of the features that go to the projector; the mean is weighted by
size where a method before this one has merged; a crop of a high-resolution image is selected from
like an image; layers of other depths are scaled; survivors keep their RoPE positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..budgets import relative_layers
from ..hyperparameters import check_count
from ..reduction import Reduction, top_k
from ..registry import register
from ..views.decoder import DecoderView
from ..views.features import FeaturesView
from ._common import attended, into_nearest, places
from ._stages import TwoPlaces

LOCAL, GLOBAL = 5, -2  # encoder blocks: of 24, and from the end


def windows(index: Tensor, grid: tuple[int, int], side: int) -> Tensor:
    """The window (B, N) of each patch at index (B, N) of the grid."""
    rows, columns = grid
    down, across = max(1, round(rows / side)), max(1, round(columns / side))
    row, column = index // columns, index % columns
    return row * down // rows * across + column * across // columns


def best_of_windows(scores: Tensor, window: Tensor, k: int) -> Tensor:
    """(B, k) tokens: the best of each window, then the second best of each, and so on."""
    order = scores.float().argsort(dim=1, descending=True, stable=True)
    turn = places(window.gather(1, order)).argsort(dim=1, stable=True)[:, :k]
    return order.gather(1, turn)


@register
@dataclass(frozen=True, kw_only=True)
class VScan(TwoPlaces):
    """Keep what [CLS] attends to, early by window and late overall; merge the rest; prune again.

    Args:
        window: side of the windows, in patches.
        llm_share: fraction of the tokens that entered the LLM which its middle layer keeps; 1 for
            no selection inside the LLM.
    """

    window: int = 6
    llm_share: float = 1 / 3

    name = "vscan"
    summary = "[CLS] attention, by window and overall; a third of it after LLM layer 16 (VScan)"
    needs = frozenset({"cls", "ran"})
    merges = True
    default_ratio = 1 / 9
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", mean): {"keep_tokens": mean // 2} for mean in (64, 128, 192)
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count(self, "window", "a side in patches", least=1)

    def captures(self, depth: int) -> tuple[int, ...]:
        return (*relative_layers((LOCAL,), of=24, depth=depth), GLOBAL % depth)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        n, k = v.count, self.entering(v)
        if k >= n:
            return None
        (early,) = relative_layers((LOCAL,), of=24, depth=v.depth)
        window = windows(v.index, v.grid, self.window)
        local = best_of_windows(v.cls_attention(early).mean(1), window, k // 2)

        scores = v.cls_attention(GLOBAL).mean(1)
        kept = top_k(scores.scatter(1, local, torch.inf), k)
        return Reduction.from_merge(into_nearest(v.features, kept), k).ranked(scores)

    def on_decoder_layer(self, v: DecoderView) -> Reduction | None:
        if v.within_budget(self):
            return None
        return Reduction.from_scores(attended(v, "last"), v.budget(self), v.valid)
