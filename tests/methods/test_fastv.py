# SPDX-License-Identifier: Apache-2.0
"""`fastv` by itself."""

from __future__ import annotations

import torch
from synthetic_views import decoder_view

from vtc.methods.fastv import FastV
from vtc.reduction import top_k


def test_fastv_ranks_by_the_last_row_of_layer_k_minus_1():
    view, weights = decoder_view([[20], [20]])
    method = FastV(keep_tokens=6)
    assert method.after_layer == 1 and method.stages == {"decoder"}
    reduction = method.on_decoder_layer(view)
    assert torch.equal(reduction.keep, top_k(weights[:, :, 24, :20].mean(1), 6))
    assert tuple(method.decoder_layers(24)) == (1,)
    assert tuple(FastV(k=4).decoder_layers(24)) == (3,)
    assert FastV().on_decoder_layer(view).count == 10


def test_fastv_budgets_are_per_row_when_rows_differ():
    view, weights = decoder_view([[20], [8, 4], [10]])
    reduction = FastV(keep_ratio=0.5).on_decoder_layer(view)
    assert reduction.counts.tolist() == [10, 6, 5]
    last = weights[1, :, 16, :12].mean(0)  # 12 visual and 5 text tokens
    assert reduction.keep[1, :6].tolist() == top_k(last[None], 6)[0].tolist()
    assert (reduction.group[2, 10:] == -1).all()
