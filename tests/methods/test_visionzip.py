# SPDX-License-Identifier: Apache-2.0
"""`visionzip` by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_views import DEPTH, HEADS, N, features_view, well_formed

from vtc.errors import UnsupportedError
from vtc.methods._common import unit
from vtc.methods.visionzip import VisionZip
from vtc.reduction import top_k


@pytest.mark.parametrize(
    ("k", "split"), [(64, (54, 10)), (128, (108, 20)), (192, (162, 30)), (1, (1, 0))]
)
def test_visionzip_split(k, split):
    assert VisionZip().split(k) == split


def test_visionzip_paper():
    for tokens in (64, 128, 192):
        assert VisionZip.paper("llava-1.5", tokens=tokens).budget(576) == tokens
    assert VisionZip().captures(24) == (22,)
    assert VisionZip().needs == VisionZip.needs == {"cls"}
    assert VisionZip(saliency="received").needs == frozenset()


def test_visionzip_by_hand():
    v = features_view(batch=1)
    reduction = VisionZip(keep_tokens=14, contextual=4).on_features(v)
    layer = v.layers[DEPTH - 2]
    cls = layer.attention(slice(None))[0, :, 0, 1:].sum(0)
    dominant = cls.argsort(descending=True, stable=True)[:10].sort().values.tolist()
    rest = [i for i in range(N) if i not in dominant]
    targets = rest[:: len(rest) // 4][:4]
    assert reduction.keep[0].tolist() == sorted(dominant + targets)
    key = unit(layer.key().mean(1)[0, 1:])
    for i in range(N):
        representative = reduction.keep[0, reduction.group[0, i]].item()
        if i in dominant or i in targets:
            assert representative == i
        else:
            assert representative == targets[int((key[targets] @ key[i]).argmax())]


def test_visionzip_targets_stay_even_when_keys_are_equal():
    v = features_view(batch=1)
    key = torch.ones(1, HEADS, N + 1, 8)
    v.layers[DEPTH - 2] = replace(v.layers[DEPTH - 2], key=lambda: key)
    reduction = VisionZip(keep_tokens=14, contextual=4).on_features(v)
    well_formed(reduction, N, 14)
    _, size = reduction.merge(v.features)
    assert size[0].sort().values.tolist() == [1.0] * 13 + [N - 13.0]  # all to the first target


def test_visionzip_without_cls():
    v = features_view(batch=1, has_cls=False)
    reduction = VisionZip(saliency="received", keep_tokens=8, contextual=0).on_features(v)
    received = v.layers[DEPTH - 2].attention(slice(None))[0].mean(0).mean(0)
    assert torch.equal(reduction.keep, top_k(received[None], 8))
    with pytest.raises(UnsupportedError, match=r"\[CLS\]"):
        VisionZip().on_features(v)
    with pytest.raises(ValueError, match="exceeds the budget of 8"):
        VisionZip(keep_tokens=8, contextual=9).on_features(v)
