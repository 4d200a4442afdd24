# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `attention_reduce`.

The second pass has one program for each block of keys and head, which loops over the queries and
stores its sums once: no atomics, so reruns are equal to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot, load_rows


@triton.jit
def row_lse_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    key_mask_ptr,
    H,
    GROUP,
    TQ,
    TK,
    C,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    scale,
    CAUSAL: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ONE_STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = (tl.program_id(1) % H).to(tl.int64)
    batch = (tl.program_id(1) // H).to(tl.int64)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // GROUP * k_head_stride
    rows = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    row_ok = rows < TQ
    top = tl.full((BLOCK_Q,), -float("inf"), tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    if ONE_STEP:
        q_all = load_rows(q_ptr, rows, row_ok, q_stride, 0, C, BLOCK_C)
    end = TK
    if CAUSAL:
        end = tl.minimum(TK, (tl.program_id(0) + 1) * BLOCK_Q + TK - TQ)
    for start in range(0, end, BLOCK_K):
        columns = start + tl.arange(0, BLOCK_K)
        column_ok = columns < TK
        if KEY_MASK:
            alive = tl.load(key_mask_ptr + batch * TK + columns, mask=column_ok, other=0)
            column_ok = column_ok & (alive != 0)
        s = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        if ONE_STEP:
            k = load_rows(k_ptr, columns, column_ok, k_stride, 0, C, BLOCK_C)
            s = dot(q_all, tl.trans(k), s)
        else:
            for c in range(0, C, BLOCK_C):
                q = load_rows(q_ptr, rows, row_ok, q_stride, c, C, BLOCK_C)
                k = load_rows(k_ptr, columns, column_ok, k_stride, c, C, BLOCK_C)
                s = dot(q, tl.trans(k), s)
        inside = column_ok[None, :]
        if CAUSAL:
            inside = inside & (columns[None, :] <= rows[:, None] + (TK - TQ))
        s = tl.where(inside, s * scale, -float("inf"))
        new_top = tl.maximum(top, tl.max(s, 1))
        shift = tl.maximum(new_top, -3.0e38)  # a row that has seen no key: exp(-inf), not NaN
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(s - shift[:, None]), 1)
        top = new_top
    lse = tl.where(total > 0, top + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    place = (batch * H + head) * TQ + rows
    tl.store(lse_ptr + place, lse, mask=row_ok)


@triton.jit
def column_sums_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    weight_ptr,
    query_mask_ptr,
    key_mask_ptr,
    out_ptr,
    H,
    GROUP,
    TQ,
    TK,
    C,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    scale,
    CAUSAL: tl.constexpr,
    WEIGHTED: tl.constexpr,
    QUERY_MASK: tl.constexpr,
    KEY_MASK: tl.constexpr,
    ONE_STEP: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    head = (tl.program_id(1) % H).to(tl.int64)
    batch = (tl.program_id(1) // H).to(tl.int64)
    q_ptr += batch * q_batch_stride + head * q_head_stride
    k_ptr += batch * k_batch_stride + head // GROUP * k_head_stride
    lse_ptr += (batch * H + head) * TQ
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_ok = columns < TK
    if KEY_MASK:
        alive = tl.load(key_mask_ptr + batch * TK + columns, mask=column_ok, other=0)
        column_ok = column_ok & (alive != 0)
    total = tl.zeros((BLOCK_K,), tl.float32)
    if ONE_STEP:
        k_all = load_rows(k_ptr, columns, column_ok, k_stride, 0, C, BLOCK_C)
    first = 0
    if CAUSAL:  # earlier queries see none of these keys
        first = tl.maximum(0, tl.program_id(0) * BLOCK_K - (TK - TQ)) // BLOCK_Q * BLOCK_Q
    for start in range(first, TQ, BLOCK_Q):
        rows = start + tl.arange(0, BLOCK_Q)
        row_ok = rows < TQ
        if QUERY_MASK:
            asks = tl.load(query_mask_ptr + batch * TQ + rows, mask=row_ok, other=0)
            row_ok = row_ok & (asks != 0)
        s = tl.zeros((BLOCK_Q, BLOCK_K), tl.float32)
        if ONE_STEP:
            q = load_rows(q_ptr, rows, row_ok, q_stride, 0, C, BLOCK_C)
            s = dot(q, tl.trans(k_all), s)
        else:
            for c in range(0, C, BLOCK_C):
                q = load_rows(q_ptr, rows, row_ok, q_stride, c, C, BLOCK_C)
                k = load_rows(k_ptr, columns, column_ok, k_stride, c, C, BLOCK_C)
                s = dot(q, tl.trans(k), s)
        lse = tl.load(lse_ptr + rows, mask=row_ok, other=float("inf"))
        row_ok = row_ok & (lse > -float("inf"))
        inside = row_ok[:, None] & column_ok[None, :]
        if CAUSAL:
            inside = inside & (columns[None, :] <= rows[:, None] + (TK - TQ))
        p = tl.exp(tl.where(inside, s * scale - lse[:, None], -float("inf")))
        if WEIGHTED:
            w = tl.load(weight_ptr + (batch * H + head) * TQ + rows, mask=row_ok, other=0.0)
            p = p * w.to(tl.float32)[:, None]
        total += tl.sum(p, 0)
    place = (batch * H + head) * TK + columns
    tl.store(out_ptr + place, total, mask=columns < TK)


def config(c: int, dtype: torch.dtype) -> dict[str, Any]:
    """One of three launch configurations, chosen by the width of a head.

    fp32 takes short steps: each of its products is three, whose operands need registers.
    """
    one_step = c <= 128 and dtype != torch.float32
    block_c = 16 if dtype == torch.float32 else 128 if one_step and c > 64 else 64
    return {
        "ONE_STEP": one_step,
        "BLOCK_Q": 64,
        "BLOCK_K": 64,
        "BLOCK_C": block_c,
        "num_warps": 4,
        "num_stages": 3,
    }


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _sizes(q: Tensor, k: Tensor) -> tuple[int, ...]:
    heads = q.shape[1]
    strides = (*q.stride()[:3], *k.stride()[:3])
    return heads, heads // k.shape[1], q.shape[2], k.shape[2], q.shape[3], *strides


def row_lse(q: Tensor, k: Tensor, scale: float, causal: bool, key_mask: Tensor | None) -> Tensor:
    """See `vtc.kernels.attention_reduce`."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    chosen = config(q.shape[3], q.dtype)
    out = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel():
        row_lse_kernel[(triton.cdiv(q.shape[2], chosen["BLOCK_Q"]), q.shape[0] * q.shape[1])](
            q,
            k,
            out,
            _bytes(key_mask),
            *_sizes(q, k),
            float(scale),
            CAUSAL=causal,
            KEY_MASK=key_mask is not None,
            **chosen,
        )
    return out


def column_sums(
    q: Tensor,
    k: Tensor,
    weights: Tensor | None,
    lse: Tensor | None,
    scale: float,
    causal: bool,
    query_mask: Tensor | None,
    key_mask: Tensor | None,
) -> Tensor:
    """See `vtc.kernels.attention_reduce`."""
    q, k = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k))
    chosen = config(q.shape[3], q.dtype)
    out = torch.empty((*q.shape[:2], k.shape[2]), dtype=torch.float32, device=q.device)
    if not out.numel():
        return out
    if lse is None:
        lse = row_lse(q, k, scale, causal, key_mask)
    column_sums_kernel[(triton.cdiv(k.shape[2], chosen["BLOCK_K"]), q.shape[0] * q.shape[1])](
        q,
        k,
        lse.float().contiguous(),
        weights if weights is None else weights.contiguous(),
        _bytes(query_mask),
        _bytes(key_mask),
        out,
        *_sizes(q, k),
        float(scale),
        CAUSAL=causal,
        WEIGHTED=weights is not None,
        QUERY_MASK=query_mask is not None,
        KEY_MASK=key_mask is not None,
        **chosen,
    )
    return out
