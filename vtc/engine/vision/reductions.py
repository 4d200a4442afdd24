# SPDX-License-Identifier: Apache-2.0
"""Reductions of encoder tokens: behind a prefix, of a smaller grid, applied to features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...method import Method
from ...reduction import Reduction


def is_identity(reduction: Reduction) -> bool:
    """Nothing leaves: as many slots as tokens, all of them valid."""
    return reduction.valid is None and reduction.count == reduction.source_count


def behind_prefix(reduction: Reduction, prefix: int) -> Reduction:
    """The same reduction of a sequence with ``prefix`` more tokens in front, which all survive.

    Its scores stay those of the patches alone.
    """
    if not prefix:
        return reduction
    front = torch.arange(prefix, device=reduction.keep.device).expand(reduction.batch, -1)
    group = reduction.group
    group = group + prefix * (group >= 0)
    valid = reduction.valid
    if valid is not None:
        valid = torch.cat([torch.ones_like(front, dtype=torch.bool), valid], 1)
    keep = torch.cat([front, reduction.keep + prefix], 1)
    return Reduction(keep, torch.cat([front, group], 1), valid, reduction.scores)


def resample(grid: tuple[int, int], small: tuple[int, int], batch: int, device: Any) -> Reduction:
    """Tokens of a smaller grid as a reduction of the full one, each at the patch nearest to it."""

    def nearest(n: int, m: int) -> Tensor:
        """For n cells in a row, the one of m cells over the same length that holds their centre."""
        return (2 * torch.arange(n, device=device) + 1) * m // (2 * n)

    (rows, columns), (r, c) = grid, small
    keep = nearest(r, rows)[:, None] * columns + nearest(c, columns)
    group = nearest(rows, r)[:, None] * c + nearest(columns, c)
    return Reduction(keep.flatten().expand(batch, -1), group.flatten().expand(batch, -1))


def scatter_tokens(x: Tensor, index: Tensor, n: int, fill: float = 0.0) -> Tensor:
    """The rows of x (B, K, ...) put at index (B, K) of a tensor (B, n, ...) full of ``fill``."""
    out = x.new_full((x.shape[0], n, *x.shape[2:]), fill)
    out[torch.arange(x.shape[0], device=x.device)[:, None], index.to(x.device)] = x
    return out


def apply_method(
    m: Method, reduction: Reduction, x: Tensor, size: Tensor, tokens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Select or merge x (B, N, C) and size (B, N) the way the method wants it.

    Args:
        tokens: (B, K, C) survivors that the method made itself, or None.
    """
    if tokens is not None:
        return tokens.to(x.dtype), reduction.sum(size) if m.merges else reduction.select(size)
    if not m.merges:
        return reduction.select(x), reduction.select(size)
    if getattr(m, "track_size", True):
        return reduction.merge(x, size)
    return reduction.merge(x)[0], reduction.select(size)
