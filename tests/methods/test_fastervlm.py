# SPDX-License-Identifier: Apache-2.0
"""`fastervlm` by itself."""

from __future__ import annotations

import pytest
import torch
from synthetic_views import DEPTH, features_view

from vtc.errors import UnsupportedError
from vtc.methods.fastervlm import FasterVLM
from vtc.reduction import top_k


def test_fastervlm_is_top_k_of_the_last_cls_row():
    v = features_view()
    last = v.layers[DEPTH - 1].attention(slice(None))[:, :, 0, 1:].mean(1)
    assert torch.equal(FasterVLM(keep_tokens=9).on_features(v).keep, top_k(last, 9))
    assert FasterVLM().captures(24) == (23,)
    with pytest.raises(UnsupportedError, match=r"\[CLS\]"):
        FasterVLM().on_features(features_view(has_cls=False))
