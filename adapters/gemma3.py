# SPDX-License-Identifier: Apache-2.0
"""Gemma 3: `Gemma3ForConditionalGeneration`, SigLIP, patches averaged to 256 tokens an image.

The features are the averages; norm and projection follow. Pan-and-scan crops come as images of
their own. Attention among the tokens of an image is bidirectional, by a mask over all tokens.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .base import GridSites, Sites, language_sites
from .grids import tile_grids


def _project(projector: Any, x: Tensor) -> Tensor:
    """Project joined patches."""
    normed = projector.mm_soft_emb_norm.forward(x)
    return (normed @ projector.mm_input_projection_weight).type_as(x)


def locate(model: Any) -> Sites | None:
    """Sites of a Gemma 3 model with an encoder, None for any other."""
    if type(model).__name__ != "Gemma3ForConditionalGeneration":
        return None
    from .locate import locate_vision

    base = model.model
    vision = locate_vision(base.vision_tower)
    projector = base.multi_modal_projector
    norm = projector.mm_soft_emb_norm
    sites = language_sites(
        model,
        base,
        base.language_model,
        projector,
        len(vision.blocks) - 1,
        tokens_per_image=projector.tokens_per_side**2,
    )
    images = tile_grids("pixel_values", vision.patch)
    grids = GridSites(
        images, source=norm, project=partial(_project, projector), fold=projector.kernel_size
    )
    return Sites("Gemma 3", vision, replace(sites, grids=grids))
