# SPDX-License-Identifier: Apache-2.0
"""Code that the Triton kernels share: a tile of X Y^T with fp32 accumulation."""

from __future__ import annotations

import os

import triton
import triton.language as tl

# The interpreter multiplies the bit patterns of bfloat16, so operands are widened there first.
INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET", "0") == "1")


@triton.jit
def dot(x, y, acc):
    """acc + x y in fp32; fp32 operands keep their precision (three tf32 products)."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="tf32x3")


@triton.jit
def load_rows(ptr, rows, row_ok, stride, start, C, BLOCK_C: tl.constexpr):
    """Channels start ... start + BLOCK_C of the given rows, (rows, BLOCK_C); zeros outside."""
    channels = start + tl.arange(0, BLOCK_C)
    inside = row_ok[:, None] & (channels < C)[None, :]
    return tl.load(ptr + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@triton.jit
def squares(x):
    """Sum of squares of every row of x in fp32."""
    x = x.to(tl.float32)
    return tl.sum(x * x, 1)
