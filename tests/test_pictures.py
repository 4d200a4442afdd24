# SPDX-License-Identifier: Apache-2.0
"""Geometry of the pictures: patches must lie where the processor put them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from vtc.pictures import contact_sheet, kept_overlay, merge_groups, patch_map, visible_box
from vtc.reduction import Reduction


def gradient(width: int, height: int) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    channels = [x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), 0 * x + 90]
    return Image.fromarray(np.stack(channels, -1).astype(np.uint8))


@pytest.mark.parametrize("grid", [(2, 3), (24, 24), (7, 5)])
@pytest.mark.parametrize("size", [(336, 336), (120, 77), (50, 200)])
def test_patch_map_covers_a_stretched_image_in_raster_order(grid, size):
    patches = patch_map(size, grid)
    rows, cols = grid
    assert patches.shape == (size[1], size[0])
    assert set(np.unique(patches)) == set(range(rows * cols))
    assert patches[0, 0] == 0
    assert patches[0, -1] == cols - 1
    assert patches[-1, 0] == (rows - 1) * cols
    assert patches[-1, -1] == rows * cols - 1
    area = np.bincount(patches.ravel())
    assert area.max() <= (size[0] / cols + 1) * (size[1] / rows + 1)
    assert area.min() >= (size[0] / cols - 1) * (size[1] / rows - 1)


def test_crop_sees_the_centre_only():
    assert visible_box((200, 100), (4, 4), "crop") == (50, 0, 150, 100)
    assert visible_box((90, 100), (2, 3), "crop") == (0, 20, 90, 80)
    patches = patch_map((200, 100), (4, 4), "crop")
    assert (patches[:, :50] == -1).all()
    assert (patches[:, 150:] == -1).all()
    assert (patches[:, 50:150] == patch_map((100, 100), (4, 4))).all()
    with pytest.raises(ValueError, match="stretch"):
        visible_box((10, 10), (2, 2), "pad")


def test_kept_patches_are_untouched_and_the_rest_is_dimmed_not_black():
    image = gradient(120, 60)
    out = kept_overlay(image, (2, 3), torch.tensor([1, 5]), dim=0.5, line=0)
    before, after = np.asarray(image).astype(int), np.asarray(out).astype(int)
    kept = np.isin(patch_map(image.size, (2, 3)), [1, 5])
    assert out.size == image.size
    assert (after[kept] == before[kept]).all()
    assert np.abs(after[~kept] - (before[~kept] + 255) / 2).max() <= 1
    assert len(np.unique(after[~kept][:, 0])) > 10  # the picture still shows through


def test_kept_overlay_keeps_the_shape_of_the_image_and_scales():
    assert kept_overlay(gradient(50, 100), (24, 24), range(576), size=300).size == (150, 300)
    assert kept_overlay(gradient(64, 64).convert("L"), (2, 2), []).mode == "RGB"
    everything = kept_overlay(gradient(50, 100), (2, 2), range(4), line=0)
    assert (np.asarray(everything) == np.asarray(gradient(50, 100))).all()


@pytest.mark.parametrize("kept", [[-1], [6]])
def test_a_patch_outside_the_grid_is_an_error(kept):
    with pytest.raises(ValueError, match=r"0\.\.5"):
        kept_overlay(gradient(30, 30), (2, 3), kept)


def test_grid_lines_fall_between_patches():
    image = Image.new("RGB", (40, 40), (0, 0, 0))
    out = np.asarray(kept_overlay(image, (2, 2), range(4), line=1.0))[..., 0]
    assert (out[:, 19] == 128).all()
    assert (out[19] == 128).all()
    assert (out[:19, :19] == 0).all()
    assert (out[20:, 20:] == 0).all()


def test_merged_groups_have_their_mean_colour_and_one_outline():
    image = gradient(80, 40)  # 2 x 4 patches of 20 x 20
    group = torch.tensor([[0, 0, 1, -1, 0, 0, 1, -1]])
    reduction = Reduction(torch.tensor([[0, 2]]), group)
    out = np.asarray(merge_groups(image, (2, 4), reduction, dim=1.0, outline=(255, 0, 255)))
    before = np.asarray(image).astype(float)
    assert np.allclose(out[5, 5], before[:, :40].mean((0, 1)), atol=1)
    assert (out[:, :39] == out[5, 5]).all()  # no line inside a group
    assert (out[:, 60:] == 255).all()  # dropped
    assert (out[:, 39] != out[:, 38]).any()  # between the groups
    same = merge_groups(image, (2, 4), group[0].tolist(), dim=1.0, outline=(255, 0, 255))
    assert (np.asarray(same) == out).all()
    with pytest.raises(ValueError, match="do not fill"):
        merge_groups(image, (3, 3), reduction)


def test_contact_sheet_holds_all_tiles():
    tiles = [(gradient(60, 30), f"method {i}\nanswer") for i in range(5)]
    sheet = contact_sheet(tiles, columns=3, title="which?", width=100)
    assert sheet.width == 12 + 3 * 112
    assert sheet.height > 2 * 50
