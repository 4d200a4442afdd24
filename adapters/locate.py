# SPDX-License-Identifier: Apache-2.0
"""Find the adapter of a model: one line here for each family."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from ..errors import UnsupportedError
from ..transformers_contract import reading
from .base import Sites, VisionSites

LANGUAGE_MODELS = (
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "idefics3",
    "paligemma",
    "gemma3",
    "mistral3",
    "qwen_vl",
    "aya_vision",
)
"""Adapter files whose ``locate(model)`` gives `Sites` with a language model."""

GENERIC = "generic"
"""The one that is asked when none of them knows the model."""

ENCODERS = ("hf_vision", "timm_vit", "open_clip_vit", "blip")
"""Adapter files whose ``locate(model)`` gives `VisionSites`."""

TOWERS = ("pixtral",)
"""The same for encoders of flat images, which work inside a language model only: alone, nobody
tells which of the tokens that are left belong to which image."""

FAMILIES: dict[str, tuple[str, ...]] = {
    "LLaVA-1.5": ("LlavaForConditionalGeneration",),
    "LLaVA-NeXT": ("LlavaNextForConditionalGeneration",),
    "LLaVA-NeXT-Video": ("LlavaNextVideoForConditionalGeneration",),
    "LLaVA-OneVision": ("LlavaOnevisionForConditionalGeneration",),
    "InternVL": ("InternVLForConditionalGeneration",),
    "Idefics3, SmolVLM": ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
    "PaliGemma": ("PaliGemmaForConditionalGeneration",),
    "Gemma 3": ("Gemma3ForConditionalGeneration",),
    "Mistral 3": ("Mistral3ForConditionalGeneration",),
    "Aya Vision": ("AyaVisionForConditionalGeneration",),
    "Qwen2-VL, Qwen2.5-VL, Qwen3-VL": (
        "Qwen2VLForConditionalGeneration",
        "Qwen2_5_VLForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3VLMoeForConditionalGeneration",
    ),
    "BLIP, BLIP-2, InstructBLIP": (
        "BlipForConditionalGeneration",
        "BlipForQuestionAnswering",
        "Blip2ForConditionalGeneration",
        "InstructBlipForConditionalGeneration",
    ),
    "Hugging Face encoders": (
        "CLIPVisionModel",
        "SiglipVisionModel",
        "Dinov2Model",
        "ViTModel",
        "BlipVisionModel",
    ),
    "timm encoders": ("VisionTransformer: vit, deit, dinov2, siglip", "Eva: eva"),
    "open_clip encoders": ("CLIP: ViT-*",),
}
"""Families that the adapters know, for people; `vtc.inspect` tells of any model."""

SUPPORTED = (
    f"{'; '.join(FAMILIES)}; others whose seams are like LLaVA's (vtc models has the classes, "
    "vtc inspect tells of any)"
)


def _try(names: tuple[str, ...], model: nn.Module) -> Any:
    for name in names:
        adapter = importlib.import_module(f"{__package__}.{name}")
        with reading(model, f"adapters/{name}.py"):
            sites = adapter.locate(model)
        if sites is not None:
            return sites
    return None


def locate_vision(model: nn.Module) -> VisionSites:
    """Sites of a vision encoder.

    Raises:
        UnsupportedError: no adapter knows this encoder.
    """
    sites = _try(ENCODERS + TOWERS, model)
    if sites is None:
        raise UnsupportedError(
            f"no adapter for the encoder {type(model).__name__}; supported: {SUPPORTED}"
        )
    return sites


def locate(model: nn.Module) -> Sites:
    """Sites of a whole model: a multimodal LLM or an encoder alone.

    Raises:
        UnsupportedError: no adapter knows this model, or it has no images to compress.
    """
    sites = _try((*LANGUAGE_MODELS, GENERIC), model)
    if sites is not None:
        return sites
    vision = _try(ENCODERS, model)
    if vision is not None:
        missing = {}
        if vision.readers:
            reason = (
                "text reads the image by cross-attention, so no image tokens stand in its "
                "language model"
            )
            missing = dict.fromkeys(("decoder", "bypass", "cache"), reason)
        return Sites(type(model).__name__, vision, missing=missing)
    what = "is a text-only language model, so it has no visual tokens to compress"
    if not _text_only(model):
        what = "has no adapter"
    raise UnsupportedError(f"{type(model).__name__} {what}; supported: {SUPPORTED}")


def _text_only(model: nn.Module) -> bool:
    modalities = getattr(model, "input_modalities", None)
    text = "text" if isinstance(modalities, str) else None
    return modalities is not None and set([text] if text else modalities) == {"text"}
