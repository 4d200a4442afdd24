# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (1.6) and LLaVA-NeXT-Video: a thumbnail and a grid of crops, or frames.

The patches of a frame are pooled in front of the projector. Its pooling may be learned or take the
maximum: what methods see of the encoder's attention and keys is the sum and the mean over the
patches that go into a token.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import Tensor

from .base import CropSites, GridSites, Sites
from .grids import frame_grids
from .llava import decoder_sites

FAMILIES = {
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT",
    "LlavaNextVideoForConditionalGeneration": "LLaVA-NeXT-Video",
}


def crop_sites(base: Any) -> CropSites:
    """Sites of a model that packs crops with ``base.pack_image_features``."""
    config = base.config
    edge = config.vision_config.image_size
    side = edge // config.vision_config.patch_size
    # The stock functions that decide on crops, whatever this release makes of them.
    stock: Any = sys.modules[type(base).__module__]

    def images(call: dict[str, Any]) -> list[tuple[tuple[int, int], int]]:
        points = config.image_grid_pinpoints
        sizes = [(int(h), int(w)) for h, w in call["image_sizes"]]
        return [(size, stock.image_size_to_num_patches(size, points, edge)) for size in sizes]

    def grid(size: tuple[int, int]) -> tuple[int, int]:
        rows, columns = stock.get_anyres_image_grid_shape(size, config.image_grid_pinpoints, edge)
        return int(rows), int(columns)

    def pack(
        features: Tensor, size: tuple[int, int], newline: Tensor, call: dict[str, Any], fit: bool
    ) -> Tensor:
        strategy = config.vision_feature_select_strategy
        return type(base).pack_image_features(base, [features], [size], strategy, newline)[0][0]

    return CropSites((side, side), lambda: base.image_newline, images, grid, pack)


def locate(model: Any) -> Sites | None:
    """Sites of a LLaVA-NeXT or LLaVA-NeXT-Video model, None for any other."""
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        return None
    from .locate import locate_vision

    base = model.model
    vision = locate_vision(base.vision_tower)
    sites = replace(
        decoder_sites(model, base, vision), tokens_per_image=None, crops=crop_sites(base)
    )
    if hasattr(base, "vision_resampler"):
        projector = base.multi_modal_projector
        videos = GridSites(
            images=frame_grids(vision.patch),
            source=projector,
            project=projector.forward,
            fold=model.config.spatial_pool_stride,
        )
        sites = replace(sites, video=True, videos=videos, video_ids=(model.config.video_token_id,))
    return Sites(family, vision, sites)
