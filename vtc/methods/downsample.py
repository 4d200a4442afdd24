# SPDX-License-Identifier: Apache-2.0
"""Image down-sampling: encode a smaller image; a control that beats many methods.

The image is resized to the largest patch grid (r, c) within the budget whose aspect ratio differs
from the original's by a factor of at most 1.34. See VTC-Bench (ACL 2026) for why it must be in
every comparison. Needs an encoder that takes other image sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..method import Method
from ..registry import register

DISTORTION = 1.34


def smaller_grid(grid: tuple[int, int], k: int) -> tuple[int, int]:
    """The largest (rows, columns) with at most k patches and an aspect ratio near the grid's.

    Where no grid of that size is near enough (a very small k), the nearest in aspect ratio.
    """
    rows, columns = grid

    def rank(candidate: tuple[int, int]) -> tuple[float, int, float]:
        r, c = candidate
        distortion = math.exp(abs(math.log(r * columns / (c * rows))))
        excess = 0.0 if distortion <= DISTORTION else distortion
        return -excess, r * c, -distortion

    candidates = [
        (r, c) for r in range(1, min(rows, k) + 1) for c in range(1, min(columns, k // r) + 1)
    ]
    return max(candidates, key=rank)


@register
@dataclass(frozen=True, kw_only=True)
class Downsample(Method):
    """Resize the image so that its patch grid fits the budget."""

    name = "downsample"
    summary = "Encodes a smaller image; a control"

    def on_pixels(self, grid: tuple[int, int]) -> tuple[int, int] | None:
        k = super().budget(grid[0] * grid[1])
        return None if k >= grid[0] * grid[1] else smaller_grid(grid, k)

    def budget(self, n: int, grid: tuple[int, int] | None = None) -> int:
        """Patches of the smaller grid, at most the budget; a square grid unless given."""
        side = math.isqrt(n)
        if grid is None and side * side == n:
            grid = (side, side)
        k = super().budget(n, grid)
        if grid is None or k >= n:
            return k
        rows, columns = smaller_grid(grid, k)
        return rows * columns
