# SPDX-License-Identifier: Apache-2.0
"""Idefics3 and SmolVLM: tiles of one size, pixel shuffle, text tokens between the tiles.

Which tiles are one image stands in the names between them in the prompt alone, which the encoder
side never sees, so a tile is what has a budget: ``keep_tokens`` is a count for each tile. Tiles of
zeros fill up samples with fewer of them; the model takes them out in front of the encoder.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from .base import GridSites, Sites, language_sites

NAMES = {
    "Idefics3ForConditionalGeneration": "Idefics3",
    "SmolVLMForConditionalGeneration": "SmolVLM",
}


def _images(family: str, patch: int, call: dict[str, Any]) -> list[list[tuple[int, int]]]:
    pixels = call["pixel_values"].flatten(0, 1)  # (samples, tiles, 3, H, W)
    real = int((pixels != 0).flatten(1).any(1).sum())
    if real == 0 and family == "SmolVLM":
        real = 1  # a prompt without images keeps one tile
    return [[(pixels.shape[2] // patch, pixels.shape[3] // patch)]] * real


def locate(model: Any) -> Sites | None:
    """Sites of an Idefics3 or SmolVLM model, None for any other."""
    family = NAMES.get(type(model).__name__)
    if family is None:
        return None
    from .locate import locate_vision

    base, config = model.model, model.config
    vision = locate_vision(base.vision_model)
    fold = int(config.scale_factor)
    edge = config.vision_config.image_size // vision.patch // fold
    projection = base.connector.modality_projection

    sites = language_sites(
        model,
        base,
        base.text_model,
        base.connector,
        len(vision.blocks) - 1,
        tokens_per_image=edge**2,
    )
    grids = GridSites(
        partial(_images, family, vision.patch),
        source=projection,
        project=projection.forward,
        fold=fold,
    )
    return Sites(family, vision, replace(sites, grids=grids))
