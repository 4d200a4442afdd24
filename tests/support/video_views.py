# SPDX-License-Identifier: Apache-2.0
"""Videos, and methods that note what they see of each frame."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import mini_video as mini
import torch
from mini_video import Clip
from torch import Tensor

import vtc


@dataclass(frozen=True, kw_only=True)
class Look(vtc.Method):
    """Notes what the features stage sees of each frame, or of each video."""

    name: ClassVar[str] = "test-frames"
    seen: ClassVar[list[Any]] = []

    def captures(self, depth: int) -> tuple[int, ...]:
        return (1,)

    def on_features(self, v: Any) -> None:
        for row in range(len(v.features)):
            self.seen.append(
                {
                    "grid": v.grid,
                    "total": v.total,
                    "video": int(v.image[row]),
                    "index": v.index[row],
                    "frame": None if v.frame is None else v.frame[row],
                    "frames": v.frames,
                    "features": v.features[row],
                    "projected": v.projected[row],
                    "received": v.attention_received(1)[row],
                    "key": v.key(1)[row],
                }
            )


@dataclass(frozen=True, kw_only=True)
class LookJoint(Look):
    name: ClassVar[str] = "test-videos"
    joint: ClassVar[bool] = True


def looked(model: Any, inputs: dict[str, Tensor], method: type[Look]) -> list[Any]:
    Look.seen.clear()
    with vtc.compressing(model, method()):
        model(**inputs)
    return list(Look.seen)


def frames_of(model: Any, turned: dict[int, float]) -> dict[str, Tensor]:
    """A video of four equal frames, noise of some strength added to some of them."""
    inputs = mini.prompt([[Clip(4)]], "next-video")
    g = torch.Generator().manual_seed(5)
    still = torch.randn(inputs["pixel_values_videos"].shape[2:], generator=g)
    for t in range(4):
        noise = torch.randn(still.shape, generator=g)
        inputs["pixel_values_videos"][0, t] = still + turned.get(t, 0.0) * noise
    return inputs
