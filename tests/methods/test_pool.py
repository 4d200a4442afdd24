# SPDX-License-Identifier: Apache-2.0
"""`pool` by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from synthetic_views import GRID, WIDTH, features_view

from vtc.errors import UnsupportedError
from vtc.methods.pool import Pool, cells


@pytest.mark.parametrize("grid", [(1, 1), (1, 7), (7, 1), (6, 8), (24, 24), (3, 20)])
def test_pool_cells_tile_the_grid(grid):
    rows, columns = grid
    for k in range(1, rows * columns + 1):
        tiles = cells(grid, k)
        assert len(tiles) == k
        covered = torch.zeros(grid, dtype=torch.int64)
        for r, c in tiles:
            assert len(r) and len(c)
            covered[r.start : r.stop, c.start : c.stop] += 1
        assert (covered == 1).all()
        sizes = [len(r) * len(c) for r, c in tiles]
        assert max(sizes) <= 4 * rows * columns / k  # near-equal areas


def test_pool_of_a_divisor_is_average_pooling():
    v = features_view()
    reduction = Pool(keep_tokens=12).on_features(v)
    image = v.features.reshape(2, *GRID, WIDTH).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.avg_pool2d(image, 2).flatten(2).transpose(1, 2)
    torch.testing.assert_close(reduction.merge(v.features)[0], pooled)
    shape = [(len(r), len(c)) for r, c in cells((24, 24), 144)]
    assert set(shape) == {(2, 2)}


def test_pool_needs_the_grid():
    v = features_view()
    part = replace(v, features=v.features[:, :40])
    with pytest.raises(UnsupportedError, match="full 6 x 8 grid and found 40"):
        Pool(keep_tokens=4).on_features(part)
