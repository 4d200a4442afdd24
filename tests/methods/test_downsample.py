# SPDX-License-Identifier: Apache-2.0
"""`downsample` by itself."""

from __future__ import annotations

import math

import pytest

from vtc.methods.downsample import Downsample, smaller_grid


@pytest.mark.parametrize("grid", [(24, 24), (16, 16), (7, 7), (16, 24), (30, 12), (5, 9)])
def test_downsample_fits_the_budget_and_keeps_the_aspect(grid):
    rows, columns = grid
    n = rows * columns
    for k in range(1, n):
        r, c = Downsample(keep_tokens=k).on_pixels(grid)
        distortion = max(r * columns / (c * rows), c * rows / (r * columns))
        assert 1 <= r <= rows and 1 <= c <= columns and r * c <= k
        assert Downsample(keep_tokens=k).budget(n, grid) == r * c
        near = [
            (a, b)
            for a in range(1, rows + 1)
            for b in range(1, columns + 1)
            if a * b <= k and max(a * columns / (b * rows), b * rows / (a * columns)) <= 1.34
        ]
        if near:
            assert distortion <= 1.34 and r * c == max(a * b for a, b in near)
    assert Downsample(keep_tokens=n).on_pixels(grid) is None


def test_downsample_examples():
    assert smaller_grid((24, 24), 144) == (12, 12)
    assert smaller_grid((24, 24), 150) == (10, 15) or math.prod(smaller_grid((24, 24), 150)) == 144
    assert Downsample(keep_tokens=192).budget(576) == Downsample(keep_tokens=192).budget(
        576, (24, 24)
    )
    assert Downsample().stages == {"pixels"}
