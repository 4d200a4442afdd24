# SPDX-License-Identifier: Apache-2.0
"""Aya Vision: `AyaVisionForConditionalGeneration`, SigLIP, tiles of one size, pixel shuffle.

The model is never told which tiles are one image: ``keep_tokens`` is a count for each tile.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .base import GridSites, Sites, language_sites
from .grids import tile_grids
from .llava import feature_block


def _project(projector: Any, x: Tensor) -> Tensor:
    """Project joined patches."""
    x, gate = projector.linear_1(projector.layernorm.forward(x)).chunk(2, dim=-1)
    return projector.linear_2(projector.act(gate) * x)


def locate(model: Any) -> Sites | None:
    """Sites of an Aya Vision model, None for any other."""
    if type(model).__name__ != "AyaVisionForConditionalGeneration":
        return None
    from .locate import locate_vision

    base, config = model.model, model.config
    vision = locate_vision(base.vision_tower)
    projector = base.multi_modal_projector
    edge = config.vision_config.image_size // vision.patch // config.downsample_factor
    sites = language_sites(
        model,
        base,
        base.language_model,
        projector,
        feature_block(config, vision),
        tokens_per_image=edge**2,
    )

    grids = GridSites(
        images=tile_grids("pixel_values", vision.patch),  # one grid for each tile
        source=projector.layernorm,  # the first module that takes a row for each LLM token
        project=partial(_project, projector),
        fold=config.downsample_factor,
    )
    return Sites("Aya Vision", vision, replace(sites, grids=grids))
