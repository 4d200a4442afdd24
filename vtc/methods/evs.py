# SPDX-License-Identifier: Apache-2.0
"""EVS: drop what has not changed since the frame before.

Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference, NVIDIA,
arXiv 2510.14624. With x_{t,p} the feature of patch p in frame t, in the space of the LLM:

    d_{t,p} = 1 - cos(x_{t,p}, x_{t-1,p}),  d_{1,p} = infinity
    keep the tokens of the whole video with the largest d

so the first frame stays whole, and every other one shares what is left by how much it changed.
A video is one budget; no number of tokens is promised to any frame but the first.

Departures: exactly as many tokens stay as asked, where a quantile of d leaves more at a tie (here
the earlier token goes first), and a budget below the first frame is refused, where the paper keeps
that frame and so more than was asked. Positions stay those of the full video, as everywhere here.
Behind a method that removes patches, a token is compared with the last one there was at its place,
and the first one at a place counts as new. Images have no frames and are refused. Written from the
paper's idea; its code was not read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..method import Method
from ..reduction import Reduction, gather_tokens
from ..registry import register
from ..views.features import FeaturesView
from ._common import unit

if TYPE_CHECKING:
    from ..adapters.base import Sites

OTHERS = "vidcom2 (which takes a still for a video of one frame), divprune, visionzip"


def change(x: Tensor, place: Tensor) -> Tensor:
    """(B, N) 1 - cos of each of x (B, N, C) to the last one before it at its place, or infinity.

    Args:
        place: (B, N) where in the grid of its frame each token lies, frame after frame.
    """
    order = place.argsort(dim=1, stable=True)  # place by place, and frame by frame within
    sorted_x, at = unit(gather_tokens(x, order)), place.gather(1, order)
    changed = 1 - (sorted_x[:, 1:] * sorted_x[:, :-1]).sum(-1)
    changed = changed.masked_fill(at[:, 1:] != at[:, :-1], torch.inf)
    first = changed.new_full((len(x), 1), torch.inf)
    changed = torch.cat([first, changed], 1)
    return torch.zeros_like(changed).scatter(1, order, changed)


@register
@dataclass(frozen=True, kw_only=True)
class EVS(Method):
    """Keep the tokens of a video that differ most from the same patch one frame before."""

    name = "evs"
    summary = "Keeps what changed since the last frame of a video (EVS, 2025)"
    needs = frozenset({"frames"})
    joint = True

    def check(self, sites: Sites) -> None:
        if sites.decoder is None or sites.decoder.videos is None:
            raise UnsupportedError(
                "evs compares the frames of a video, and vtc knows of no videos of this model; "
                f"methods for images: {OTHERS}"
            )

    def check_frames(self, frames: list[int] | None) -> None:
        if frames is None:
            raise UnsupportedError(
                f"evs compares the frames of a video, and the prompt has an image; use {OTHERS}"
            )
        total, first = sum(frames), frames[0]
        if self.budget(total) < first:
            raise UnsupportedError(
                f"evs keeps the first frame of a video whole, {first} tokens of {total}, and was "
                f"asked for {self.budget(total)}; give keep_tokens={first} or more, or use vidcom2"
            )

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count or v.frame is None or v.frames is None:
            return None
        place = v.index % (v.total // v.frames)
        return Reduction.from_scores(change(v.projected, place), k)
