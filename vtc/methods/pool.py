# SPDX-License-Identifier: Apache-2.0
"""Average pooling of the patch grid into exactly K near-rectangular cells; a control.

The rows of the grid fall into about sqrt(K rows / columns) bands of near-equal height, and each
band into K / bands cells of near-equal width, so any K between 1 and N can be met. A cell stands at
its central patch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ..errors import UnsupportedError
from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..views.features import FeaturesView


def parts(n: int, k: int) -> list[range]:
    """0..n-1 cut into k runs of near-equal length, none empty."""
    return [range(-(-i * n // k), -(-(i + 1) * n // k)) for i in range(k)]


def cells(grid: tuple[int, int], k: int) -> list[tuple[range, range]]:
    """k cells (rows, columns) that tile the grid, in raster order of their centres."""
    rows, columns = grid
    bands = round(math.sqrt(k * rows / columns))
    bands = min(max(bands, -(-k // columns), 1), rows, k)
    return [
        (band, part)
        for band, share in zip(parts(rows, bands), parts(k, bands), strict=True)
        for part in parts(columns, len(share))
    ]


@register
@dataclass(frozen=True, kw_only=True)
class Pool(Method):
    """Average the patches of each of K cells."""

    name = "pool"
    summary = "Averages patches over near-rectangular cells; a control"
    merges = True

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        rows, columns = v.grid
        if v.count != rows * columns:
            raise UnsupportedError(
                f"pool needs the full {rows} x {columns} grid and found {v.count} tokens; "
                "do not chain it behind a method that removes patches"
            )
        keep, group = [], torch.empty(rows, columns, dtype=torch.int64)
        for slot, (r, c) in enumerate(cells(v.grid, k)):
            keep.append(r[len(r) // 2] * columns + c[len(c) // 2])
            group[r.start : r.stop, c.start : c.stop] = slot
        batch, device = len(v.features), v.features.device
        return Reduction(
            torch.tensor(keep, device=device).expand(batch, -1),
            group.flatten().to(device).expand(batch, -1),
        )
