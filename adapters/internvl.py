# SPDX-License-Identifier: Apache-2.0
"""InternVL: `InternVLForConditionalGeneration`, tiles of one size, pixel shuffle, any text model.

The model is handed tiles (video frames are tiles, too) and is never told which of them are one
image, so a tile is what has a budget: ``keep_tokens`` is a count for each tile.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .base import GridSites, Sites, language_sites
from .grids import tile_grids
from .llava import feature_block


def locate(model: Any) -> Sites | None:
    """Sites of an InternVL model, None for any other."""
    if type(model).__name__ != "InternVLForConditionalGeneration":
        return None
    from .locate import locate_vision

    base, config = model.model, model.config
    vision = locate_vision(base.vision_tower)
    fold = round(1 / config.downsample_ratio)
    edge = config.vision_config.image_size[0] // vision.patch // fold
    projector = base.multi_modal_projector
    sites = language_sites(
        model,
        base,
        base.language_model,
        projector,
        feature_block(config, vision),
        tokens_per_image=edge**2,
    )
    grids = GridSites(
        images=tile_grids("pixel_values", vision.patch),
        source=projector,
        project=projector.forward,
        fold=fold,
    )
    return Sites("InternVL", vision, replace(sites, grids=grids))
