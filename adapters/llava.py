# SPDX-License-Identifier: Apache-2.0
"""LLaVA-1.5: `LlavaForConditionalGeneration` with any supported tower and a Llama-type decoder."""

from __future__ import annotations

from typing import Any

from ..errors import UnsupportedError
from .base import DecoderSites, Sites, VisionSites


def decoder_sites(model: Any, base: Any, vision: VisionSites) -> DecoderSites:
    """Sites of a LLaVA-like language model behind ``base.multi_modal_projector``."""
    config, text = model.config, model.config.get_text_config()
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
    removed = 1 if config.vision_feature_select_strategy == "default" else 0
    if removed != vision.prefix:
        raise UnsupportedError(
            f'vision_feature_select_strategy="{config.vision_feature_select_strategy}" removes '
            f"{removed} tokens and the tower puts {vision.prefix} in front of the patches: they "
            "must agree"
        )
    heads = text.num_attention_heads
    edge = config.vision_config.image_size // vision.patch
    return DecoderSites(
        base=base,
        decoder=base.language_model,
        projector=base.multi_modal_projector,
        token_ids=(config.image_token_id,),
        tokens_per_image=None if _any_size(config.vision_config) else edge**2,
        feature_block=block,
        hidden=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
    )


def _any_size(vision_config: Any) -> bool:
    return vision_config.model_type == "pixtral"


def locate(model: Any) -> Sites | None:
    """Sites of a LLaVA model, None for any other."""
    if type(model).__name__ != "LlavaForConditionalGeneration":
        return None
    from .locate import locate_vision

    vision = locate_vision(model.model.vision_tower)
    return Sites("LLaVA", vision, decoder_sites(model, model.model, vision))
