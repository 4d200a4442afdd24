# SPDX-License-Identifier: Apache-2.0
"""Bipartite matching of similar tokens, as ToMe and PiToMe merge them."""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.similarity_reduce import best_match


def match(x: Tensor, a: Tensor, b: Tensor, r: int, barred: Tensor | None = None) -> Tensor:
    """Fold the r tokens of A with the best edges into their most similar tokens of B.

    Args:
        x: (B, T, C), compared by their cosines.
        a, b: (B, Na), (B, Nb) indices of the two sides.
        r: edges to keep, at most Na; equal edges go to the first of A.
        barred: (T,) bool, tokens that neither fold nor absorb.

    Returns:
        (B, T) int64, the token that each one folds into (itself where it stays).
    """
    rows = torch.arange(len(x), device=x.device)[:, None]
    a_mask, b_mask = (None, None) if barred is None else (~barred[a], ~barred[b])
    edge, partner = best_match(x[rows, a], x[rows, b], a_mask=a_mask, b_mask=b_mask)
    if r < a.shape[1]:
        best = edge.argsort(dim=1, descending=True, stable=True)[:, :r]
        a, partner = a.gather(1, best), partner.gather(1, best)
    target = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
    return target.scatter(1, a, b.gather(1, partner))


def match_parity(x: Tensor, r: int, prefix: int) -> Tensor:
    """`match` with the tokens at even places as A, those at odd places as B; see there."""
    index = torch.arange(x.shape[1], device=x.device)
    a, b = index[0::2].expand(len(x), -1), index[1::2].expand(len(x), -1)
    return match(x, a, b, r, index < prefix if prefix else None)
