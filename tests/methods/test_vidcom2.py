# SPDX-License-Identifier: Apache-2.0
"""`vidcom2` by itself."""

from __future__ import annotations

from typing import Any

import mini_video as mini
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from video_views import LookJoint, frames_of, looked

import vtc
from vtc.methods.vidcom2 import VidCom2, frame_ratios
from vtc.views.features import FeaturesView


def test_vidcom2_ratios_by_hand() -> None:
    """Softmax at tau: ln 3 / 10 apart at tau = 0.1 is 1 to 3; R (1 + sigma - 1 / T)."""
    u = torch.tensor([0.0, torch.log(torch.tensor(3.0)) / 10])
    got = frame_ratios(u, 0.5, 0.1)
    torch.testing.assert_close(got, torch.tensor([0.375, 0.625]))
    assert frame_ratios(u, 0.9, 0.1).tolist() == pytest.approx([0.675, 1.0])


@torch.no_grad()
def test_vidcom2_by_hand() -> None:
    """Scores, frames' shares and choice of four frames, in plain loops."""
    model = mini.build("next-video")
    inputs = frames_of(model, {1: 0.3, 3: 1.5})
    (view,) = looked(model, inputs, LookJoint)
    x = view["features"].double().reshape(4, 4, -1)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(a @ b / a.norm() / b.norm())

    mean = x.mean((0, 1))
    video = [[-cosine(x[t, p], mean) for p in range(4)] for t in range(4)]
    score = [[video[t][p] - cosine(x[t, p], x[t].mean(0)) for p in range(4)] for t in range(4)]
    u = torch.tensor([sum(row) / 4 for row in video])
    for k, temperature in ((6, 0.05), (9, 0.01), (5, 10.0)):
        share = (u / temperature).exp()
        wanted = [min(1.0, k / 16 * (1 + float(s / share.sum()) - 1 / 4)) * 4 for s in share]
        scale = k / sum(wanted)
        counts = [int(scale * w) for w in wanted]
        rest = sorted(range(4), key=lambda t: counts[t] - scale * wanted[t])
        for t in rest[: k - sum(counts)]:
            counts[t] += 1
        want = []
        for t, row in enumerate(score):
            best = sorted(range(4), key=lambda p: -row[p])[: counts[t]]
            want += [4 * t + p for p in sorted(best)]
        chosen = VidCom2(keep_tokens=k, temperature=temperature)
        with vtc.compressing(model, chosen) as session:
            model(**inputs)
            assert session.report().kept[0].tolist() == want
    assert counts in ([1, 1, 1, 2], [2, 1, 1, 1], [1, 2, 1, 1], [1, 1, 2, 1])  # tau = 10: even


def test_vidcom2_ranks_by_video_and_frame() -> None:
    """Two frames: what is unlike its frame outranks what is a little less like the video."""
    x = torch.randn(1, 12, 3, generator=torch.Generator().manual_seed(2))
    x[:, :6] += torch.tensor([2.0, 0, 0])
    x[:, 6:] += torch.tensor([0, 2.0, 0])
    frame = torch.tensor([[0] * 6 + [1] * 6])
    place = torch.arange(12)[None]
    sizes: Any = dict(size=torch.ones(1, 12), index=place, total=12, grid=(2, 3), depth=1)
    view = FeaturesView(
        features=x, prefix=0, has_cls=False, projector=torch.nn.Identity(), layers={},
        frame=frame, frames=2, **sizes,
    )  # fmt: skip
    kept = VidCom2(keep_tokens=6, temperature=1e6).on_features(view).keep[0].tolist()
    unlike = [-F.cosine_similarity(x[0], x[0].mean(0), dim=-1)]
    unlike += [-F.cosine_similarity(x[0], x[0].reshape(2, 6, 3).mean(1)[frame[0]], dim=-1)]

    def best(score: Tensor) -> list[int]:
        return sorted(t * 6 + int(p) for t in range(2) for p in score[6 * t :][:6].topk(3).indices)

    assert kept == best(unlike[0] + unlike[1])
    assert kept not in (best(unlike[0]), best(unlike[1])), "no teeth"
