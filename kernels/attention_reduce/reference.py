# SPDX-License-Identifier: Apache-2.0
"""`attention_reduce` in plain torch, blocked over queries: the CPU path and the oracle."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 1 << 18
"""Scores of one batch item and key head held at once: few enough to stay in a CPU's cache."""


def _scores(
    q: Tensor, k: Tensor, scale: float, causal: bool, key_mask: Tensor | None
) -> Iterator[tuple[int, slice, slice, Tensor]]:
    """Batch item, query heads, query rows and their masked scores (G, rows, keys) in fp32.

    The G query heads of one key head go together; keys that no row of a block may see are left out.
    """
    batch, heads, queries, dim = q.shape
    key_heads, keys = k.shape[1:3]
    group = heads // key_heads
    step = max(1, BLOCK // max(1, group * keys))
    column = torch.arange(keys, device=q.device)
    for i, j in itertools.product(range(batch), range(key_heads)):
        item = k[i, j].float()
        if key_mask is not None:  # padding may hold anything, NaN included
            item = item.masked_fill(~key_mask[i, :, None], 0)
        item = item.T.contiguous()
        mine = slice(j * group, (j + 1) * group)
        for start in range(0, queries, step):
            rows = slice(start, min(start + step, queries))
            past = rows.start + keys - queries  # keys that every row of the block may see, less one
            seen = max(0, rows.stop + keys - queries) if causal else keys
            s = (q[i, mine, rows].float() * scale).reshape(-1, dim) @ item[:, :seen]
            s = s.view(group, rows.stop - rows.start, seen)
            if causal:
                row = torch.arange(rows.start, rows.stop, device=q.device)[:, None]
                first = max(0, past)
                hidden = column[first:seen] > row + keys - queries
                s[:, :, first:].masked_fill_(hidden, -torch.inf)
            if key_mask is not None:
                s.masked_fill_(~key_mask[i, :seen], -torch.inf)
            yield i, mine, rows, s


def row_lse(q: Tensor, k: Tensor, scale: float, causal: bool, key_mask: Tensor | None) -> Tensor:
    """See `vtc.kernels.attention_reduce`."""
    out = torch.full(q.shape[:3], -torch.inf, device=q.device)
    if k.shape[2]:
        for i, heads, rows, s in _scores(q, k, scale, causal, key_mask):
            if s.shape[2]:
                out[i, heads, rows] = s.logsumexp(2)
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
    for i, heads, rows, s in _scores(q, k, scale, causal, key_mask):
        if not s.shape[2]:
            continue
        top = s.amax(2, keepdim=True) if lse is None else lse[i, heads, rows, None].float()
        p = s.sub_(top.clamp(min=torch.finfo(torch.float32).min)).exp_()
        w = s.new_ones(s.shape[:2]) if weights is None else weights[i, heads, rows].float()
        if lse is None:
            w = w / p.sum(2).clamp(min=torch.finfo(torch.float32).tiny)
        out[i, heads, : s.shape[2]] += (w[:, None] @ p)[:, 0]
    return out
