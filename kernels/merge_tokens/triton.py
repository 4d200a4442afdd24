# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `merge_tokens`: sources sorted by slot, then one segment mean.

Places in the sorted order are counted, not swapped: the place of source i is the number of sources
with a smaller key, slot * N + index. N^2 comparisons of integers, but one launch, stable, and no
atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def order_kernel(
    group_ptr,
    order_ptr,
    start_ptr,
    N,
    K,
    SOURCE_BLOCKS,
    KEY: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    """order: (B, N) sources by slot; start: (B, K + 1) where each slot begins in it."""
    batch = tl.program_id(1).to(tl.int64)
    group_ptr += batch * N
    block = tl.program_id(0)
    is_source = block < SOURCE_BLOCKS
    items = tl.where(is_source, block, block - SOURCE_BLOCKS) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(group_ptr + items, mask=is_source & (items < N), other=0).to(KEY)
    slot = tl.where(slot < 0, K, slot)  # what is dropped goes behind the last slot
    # The same count serves both: slot k begins where a source of the smallest key of it would.
    key = tl.where(is_source, slot * N + items, items.to(KEY) * N)
    smaller = tl.zeros((BLOCK, BLOCK_J), tl.int32)
    for first in range(0, N, BLOCK_J):
        j = first + tl.arange(0, BLOCK_J)
        other = tl.load(group_ptr + j, mask=j < N, other=0).to(KEY)
        other = tl.where(other < 0, K, other) * N + j
        other = tl.where(j < N, other, (K + 1) * N)  # behind all
        smaller += (other[None, :] < key[:, None]).to(tl.int32)
    place = tl.sum(smaller, 1)
    if is_source:
        tl.store(order_ptr + batch * N + place, items, mask=items < N)
    else:
        tl.store(start_ptr + batch * (K + 1) + items, place, mask=items <= K)


@triton.jit
def merge_kernel(
    x_ptr,
    size_ptr,
    order_ptr,
    start_ptr,
    out_ptr,
    new_size_ptr,
    N,
    K,
    C,
    x_batch_stride,
    x_stride,
    SIZED: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    x_ptr += batch * x_batch_stride
    slots = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    channels = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    slot_ok = slots < K
    begin = tl.load(start_ptr + batch * (K + 1) + slots, mask=slot_ok, other=0)
    end = tl.load(start_ptr + batch * (K + 1) + slots + 1, mask=slot_ok, other=0)
    total = tl.zeros((BLOCK_K, BLOCK_C), tl.float32)
    new_size = tl.zeros((BLOCK_K,), tl.float32)
    for member in range(tl.max(end - begin, 0)):
        here = begin + member < end
        source = tl.load(order_ptr + batch * N + begin + member, mask=here, other=0)
        inside = here[:, None] & (channels < C)[None, :]
        place = source.to(tl.int64)[:, None] * x_stride + channels[None, :]
        x = tl.load(x_ptr + place, mask=inside, other=0.0).to(tl.float32)
        if SIZED:
            size = tl.load(size_ptr + batch * N + source, mask=here, other=0.0).to(tl.float32)
        else:
            size = here.to(tl.float32)
        total += x * size[:, None]
        new_size += size
    mean = total / tl.maximum(new_size, 1e-12)[:, None]
    place = (batch * K + slots)[:, None] * C + channels[None, :]
    tl.store(out_ptr + place, mean, mask=slot_ok[:, None] & (channels < C)[None, :])
    if tl.program_id(1) == 0:
        tl.store(new_size_ptr + batch * K + slots, new_size, mask=slot_ok)


def config(c: int) -> dict[str, Any]:
    """One of two launch configurations, chosen by the width."""
    wide = c > 128
    return {"BLOCK_K": 4 if wide else 16, "BLOCK_C": 512 if wide else 128, "num_warps": 4}


def merge(x: Tensor, size: Tensor | None, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """See `vtc.kernels.merge_tokens`."""
    batch, n, c = x.shape
    if x.dtype == torch.float64 or 0 in (batch, n, c, k):  # the kernel accumulates in fp32
        from . import reference

        return reference.merge(x, size, group, k)
    out = torch.empty(batch, k, c, dtype=x.dtype, device=x.device)
    new_size = torch.empty(batch, k, dtype=torch.float32, device=x.device)
    x = x if x.stride(2) == 1 else x.contiguous()
    order = torch.empty(batch, n, dtype=torch.int32, device=x.device)
    start = torch.empty(batch, k + 1, dtype=torch.int32, device=x.device)
    source_blocks = triton.cdiv(n, 64)
    key = tl.int32 if (k + 2) * n < 1 << 31 else tl.int64
    order_kernel[(source_blocks + triton.cdiv(k + 1, 64), batch)](
        group.contiguous(),
        order,
        start,
        n,
        k,
        source_blocks,
        KEY=key,
        BLOCK=64,
        BLOCK_J=64,
        num_warps=4,
    )
    chosen = config(c)
    grid = (triton.cdiv(k, chosen["BLOCK_K"]), triton.cdiv(c, chosen["BLOCK_C"]), batch)
    merge_kernel[grid](
        x,
        size if size is None else size.contiguous(),
        order,
        start,
        out,
        new_size,
        n,
        k,
        c,
        x.stride(0),
        x.stride(1),
        SIZED=size is not None,
        **chosen,
    )
    return out, new_size
