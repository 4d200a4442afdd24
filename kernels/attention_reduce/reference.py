# SPDX-License-Identifier: Apache-2.0
"""`attention_reduce` in plain torch, blocked over queries: the CPU path and the oracle."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 20
"""Scores of one batch item held at once."""


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, key_mask: Tensor | None
) -> Iterator[tuple[int, slice, Tensor]]:
    """Batch item, query rows and their masked scores (H, rows, Tk) in fp32."""
    batch, heads, queries, _ = q.shape
    keys = k.shape[2]
    step = max(1, BLOCK // max(1, heads * keys))
    column = torch.arange(keys, device=q.device)
    for i in range(batch):
        item = k[i].float()
        if key_mask is not None:  # padding may hold anything, NaN included
            item = item.masked_fill(~key_mask[i, None, :, None], 0)
        item = item.repeat_interleave(heads // len(item), 0).transpose(1, 2)
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            s = (q[i, :, rows].float() * scale) @ item
            if causal:
                row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                s.masked_fill_(column > row + keys - queries, -torch.inf)
            if key_mask is not None:
                s.masked_fill_(~key_mask[i], -torch.inf)
            yield i, rows, s


def row_lse(q: Tensor, k: Tensor, scale: float, causal: bool, key_mask: Tensor | None) -> Tensor:
    """See `vtc.kernels.attention_reduce`."""
    out = torch.full(q.shape[:3], -torch.inf, device=q.device)
    if k.shape[2]:
        for i, rows, s in _scores(q, k, scale, causal, key_mask):
            out[i, :, rows] = s.logsumexp(2)
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
    out = torch.zeros(*q.shape[:2], k.shape[2], device=q.device)
    if not k.shape[2]:
        return out
    if query_mask is not None:  # a dead query: weight 0 on a finite row
        q = q.masked_fill(~query_mask[:, None, :, None], 0)
        w = query_mask[:, None].expand(q.shape[:3]).float()
        weights = w if weights is None else torch.where(w > 0, weights.float(), 0)
        lse = None if lse is None else lse.masked_fill(~query_mask[:, None], 0)
    for i, rows, s in _scores(q, k, scale, causal, key_mask):
        top = s.amax(2, keepdim=True) if lse is None else lse[i, :, rows, None].float()
        p = s.sub_(top.clamp(min=torch.finfo(torch.float32).min)).exp_()
        w = s.new_ones(s.shape[:2]) if weights is None else weights[i, :, rows].float()
        if lse is None:
            w = w / p.sum(2).clamp(min=torch.finfo(torch.float32).tiny)
        out[i] += (w[:, None] @ p)[:, 0]
    return out
