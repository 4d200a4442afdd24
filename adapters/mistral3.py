# SPDX-License-Identifier: Apache-2.0
"""Mistral 3: `Mistral3ForConditionalGeneration`, a Pixtral tower, images of any size.

All images are one sequence in the tower. A learned merger makes one token of s x s patches; the
features are what it gives. Text tokens end the rows of an image in the prompt.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from .base import GridSites, Sites, language_sites
from .grids import sized_grids
from .llava import feature_block


def _project(projector: Any, x: Tensor) -> Tensor:
    """Project joined patches."""
    return projector.linear_2(projector.act(projector.linear_1.forward(x)))


def locate(model: Any) -> Sites | None:
    """Sites of a Mistral 3 model, None for any other."""
    if type(model).__name__ != "Mistral3ForConditionalGeneration":
        return None
    from .locate import locate_vision

    base, config = model.model, model.config
    vision = locate_vision(base.vision_tower)
    projector = base.multi_modal_projector
    sites = language_sites(
        model,
        base,
        base.language_model,
        projector,
        feature_block(config, vision),
        tokens_per_image=None,
    )
    grids = GridSites(
        images=sized_grids(vision.patch),
        source=projector.linear_1,
        project=partial(_project, projector),
        fold=config.spatial_merge_size,
        packed=True,
    )
    return Sites("Mistral 3", vision, replace(sites, grids=grids))
