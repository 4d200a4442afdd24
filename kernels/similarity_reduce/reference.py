# SPDX-License-Identifier: Apache-2.0
"""`similarity_reduce` in plain torch: the CPU path, and what the Triton kernel is checked against.

Blocked over rows, so that few similarities are held at once. The similarity of tokens to themselves
is symmetric: only the blocks on and above the diagonal are computed, and the columns of each are
added as rows.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 1 << 22
"""Similarities held at once, 16 MB. On one thread sizes from 4 to 16 MB take the same time; on
several every operation on a block waits for all of them, which speaks for few blocks."""


def unit(x: Tensor) -> Tensor:
    """x (..., C) in fp32, scaled to unit length."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _items(
    x: Tensor, lengths: Tensor | None, others: Tensor | None, normalize: bool
) -> list[Tensor]:
    """x in fp32, at once or, where one of both sides is ragged, the live rows of each item."""
    scale = unit if normalize else Tensor.float
    if lengths is None and others is None:
        return [scale(x)]
    counts = [x.shape[1]] * len(x) if lengths is None else lengths.tolist()
    return [scale(item[None, :count]) for item, count in zip(x, counts)]


def _values(s: Tensor, kind: str, margin: float, alpha: float) -> Tensor:
    """The summand for similarities s, which are overwritten."""
    if kind == "sum":
        return s
    if kind == "count":
        return (s > margin).float()
    s.sub_(margin)
    jump = s >= 0 if kind == "paper" else None
    F.elu_(s, alpha)
    return s if jump is None else s.add_(jump, alpha=margin)


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
    out = torch.zeros(x.shape[:2], device=x.device)
    xs = _items(x, x_lengths, y_lengths, normalize)
    ys = xs if y is None else _items(y, y_lengths, x_lengths, normalize)
    for total, a, b in zip([out] if len(xs) == 1 else out.split(1), xs, ys):
        n, m = a.shape[1], b.shape[1]
        if a.numel() == 0 or b.numel() == 0:
            continue
        total = total[:, :n]
        b = b.transpose(1, 2)
        step = min(-(-n // 4), max(16, BLOCK // (len(a) * m)))  # at least 4, to gain by symmetry
        memory = a.new_empty(len(a) * step * m)  # one block, used again: no page is faulted twice
        for start in range(0, n, step):
            stop = min(start + step, n)
            first = start if y is None else 0
            shape = (len(a), stop - start, m - first)
            s = memory[: math.prod(shape)].view(shape)
            torch.bmm(a[:, start:stop], b[:, :, first:], out=s)
            if y is None and normalize:  # 1 up to rounding, which must not break a tie
                own = s.diagonal(start - first, 1, 2)
                own.masked_fill_((own - 1).abs() < 1e-5, 1.0)
            s = _values(s, kind, margin, alpha)
            if exclude_diag:
                s.diagonal(start - first, 1, 2).zero_()
            total[:, start:stop] += s.sum(2)
            if y is None and stop < n:
                total[:, stop:] += s[:, :, stop - first :].sum(1)
        if kind in ("elu", "paper"):
            total.div_(max(m - exclude_diag, 1))
    return out


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
    edge = torch.full(a.shape[:2], -torch.inf, device=a.device)
    partner = torch.zeros(a.shape[:2], dtype=torch.int64, device=a.device)
    left = _items(a, a_lengths, b_lengths, normalize)
    right = _items(b, b_lengths, a_lengths, normalize)
    for i, (x, y) in enumerate(zip(left, right)):
        n, m = x.shape[1], y.shape[1]
        if x.numel() == 0 or y.numel() == 0:
            continue
        items = slice(i, i + len(x))
        y = y.transpose(1, 2)
        barred = None if b_mask is None else ~b_mask[items, None, :m]
        step = min(n, max(16, BLOCK // (len(x) * m)))
        memory = x.new_empty(len(x) * step * m)  # as above
        for start in range(0, n, step):
            stop = min(start + step, n)
            shape = (len(x), stop - start, m)
            s = torch.bmm(x[:, start:stop], y, out=memory[: math.prod(shape)].view(shape))
            if barred is not None:
                s.masked_fill_(barred, -torch.inf)
            if exclude_diag:
                s.diagonal(start, 1, 2).fill_(-torch.inf)
            edge[items, start:stop], partner[items, start:stop] = s.max(2)
    if a_mask is not None:
        edge, partner = edge.masked_fill_(~a_mask, -torch.inf), partner.masked_fill_(~a_mask, 0)
    return edge, partner
