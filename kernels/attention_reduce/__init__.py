# SPDX-License-Identifier: Apache-2.0
"""Column sums of softmax(Q K^T scale), the attention that every key receives, without the matrix.

Two passes: the log-sum-exp of every row (skipped where attention already returned it), then, for
each block of keys, a loop over the queries. Not differentiable: the sums rank tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, unseen


@torch.library.custom_op("vtc::attention_column_sums", mutates_args=())
def _column_sums(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    return implementation("attention_reduce", q).column_sums(
        q, k, weights, lse, scale, causal, query_mask, key_mask
    )


@_column_sums.register_fake
def _(q: Tensor, k: Tensor, *_: Any) -> Tensor:
    return q.new_empty((*q.shape[:2], k.shape[2]), dtype=torch.float32)


@torch.library.custom_op("vtc::attention_row_lse", mutates_args=())
def _row_lse(q: Tensor, k: Tensor, scale: float, causal: bool, key_mask: Tensor | None) -> Tensor:
    return implementation("attention_reduce", q).row_lse(q, k, scale, causal, key_mask)


@_row_lse.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def _check(q: Tensor, k: Tensor) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads are no multiple of {k.shape[1]} key heads")


def row_lse(
    q: Tensor,
    k: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Log-sum-exp of every row of Q K^T scale, (B, H, Tq) fp32; -inf where no key is seen.

    See `column_sums` for the arguments.
    """
    _check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    if unseen(q, k):
        return implementation("attention_reduce", q).row_lse(q, k, scale, causal, key_mask)
    return _row_lse(q, k, scale, causal, key_mask)


def column_sums(
    q: Tensor,
    k: Tensor,
    *,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
    query_mask: Tensor | None = None,
    key_mask: Tensor | None = None,
) -> Tensor:
    """sum_i w_i A_ij with A = softmax(Q K^T scale) over the keys: (B, H, Tk) fp32, for each head.

    Args:
        q: (B, H, Tq, d); k: (B, H_kv, Tk, d), H a multiple of H_kv (grouped-query attention).
        weights: (B, H, Tq) w; ones when None. One step of A^T s is ``weights=s``.
        lse: (B, H, Tq) log-sum-exp of the rows, if attention returned it.
        scale: d^-0.5 when None.
        causal: query i sees the keys up to i + Tk - Tq, as with a KV cache.
        query_mask, key_mask: (B, Tq), (B, Tk) bool, False on padding.
    """
    _check(q, k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k = q.detach(), k.detach()
    how = weights, lse, scale, causal, query_mask, key_mask
    if unseen(q, k, weights, lse):
        return implementation("attention_reduce", q).column_sums(q, k, *how)
    return _column_sums(q, k, *how)
