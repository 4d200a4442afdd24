# SPDX-License-Identifier: Apache-2.0
"""Size-weighted mean of groups of tokens, differentiable in the tokens and their sizes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, unseen


@torch.library.custom_op("vtc::merge_tokens", mutates_args=())
def _merge(x: Tensor, size: Tensor | None, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return implementation("merge_tokens", x).merge(x, size, group, k)


@_merge.register_fake
def _(x: Tensor, size: Tensor | None, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.new_empty(x.shape[0], k, x.shape[2]), x.new_empty(x.shape[0], k, dtype=wide)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, size, group, _ = inputs
    merged, new_size = output
    ctx.save_for_backward(x, size, group, merged, new_size)


def _backward(ctx: Any, grad: Tensor, grad_size: Tensor) -> tuple[Tensor | None, ...]:
    """d merged_k / d x_i = m_i / M_k; d merged_k / d m_i = (x_i - merged_k) / M_k, i in group k."""
    x, size, group, merged, new_size = ctx.saved_tensors
    slot = group.clamp(min=0)
    dropped = group < 0
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    share = 1 / new_size.clamp(min=1e-12)
    grad = (grad * share[..., None].to(grad.dtype)).to(new_size.dtype)[rows, slot]
    grad = grad.masked_fill(dropped[..., None], 0)
    grad_x = grad if size is None else grad * size[..., None]
    to_size = None
    if size is not None:
        away = x.to(grad.dtype) - merged.to(grad.dtype)[rows, slot]
        kept = grad_size.to(grad.dtype)[rows, slot].masked_fill(dropped, 0)
        to_size = ((grad * away).sum(2) + kept).to(size.dtype)
    return grad_x.to(x.dtype), to_size, None, None


_merge.register_autograd(_backward, setup_context=_save)


def merge(x: Tensor, size: Tensor | None, group: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Size-weighted mean of every group, the sum accumulated in fp32 or better.

    Args:
        x: (B, N, C).
        size: (B, N) weight of each token; ones when None.
        group: (B, N) int64 slot of each token, in [0, k), or -1 where it is dropped.
        k: number of slots.

    Returns:
        Tokens (B, k, C) in the dtype of x and sizes (B, k) in fp32 or better; slots without a token
        hold zeros. On the GPU the sum runs over the sources in ascending order, without atomics.
    """
    if unseen(x, size):
        return implementation("merge_tokens", x).merge(x, size, group, k)
    return _merge(x, size, group, k)
