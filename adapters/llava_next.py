# SPDX-License-Identifier: Apache-2.0
"""LLaVA-NeXT (1.6) and LLaVA-NeXT-Video: a thumbnail and a grid of crops, or frames.

The patches of a frame are pooled in front of the projector. Its pooling may be learned or take the
maximum: what methods see of the encoder's attention and keys is the sum and the mean over the
patches that go into a token.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .base import CropSites, GridSites, Sites
from .grids import frame_grids
from .llava import decoder_sites

FAMILIES = {
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT",
    "LlavaNextVideoForConditionalGeneration": "LLaVA-NeXT-Video",
}


def _stock(base: Any) -> Any:
    """The module with the functions that decide on crops, whatever this release makes of them."""
    return sys.modules[type(base).__module__]


def _edge(base: Any) -> int:
    return base.config.vision_config.image_size


def _newline(base: Any) -> Tensor:
    return base.image_newline


def _images(base: Any, call: dict[str, Any]) -> list[tuple[tuple[int, int], int]]:
    points, count = base.config.image_grid_pinpoints, _stock(base).image_size_to_num_patches
    sizes = [(int(h), int(w)) for h, w in call["image_sizes"]]
    return [(size, count(size, points, _edge(base))) for size in sizes]


def _grid(base: Any, size: tuple[int, int]) -> tuple[int, int]:
    shape = _stock(base).get_anyres_image_grid_shape
    rows, columns = shape(size, base.config.image_grid_pinpoints, _edge(base))
    return int(rows), int(columns)


def _pack(
    base: Any,
    features: Tensor,
    size: tuple[int, int],
    newline: Tensor,
    call: dict[str, Any],
    fit: bool,
) -> Tensor:
    strategy = base.config.vision_feature_select_strategy
    return type(base).pack_image_features(base, [features], [size], strategy, newline)[0][0]


def crop_sites(base: Any) -> CropSites:
    """Sites of a model that joins crops by ``base.pack_image_features``."""
    side = _edge(base) // base.config.vision_config.patch_size
    return CropSites(
        side=(side, side),
        newline=partial(_newline, base),
        images=partial(_images, base),
        grid=partial(_grid, base),
        pack=partial(_pack, base),
    )


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
