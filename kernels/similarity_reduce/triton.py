# SPDX-License-Identifier: Apache-2.0
"""Triton kernels of `similarity_reduce`: X Y^T tile by tile, reduced before it leaves registers.

One program owns BLOCK_N rows of X and walks over the columns of Y; where the rows alone do not
fill the device, the columns are split among several programs and a second kernel combines their
partial results in a fixed order. No atomics, so reruns are equal to the bit.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiles import dot, load_rows, squares

KINDS = {"elu": 0, "paper": 1, "sum": 2, "count": 3, "max": 4}
ELU, PAPER, SUM, COUNT, MAX = (tl.constexpr(i) for i in range(5))
PROGRAMS = 264
"""Programs that fill the device: two on each of the 132 multiprocessors of an H100."""


@triton.jit
def similarity_kernel(
    x_ptr,
    y_ptr,
    out_ptr,
    index_ptr,
    x_length_ptr,
    y_length_ptr,
    x_mask_ptr,
    y_mask_ptr,
    x_scale_ptr,
    y_scale_ptr,
    N,
    M,
    C,
    x_batch_stride,
    x_stride,
    y_batch_stride,
    y_stride,
    columns_per_split,
    margin,
    alpha,
    KIND: tl.constexpr,
    MEAN: tl.constexpr,
    NORMALIZE: tl.constexpr,
    SKIP_DIAGONAL: tl.constexpr,
    X_LENGTHS: tl.constexpr,
    Y_LENGTHS: tl.constexpr,
    X_MASK: tl.constexpr,
    Y_MASK: tl.constexpr,
    ONE_STEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    batch = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    x_ptr += batch * x_batch_stride
    y_ptr += batch * y_batch_stride
    n, m = N, M
    if X_LENGTHS:
        n = tl.load(x_length_ptr + batch).to(tl.int32)
    if Y_LENGTHS:
        m = tl.load(y_length_ptr + batch).to(tl.int32)

    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < n
    if X_MASK:
        row_ok = row_ok & (tl.load(x_mask_ptr + batch * N + rows, mask=row_ok, other=0) != 0)
    total = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)
    if ONE_STEP:
        x_all = load_rows(x_ptr, rows, row_ok, x_stride, 0, C, BLOCK_C)
        if NORMALIZE:
            x_scale = 1.0 / tl.maximum(tl.sqrt(squares(x_all)), 1e-6)
    elif NORMALIZE:
        x_scale = tl.load(x_scale_ptr + batch * N + rows, mask=row_ok, other=0.0)

    first = split * columns_per_split
    for start in range(first, tl.minimum(first + columns_per_split, m), BLOCK_M):
        columns = start + tl.arange(0, BLOCK_M)
        column_ok = columns < m
        s = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        if ONE_STEP:
            y = load_rows(y_ptr, columns, column_ok, y_stride, 0, C, BLOCK_C)
            s = dot(x_all, tl.trans(y), s)
            if NORMALIZE:
                y_scale = 1.0 / tl.maximum(tl.sqrt(squares(y)), 1e-6)
        else:
            for c in range(0, C, BLOCK_C):
                x = load_rows(x_ptr, rows, row_ok, x_stride, c, C, BLOCK_C)
                y = load_rows(y_ptr, columns, column_ok, y_stride, c, C, BLOCK_C)
                s = dot(x, tl.trans(y), s)
            if NORMALIZE:
                y_scale = tl.load(y_scale_ptr + batch * M + columns, mask=column_ok, other=0.0)
        if NORMALIZE:
            s = s * x_scale[:, None] * y_scale[None, :]

        if Y_MASK:
            seen = tl.load(y_mask_ptr + batch * M + columns, mask=column_ok, other=0) != 0
            column_ok = column_ok & seen
        inside = column_ok[None, :]
        if SKIP_DIAGONAL:
            inside = inside & (rows[:, None] != columns[None, :])
        if KIND == MAX:
            s = tl.where(inside, s, -float("inf"))
            value = tl.max(s, 1)
            column = tl.min(tl.where(s == value[:, None], columns[None, :], M), 1)
            better = value > best  # not >=: among equals the lower column stays
            best = tl.where(better, value, best)
            best_column = tl.where(better, column, best_column)
        else:
            if KIND == ELU:
                s = s - margin
                s = tl.where(s < 0, alpha * (tl.exp(s) - 1.0), s)  # NaN stays NaN
            elif KIND == PAPER:
                s = tl.where(s < margin, alpha * (tl.exp(s - margin) - 1.0), s)
            elif KIND == COUNT:
                s = tl.where(s > margin, 1.0, 0.0)
            total += tl.sum(tl.where(inside, s, 0.0), 1)

    place = (batch * tl.num_programs(1) + split) * N + rows
    if KIND == MAX:
        tl.store(out_ptr + place, tl.where(row_ok, best, -float("inf")), mask=rows < N)
        tl.store(index_ptr + place, tl.where(row_ok, best_column, 0), mask=rows < N)
    else:
        if MEAN:  # the share of this program: the combining kernel only adds
            seen = m
            if SKIP_DIAGONAL:
                seen = m - 1
            total = total / tl.maximum(seen, 1).to(tl.float32)
        tl.store(out_ptr + place, tl.where(row_ok, total, 0.0), mask=rows < N)


@triton.jit
def scale_kernel(
    x_ptr,
    scale_ptr,
    N,
    C,
    x_batch_stride,
    x_stride,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """1 / |x_i|, the prologue where a row does not fit into one step."""
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    row_ok = rows < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    for c in range(0, C, BLOCK_C):
        x_rows = load_rows(x_ptr + batch * x_batch_stride, rows, row_ok, x_stride, c, C, BLOCK_C)
        total += squares(x_rows)
    scale = 1.0 / tl.maximum(tl.sqrt(total), 1e-6)
    tl.store(scale_ptr + batch * N + rows, scale, mask=row_ok)


@triton.jit
def combine_kernel(
    part_ptr,
    part_index_ptr,
    out_ptr,
    index_ptr,
    N,
    splits,
    IS_MAX: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    total = tl.zeros((BLOCK_N,), tl.float32)
    best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
    best_column = tl.zeros((BLOCK_N,), tl.int32)
    for split in range(splits):
        place = (batch * splits + split) * N + rows
        value = tl.load(part_ptr + place, mask=inside, other=0.0)
        if IS_MAX:
            column = tl.load(part_index_ptr + place, mask=inside, other=0)
            better = value > best
            best = tl.where(better, value, best)
            best_column = tl.where(better, column, best_column)
        else:
            total += value
    if IS_MAX:
        tl.store(out_ptr + batch * N + rows, best, mask=inside)
        tl.store(index_ptr + batch * N + rows, best_column.to(tl.int64), mask=inside)
    else:
        tl.store(out_ptr + batch * N + rows, total, mask=inside)


def config(n: int, m: int, c: int, dtype: torch.dtype, kind: str) -> dict[str, Any]:
    """One of four launch configurations, chosen by shape.

    fp32 takes short steps: each of its products is three, whose operands need registers.
    """
    if dtype == torch.float32:
        one_step, block_c, large = False, 16, False
    else:
        one_step = c <= 128
        block_c = 128 if one_step and c > 64 else 64
        large = not one_step and kind != "max" and n * m >= 2048 * 2048
    return {
        "ONE_STEP": one_step,
        "BLOCK_N": 128 if large else 64,
        "BLOCK_M": 64,
        "BLOCK_C": block_c,
        "num_warps": 8 if large else 4,
        "num_stages": 3,
    }


def _splits(batch: int, n: int, m: int, block_n: int, block_m: int) -> tuple[int, int]:
    """(programs along the columns, columns of each): enough of them to fill the device."""
    row_programs = batch * triton.cdiv(n, block_n)
    blocks = triton.cdiv(m, block_m)
    per_split = triton.cdiv(blocks, max(1, min(blocks, PROGRAMS // row_programs)))
    return triton.cdiv(blocks, per_split), per_split * block_m


def _scales(x: Tensor) -> Tensor:
    """(B, N) fp32 factors that scale the rows of x to unit length."""
    out = torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)
    scale_kernel[(triton.cdiv(x.shape[1], 4), x.shape[0])](
        x, out, *x.shape[1:], *x.stride()[:2], BLOCK_N=4, BLOCK_C=512, num_warps=4
    )
    return out


def _launch(
    x: Tensor,
    y: Tensor,
    kind: str,
    margin: float,
    alpha: float,
    normalize: bool,
    exclude_diag: bool,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    batch, n, c = x.shape
    m = y.shape[1]
    is_max = kind == "max"
    out = torch.empty(batch, n, dtype=torch.float32, device=x.device)
    index = torch.empty(batch, n if is_max else 0, dtype=torch.int64, device=x.device)
    if batch == 0 or n == 0:
        return out, index
    if m == 0 or c == 0:  # no product to take
        return out.fill_(-torch.inf if is_max else 0), index.zero_()
    same = y is x
    x = x if x.stride(2) == 1 else x.contiguous()
    y = x if same else y if y.stride(2) == 1 else y.contiguous()
    chosen = config(n, m, c, x.dtype, kind)
    splits, columns = _splits(batch, n, m, chosen["BLOCK_N"], chosen["BLOCK_M"])
    # The first kernel writes int32 columns; the second widens them, so a maximum always takes both.
    combine = splits > 1 or is_max
    part = out.new_empty(batch, splits, n) if combine else out
    part_index = torch.empty(part.shape if is_max else (0,), dtype=torch.int32, device=x.device)
    x_scale = y_scale = None
    if normalize and not chosen["ONE_STEP"]:
        x_scale = _scales(x)
        y_scale = x_scale if same else _scales(y)
    similarity_kernel[(triton.cdiv(n, chosen["BLOCK_N"]), splits, batch)](
        x,
        y,
        part,
        part_index,
        x_lengths,
        y_lengths,
        x_mask if x_mask is None else x_mask.contiguous().view(torch.uint8),
        y_mask if y_mask is None else y_mask.contiguous().view(torch.uint8),
        x_scale,
        y_scale,
        n,
        m,
        c,
        x.stride(0),
        x.stride(1),
        y.stride(0),
        y.stride(1),
        columns,
        float(margin),
        float(alpha),
        KIND=KINDS[kind],
        MEAN=kind in ("elu", "paper"),
        NORMALIZE=normalize,
        SKIP_DIAGONAL=exclude_diag,
        X_LENGTHS=x_lengths is not None,
        Y_LENGTHS=y_lengths is not None,
        X_MASK=x_mask is not None,
        Y_MASK=y_mask is not None,
        **chosen,
    )
    if combine:
        combine_kernel[(triton.cdiv(n, 256), batch)](
            part, part_index, out, index, n, splits, IS_MAX=is_max, BLOCK_N=256
        )
    return out, index


def similarity_sum(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    margin: float,
    alpha: float,
    normalize: bool,
    exclude_diag: bool,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
) -> Tensor:
    """See `vtc.kernels.similarity_reduce`."""
    if y is None:
        y, y_lengths = x, x_lengths
    return _launch(x, y, kind, margin, alpha, normalize, exclude_diag, x_lengths, y_lengths)[0]


def best_match(
    a: Tensor,
    b: Tensor,
    normalize: bool,
    exclude_diag: bool,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    a_lengths: Tensor | None,
    b_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `vtc.kernels.similarity_reduce`."""
    return _launch(
        a, b, "max", 0.0, 1.0, normalize, exclude_diag, a_lengths, b_lengths, a_mask, b_mask
    )
