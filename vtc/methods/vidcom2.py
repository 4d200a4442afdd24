# SPDX-License-Identifier: Apache-2.0
"""VidCom2: frames that are unlike the video get more of the budget, and keep what is unlike.

Liu et al., Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large
Language Models, EMNLP 2025, arXiv 2505.14454. With features x of T frames, R the fraction to keep,
g the mean of all tokens of the video and g_t that of frame t:

    s_i^V  = -cos(x_i, g),   s_i^F = -cos(x_i, g_t)
    u_t    = mean of s^V over frame t
    sigma  = softmax(u / tau)
    r_t    = min(1, R (1 + sigma_t - 1 / T))
    keep the best r_t n_t of the n_t tokens of frame t by s^V + s^F

Departures: exactly as many tokens stay as asked, r_t n_t made whole by largest remainder, and what
a full frame cannot take goes to the others. tau is 0.01 unless given, with which frames whose u
differ by a hundredth differ in sigma by a factor of e; whether it is the paper's value was not
checked. Features are the encoder's, as they go into the projector (behind the pooling of frames).
An image is a video of one frame, each crop of it a frame where the model cuts it up. Written from
the formulas above; similarities are cosines throughout, whatever the published code computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, prod

import torch
from torch import Tensor

from ..budgets import apportion
from ..hyperparameters import check_range
from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..views.features import FeaturesView
from ._common import best_of_each, unlike


def frame_ratios(uniqueness: Tensor, ratio: float, temperature: float) -> Tensor:
    """(T,) fraction that each frame keeps, at most 1, from how unlike the video (T,) it is."""
    share = (uniqueness / temperature).softmax(0)
    return (ratio * (1 + share - 1 / len(share))).clamp(max=1)


@register
@dataclass(frozen=True, kw_only=True)
class VidCom2(Method):
    """Share the budget of a video among its frames by how unlike the video they are.

    Args:
        temperature: tau; large values give every frame the same.
    """

    temperature: float = 0.01

    name = "vidcom2"
    summary = "Frames unlike the video keep more, and what is unlike (VidCom2, EMNLP 2025)"
    joint = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "temperature", "a divisor", "(]", high=inf)

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        video = unlike(v.features, torch.zeros_like(v.index), 1)
        frame, frames = v.frame, v.frames
        if v.crops is not None:
            frame = v.crops.crop.to(v.index.device)[v.index]
            frames = 1 + prod(v.crops.crops)
        if frame is None or frames is None:
            return Reduction.from_scores(video, k)  # one frame, whose mean is that of the video
        frame = frame.to(v.features.device)
        score = video + unlike(v.features, frame, frames)
        quota = [self.quota(*row, k / v.total, k, frames) for row in zip(video, frame, strict=True)]
        chosen = best_of_each(score, frame, torch.tensor(quota, device=frame.device))
        return Reduction.from_mask(chosen).ranked(score)

    def quota(self, video: Tensor, frame: Tensor, ratio: float, k: int, frames: int) -> list[int]:
        """Tokens that each frame keeps, k in sum, from the scores (N,) of the tokens in it (N,)."""
        sizes = torch.bincount(frame, minlength=frames)
        there = sizes > 0
        mean = video.new_zeros(frames).index_add(0, frame, video) / sizes.clamp(min=1)
        scales = mean.new_zeros(frames)
        # Corrupt frames are no concern of this method.
        scales[there] = frame_ratios(mean[there].nan_to_num(), ratio, self.temperature)
        return apportion(k, (scales * sizes).tolist(), sizes.tolist())
