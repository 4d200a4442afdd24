# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: `LlavaForConditionalGeneration` with any supported tower and a Llama-type decoder."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from ..errors import UnsupportedError
from .base import DecoderSites, GridSites, Sites, VisionSites, language_sites
from .grids import sized_grids, tile_grids


def feature_block(config: Any, vision: VisionSites) -> int:
    """Index of the encoder block whose output the projector of a LLaVA-like model reads."""
    layer = config.vision_feature_layer
    if not isinstance(layer, int):
        raise UnsupportedError(
            f"vision_feature_layer={layer} concatenates several encoder layers, whose tokens would "
            "not match after compression; use a single layer"
        )
    blocks = len(vision.blocks)
    # hidden_states[0] are the embeddings, hidden_states[i] the output of block i - 1.
    block = layer + blocks if layer < 0 else layer - 1
    if not 0 <= block < blocks:
        raise UnsupportedError(
            f"vision_feature_layer={layer} is outside a tower of {blocks} blocks"
        )
    strategy = getattr(config, "vision_feature_select_strategy", "full")
    removed = 1 if strategy == "default" else 0
    if removed != vision.prefix:
        raise UnsupportedError(
            f'vision_feature_select_strategy="{strategy}" removes {removed} tokens and the tower '
            f"puts {vision.prefix} in front of the patches: they must agree"
        )
    return block


def decoder_sites(model: Any, base: Any, vision: VisionSites) -> DecoderSites:
    """Sites of a LLaVA-like language model behind ``base.multi_modal_projector``."""
    edge = model.config.vision_config.image_size // vision.patch
    return language_sites(
        model,
        base,
        base.language_model,
        base.multi_modal_projector,
        feature_block(model.config, vision),
        tokens_per_image=edge**2,
    )


def _images(patch: int, call: dict[str, Any]) -> list[list[tuple[int, int]]]:
    if call.get("image_sizes") is None:  # all are as large as the batch
        return tile_grids("pixel_values", patch)(call)
    return sized_grids(patch)(call)


def pixtral_grids(base: Any, patch: int) -> GridSites:
    """How a Pixtral tower makes images of any size one sequence, every patch a token."""
    projector = base.multi_modal_projector
    return GridSites(
        partial(_images, patch), source=projector, project=projector.forward, packed=True
    )


def locate(model: Any) -> Sites | None:
    """Sites of a LLaVA model, None for any other."""
    if type(model).__name__ != "LlavaForConditionalGeneration":
        return None
    from .locate import locate_vision

    base = model.model
    vision = locate_vision(base.vision_tower)
    sites = decoder_sites(model, base, vision)
    if model.config.vision_config.model_type == "pixtral":
        grids = pixtral_grids(base, vision.patch)
        sites = replace(sites, tokens_per_image=None, grids=grids)
    return Sites("LLaVA", vision, sites)
