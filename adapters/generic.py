# SPDX-License-Identifier: Apache-2.0
"""Models that no other adapter knows, by their seams: an image encoder, a projector, an LLM.

What the LLM must be like for dropping to equal masking is checked in adapters/seams.py, and what
makes encoder patches and LLM tokens one to one here (`_why_joined`); where they are not, only the
stages inside the LLM are offered. `Sites.notes` says what was found.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from . import blip
from .base import Sites, VisionSites, is_a, language_sites
from .seams import check, refusal, unknown_arguments

PROJECTORS = (
    *("multi_modal_projector", "mm_projector", "connector", "projector", "aligner"),
    *("visual_projection", "vision_projection", "embed_vision", "merger"),
)
FEATURE_ARGUMENTS = {
    *("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "kwargs"),
}
TOKEN_COUNTS = ("image_seq_length", "num_image_tokens", "mm_tokens_per_image", "image_token_len")
MIXING = re.compile("Conv|Pool|Shuffle|Fold|Attention|Embedding|Resampl|Upsample")


def _has_images(model: Any) -> bool:
    """Whether this is a generating model that takes images and text."""
    if not is_a(model, "transformers.modeling_utils.PreTrainedModel") or not model.can_generate():
        return False
    modalities = getattr(model, "input_modalities", None) or ()
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    return getattr(model.config, "vision_config", None) is not None or "image" in modalities


def _decoder(model: Any) -> Any:
    """The module with the ``layers``, below a language model with a head if need be."""
    decoder = model.get_decoder()
    for _ in range(2):
        if decoder is None or isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            break
        decoder = getattr(decoder, "model", None)
    return decoder if isinstance(getattr(decoder, "layers", None), nn.ModuleList) else None


def _projector(base: Any, tower: nn.Module, decoder: nn.Module) -> Any:
    """The module between encoder and language model, or None."""
    for name in PROJECTORS:
        if isinstance(getattr(base, name, None), nn.Module):
            return getattr(base, name)
    ends = (tower, decoder)
    left = [c for c in base.children() if not any(m is end for m in c.modules() for end in ends)]
    return left[0] if len(left) == 1 else None


def _why_joined(model: Any, base: Any, vision: VisionSites | None, projector: Any) -> str | None:
    """Why encoder patches and LLM tokens are not, or may not be, one to one; None if they are."""
    if vision is None:
        return "its image encoder has no adapter"
    if projector is None:
        return "no projector between encoder and LLM was found"
    extra = unknown_arguments(base.get_image_features, FEATURE_ARGUMENTS)
    if extra:
        return f"its images are cut up or of any size (get_image_features takes {', '.join(extra)})"
    linear = next((m for m in projector.modules() if isinstance(m, nn.Linear)), None)
    mixing = [n for m in projector.modules() if MIXING.search(n := type(m).__name__)]
    if linear is None or mixing or linear.in_features != vision.width:
        width = "no linear layer" if linear is None else f"{linear.in_features} channels"
        return (
            f"{type(projector).__name__} joins patches ({', '.join(mixing) or width} for "
            f"{vision.width} of the encoder)"
        )
    config = model.config
    layer = getattr(config, "vision_feature_layer", -1)
    if not isinstance(layer, int):
        return f"the projector reads several encoder layers ({layer})"
    removed = getattr(config, "vision_feature_select_strategy", "full") == "default"
    if int(removed) != vision.prefix:
        return f"the encoder puts {vision.prefix} tokens in front and {int(removed)} are removed"
    edge, patch = getattr(config.vision_config, "image_size", None), vision.patch
    if not isinstance(edge, int):
        return "the size of its images is not fixed"
    for name in TOKEN_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count != (edge // patch) ** 2:
            return f"{(edge // patch) ** 2} patches become {count} tokens ({name})"
    return None


def _feature_block(config: Any, blocks: int) -> int:
    """hidden_states[0] are the embeddings, hidden_states[i] the output of block i - 1."""
    layer = getattr(config, "vision_feature_layer", -1)
    return layer + blocks if layer < 0 else layer - 1


def locate(model: Any) -> Sites | None:
    """Sites of an unknown multimodal LLM, None for models that are none.

    Raises:
        UnsupportedError: it is a multimodal LLM whose image tokens cannot be dropped.
    """
    if not _has_images(model) or blip.locate(model) is not None:
        return None
    config = model.config
    base = model.base_model
    try:
        tower = model.get_encoder(modality="image")
    except (AttributeError, TypeError, ValueError):
        tower = None
    tower = next((m for m in (tower,) if isinstance(m, nn.Module) and m not in (model, base)), None)
    decoder = _decoder(model)
    check(model, tower, decoder)
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if not isinstance(token, int) or not hasattr(base, "get_image_features") or base is model:
        raise refusal(
            model,
            "where image tokens stand in the prompt is not told by image_token_id and "
            "get_image_features, as in other models of transformers",
        )
    return _sites(model, base, tower, decoder, token)


def _sites(model: Any, base: Any, tower: Any, decoder: Any, token: int) -> Sites:
    from .locate import locate_vision

    config = model.config
    vision: VisionSites | None
    try:
        vision = locate_vision(tower)
    except UnsupportedError:
        vision = None
    projector = _projector(base, tower, decoder)
    why = _why_joined(model, base, vision, projector)
    notes = [
        f"{type(model).__name__} was recognised by its seams (adapters/generic.py): image encoder "
        f"{type(tower).__name__}, projector {type(projector or tower).__name__}, language model "
        f"{type(decoder).__name__}"
    ]
    missing: dict[str, str] = {}
    if why is not None:
        reason = f"encoder patches and LLM tokens are not one to one: {why}"
        missing = dict.fromkeys(("pixels", "vision", "features"), reason)
        notes.append(f"methods act inside the language model only; {reason}")
        notes.append("every run of image tokens in a prompt is taken for one image")
    if vision is None:
        notes.append("the encoder's FLOPs are not counted")
        vision = VisionSites(tower, [], 0, False, 0, "none", 0, 0)
    edge = 0 if why is not None else config.vision_config.image_size // vision.patch
    sites = language_sites(
        model,
        base,
        decoder,
        tower if projector is None else projector,
        0 if why is not None else _feature_block(config, len(vision.blocks)),
        edge**2 or None,
        token_ids=(token,),
    )
    sites = replace(
        sites,
        video=getattr(config, "video_token_id", None) is not None,
        mrope=hasattr(base, "get_rope_index"),
    )
    return Sites(type(model).__name__, vision, sites, notes, missing)
