# SPDX-License-Identifier: Apache-2.0
"""Triton kernel of `compact_tokens`: one launch copies the survivors of up to four tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

TENSORS = 4
"""Tensors of one launch."""


@triton.jit
def copy_rows(
    x_ptr,
    out_ptr,
    row_stride,
    WIDTH,
    source,
    target,
    live,
    target_ok,
    BLOCK_W: tl.constexpr,
):
    for first in range(0, WIDTH, BLOCK_W):
        words = first + tl.arange(0, BLOCK_W)
        inside = (words < WIDTH)[None, :]
        place = source[:, None] * row_stride + words[None, :]
        row = tl.load(x_ptr + place, mask=inside & live[:, None], other=0)
        place = target[:, None] * WIDTH + words[None, :]
        tl.store(out_ptr + place, row, mask=inside & target_ok[:, None])


@triton.jit
def compact_kernel(
    keep_ptr,
    destination_ptr,
    x0_ptr,
    x1_ptr,
    x2_ptr,
    x3_ptr,
    out0_ptr,
    out1_ptr,
    out2_ptr,
    out3_ptr,
    stride0,
    stride1,
    stride2,
    stride3,
    batch_stride0,
    batch_stride1,
    batch_stride2,
    batch_stride3,
    width0,
    width1,
    width2,
    width3,
    K,
    SCATTER: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    slots = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot_ok = slots < K
    source = tl.load(keep_ptr + batch * K + slots, mask=slot_ok, other=0)
    target = batch * K + slots
    live = slot_ok
    target_ok = slot_ok
    if SCATTER:
        destination = tl.load(destination_ptr + batch * K + slots, mask=slot_ok, other=-1)
        live = destination >= 0
        if FLAT:  # else padding has a place of its own, and gets zeros
            target = destination
            target_ok = live
    which = tl.program_id(2)
    if which == 0:
        copy_rows(
            x0_ptr + batch * batch_stride0,
            out0_ptr,
            stride0,
            width0,
            source,
            target,
            live,
            target_ok,
            BLOCK_W,
        )
    elif which == 1:
        copy_rows(
            x1_ptr + batch * batch_stride1,
            out1_ptr,
            stride1,
            width1,
            source,
            target,
            live,
            target_ok,
            BLOCK_W,
        )
    elif which == 2:
        copy_rows(
            x2_ptr + batch * batch_stride2,
            out2_ptr,
            stride2,
            width2,
            source,
            target,
            live,
            target_ok,
            BLOCK_W,
        )
    else:
        copy_rows(
            x3_ptr + batch * batch_stride3,
            out3_ptr,
            stride3,
            width3,
            source,
            target,
            live,
            target_ok,
            BLOCK_W,
        )


def config(widest: int) -> dict[str, Any]:
    """One of two launch configurations, chosen by the words of the widest row."""
    wide = widest > 128
    return {"BLOCK_K": 4 if wide else 16, "BLOCK_W": 512 if wide else 128, "num_warps": 4}


def _words(x: Tensor) -> Tensor:
    """x (B, N, ...) as (B, N, W) words, the widest of 8, 4, 2 or 1 bytes that its rows allow."""
    x = x.reshape(*x.shape[:2], -1)
    x = x if x.stride(2) == 1 else x.contiguous()
    offset = [x.data_ptr(), *(x.element_size() * n for n in (x.shape[2], *x.stride()[:2]))]
    words = (torch.int64, torch.int32, torch.int16, torch.uint8)
    return x.view(next(w for w in words if all(n % w.itemsize == 0 for n in offset)))


def compact(
    tensors: Sequence[Tensor],
    keep: Tensor,
    destination: Tensor | None,
    rows: int,
    flat: bool,
) -> list[Tensor]:
    """See `reference.compact`."""
    batch, k = keep.shape
    keep = keep.contiguous()
    out = [torch.empty(rows, *x.shape[2:], dtype=x.dtype, device=x.device) for x in tensors]
    pairs = [(x, y) for x, y in zip(tensors, out) if y.numel()]
    for first in range(0, len(pairs), TENSORS):
        xs = [_words(x) for x, _ in pairs[first : first + TENSORS]]
        outs = [y.view(rows, -1) for _, y in pairs[first : first + TENSORS]]
        outs = [y.view(x.dtype) for x, y in zip(xs, outs)]
        chosen = config(max(x.shape[2] for x in xs))
        used = len(xs)
        xs, outs = (some + some[:1] * (TENSORS - used) for some in (xs, outs))
        compact_kernel[(triton.cdiv(k, chosen["BLOCK_K"]), batch, used)](
            keep,
            destination if destination is None else destination.contiguous(),
            *xs,
            *outs,
            *(x.stride(1) for x in xs),
            *(x.stride(0) for x in xs),
            *(x.shape[2] for x in xs),
            k,
            SCATTER=destination is not None,
            FLAT=flat,
            **chosen,
        )
    return out
