# SPDX-License-Identifier: Apache-2.0
"""`similarity_reduce` in plain torch: the CPU path, and what the Triton kernel is checked against.

One batch item after the other, blocked over rows, so that the similarities in flight stay in the
cache of the CPU. The similarity of tokens to themselves is symmetric: only the blocks on and above
the diagonal are computed, and the columns of each are added as rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Similarities held at once, 1 MB: measured on CPU against half and up to eight times as many."""


def unit(x: Tensor) -> Tensor:
    """x (..., C) in fp32, scaled to unit length."""
    x = x.float()
    return x / x.norm(dim=-1, keepdim=True).clamp(min=1e-6)


def _items(x: Tensor, lengths: Tensor | None, normalize: bool) -> list[Tensor]:
    """The live rows of every batch item in fp32."""
    scale = unit if normalize else Tensor.float
    if lengths is None:
        return list(scale(x))
    return [scale(item[:length]) for item, length in zip(x, lengths.tolist())]


def _values(s: Tensor, kind: str, margin: float, alpha: float) -> Tensor:
    """The summand for similarities s, which are overwritten; energies are too high by alpha."""
    if kind == "sum":
        return s
    if kind == "count":
        return (s > margin).float()
    s.sub_(margin)
    jump = (s >= 0) if kind == "paper" else None
    # clamp and exp run at the speed of the cache; F.elu, with its expm1, takes 1.3 times as long.
    out = s.clamp_min(0).add_(s.clamp_max_(0).exp_(), alpha=alpha)
    return out if jump is None else out.add_(jump, alpha=margin)


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
    xs = _items(x, x_lengths, normalize)
    ys = xs if y is None else _items(y, y_lengths, normalize)
    out = torch.zeros(x.shape[:2], device=x.device)
    is_mean = kind in ("elu", "paper")
    surplus = alpha if is_mean else 0.0
    for total, a, b in zip(out, xs, ys):
        n, m = len(a), len(b)
        if n == 0 or m == 0:
            continue
        total = total[:n]
        b = b.t()
        step = max(16, BLOCK // m)
        for start in range(0, n, step):
            stop = min(start + step, n)
            first = start if y is None else 0
            s = _values(a[start:stop] @ b[:, first:], kind, margin, alpha)
            if exclude_diag:
                s.diagonal(start - first).fill_(surplus)
            total[start:stop] += s.sum(1)
            if y is None and stop < n:
                total[stop:] += s[:, stop - first :].sum(0)
        if is_mean:
            total.sub_(surplus * m).div_(max(m - exclude_diag, 1))
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
    left, right = _items(a, a_lengths, normalize), _items(b, b_lengths, normalize)
    for i, (x, y) in enumerate(zip(left, right)):
        n, m = len(x), len(y)
        if n == 0 or m == 0:
            continue
        y = y.t()
        barred = None if b_mask is None else ~b_mask[i, :m]
        step = max(16, BLOCK // m)
        for start in range(0, n, step):
            stop = min(start + step, n)
            s = x[start:stop] @ y
            if barred is not None:
                s.masked_fill_(barred, -torch.inf)
            if exclude_diag:
                s.diagonal(start).fill_(-torch.inf)
            torch.max(s, 1, out=(edge[i, start:stop], partner[i, start:stop]))
    if a_mask is not None:
        edge, partner = edge.masked_fill_(~a_mask, -torch.inf), partner.masked_fill_(~a_mask, 0)
    return edge, partner
