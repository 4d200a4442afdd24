# SPDX-License-Identifier: Apache-2.0
"""`uniform` by itself."""

from __future__ import annotations

from synthetic_views import features_view

from vtc.methods.uniform import Uniform


def test_uniform_is_a_centred_stride():
    v = features_view()
    assert Uniform(keep_tokens=4).on_features(v).keep[0].tolist() == [6, 18, 30, 42]
    assert Uniform(keep_tokens=1).on_features(v).keep[0].tolist() == [24]
    assert Uniform(keep_tokens=5).on_features(v).keep[0].tolist() == [4, 14, 24, 33, 43]
