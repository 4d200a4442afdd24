# SPDX-License-Identifier: Apache-2.0
"""`evs` by itself."""

from __future__ import annotations

import mini_video as mini
import torch
from video_views import frames_of

import vtc
from vtc.methods.evs import change


def test_change_by_hand() -> None:
    """Two places, three frames: a quarter turn, a half turn, and no change."""
    x = torch.tensor([[[1.0, 0], [0, 2], [0, 1], [0, 3], [0, 1], [0, -1]]])
    place = torch.tensor([[0, 1, 0, 1, 0, 1]])
    inf = torch.inf
    torch.testing.assert_close(change(x, place), torch.tensor([[inf, inf, 1, 0, 0, 2.0]]))
    gone = torch.tensor([[0, 1, 3, 4, 5]])  # place 0 of the second frame was removed before
    want = torch.tensor([[inf, inf, 0, 1, 2.0]])
    torch.testing.assert_close(change(x[:, gone[0]], place[:, gone[0]]), want)


@torch.no_grad()
def test_evs_drops_what_stands_still() -> None:
    model = mini.build("next-video")
    inputs = frames_of(model, {2: 1.0})
    with vtc.compressing(model, "evs", keep_tokens=12) as session:
        model(**inputs)
        kept = session.report().kept[0]
    assert kept.tolist() == [0, 1, 2, 3, *range(8, 16)]  # the second frame is the first again
    with vtc.compressing(model, "evs", keep_tokens=4) as session:
        model(**inputs)
        assert session.report().kept[0].tolist() == [0, 1, 2, 3]
