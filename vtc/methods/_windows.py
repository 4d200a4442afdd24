# SPDX-License-Identifier: Apache-2.0
"""Merging of windows of alike patches, the encoding stage of MustDrop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..reduction import gather_tokens, ranks
from ._common import unit


def windows_of(grid: tuple[int, int], window: int, device: Any = None) -> Tensor:
    """(M, window ** 2) patches of each window that lies in the grid, both in raster order."""
    rows, columns = (edge // window * window for edge in grid)
    index = torch.arange(grid[0] * grid[1], device=device).reshape(grid)[:rows, :columns]
    split = index.reshape(rows // window, window, columns // window, window).transpose(1, 2)
    return split.reshape(-1, window * window)


def merge_windows(
    x: Tensor,
    place: Tensor,
    grid: tuple[int, int],
    window: int = 3,
    threshold: float = 0.8,
    most: int | None = None,
    coupled: bool = False,
) -> Tensor:
    """Token that each one folds into, (B, N) int64: the last of its window, or itself.

    Args:
        x: (B, N, C); place: (B, N) patch of the grid that each stands at, outside of it for none.
        threshold: smallest mean pairwise cosine of a window that merges.
        most: windows that may merge, the most alike of them.
        coupled: no image merges more windows than another.
    """
    batch, n, _ = x.shape
    cells = grid[0] * grid[1]
    own = torch.arange(n, device=x.device).expand(batch, n)
    slot = own.new_full((batch, cells + 1), n).scatter(1, place.clamp(max=cells), own)[:, :cells]
    member = slot[:, windows_of(grid, window, x.device)]  # (B, M, m), n where a patch is gone
    size = member.shape[2]
    u = gather_tokens(unit(x), member.clamp(max=n - 1).flatten(1)).unflatten(1, member.shape[1:])
    # The sum of all cosines is the squared length of the sum; those on the diagonal are lengths.
    pairs = u.sum(2).square().sum(-1) - u.square().sum((2, 3))
    score = pairs / (size * (size - 1))
    score = score.masked_fill((member == n).any(2), -torch.inf)
    r = (score >= threshold).sum(1)
    r = r if most is None else r.clamp(max=most)
    r = r.min().expand(batch) if coupled else r
    into = member[:, :, -1:].where((ranks(score) < r[:, None])[..., None], member)
    padded = torch.cat([own, own.new_full((batch, 1), n)], 1)
    return padded.scatter(1, member.flatten(1), into.flatten(1))[:, :n]
