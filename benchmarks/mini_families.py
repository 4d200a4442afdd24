# SPDX-License-Identifier: Apache-2.0
"""Mini random models of families whose LLM tokens are joined patches, for the support matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

IMAGE = 3
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 112,
    "patch_size": 14,
}
TEXT: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "head_dim": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _config(prefix: str, tower: str, text: str, shape: dict[str, Any], **more: Any) -> Any:
    import transformers

    own = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"]} if "3" in text else {}
    return getattr(transformers, prefix + "Config")(
        vision_config=getattr(transformers, tower + "VisionConfig")(**shape),
        text_config=getattr(transformers, text + "Config")(**TEXT, **own),
        image_token_id=IMAGE,
        **more,
    )


SIGLIP = TOWER | {"vision_use_head": False}
SMALL = SIGLIP | {"image_size": 56}
"""A tower with as many patches as the LLM gets tokens."""

FAMILIES: dict[str, tuple[str, Callable[[], Any]]] = {
    "InternVL": ("InternVL", lambda: _config("InternVL", "InternVL", "Qwen2", TOWER)),
    "Idefics3": (
        "Idefics3",
        lambda: _config("Idefics3", "Idefics3", "Llama", TOWER, scale_factor=2),
    ),
    "SmolVLM": ("SmolVLM", lambda: _config("SmolVLM", "SmolVLM", "Llama", TOWER, scale_factor=2)),
    "PaliGemma": (
        "PaliGemma",
        lambda: _config("PaliGemma", "Siglip", "Gemma", SMALL, projection_dim=32, hidden_size=32),
    ),
    "Gemma 3": (
        "Gemma3",
        lambda: _config("Gemma3", "Siglip", "Gemma3Text", SIGLIP, mm_tokens_per_image=16),
    ),
    "Mistral 3": (
        "Mistral3",
        lambda: _config(
            "Mistral3", "Pixtral", "Mistral", TOWER, spatial_merge_size=2, vision_feature_layer=-1
        ),
    ),
    "LLaVA, Pixtral": (
        "Llava",
        lambda: _config(
            "Llava",
            "Pixtral",
            "Mistral",
            TOWER | {"image_size": 56},
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        ),
    ),
}
"""By column of the support matrix: the prefix of the model's class, and its configuration."""


def mini_joined(family: str, seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model of a family and a prompt with an image of 16 tokens."""
    import transformers

    prefix, config = FAMILIES[family]
    made = config()
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + "ForConditionalGeneration")(made).eval()
    edge = made.vision_config.image_size
    edge = edge if isinstance(edge, int) else edge[0]
    pixels = torch.randn(1, 3, edge, edge, generator=torch.Generator().manual_seed(seed))
    ids = torch.tensor([[1, *[IMAGE] * 16, 5, 6, 7]])
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if prefix in ("Idefics3", "SmolVLM"):
        inputs["pixel_values"] = pixels[None]
    if made.vision_config.model_type == "pixtral":
        inputs["image_sizes"] = torch.tensor([[edge, edge]])
    if "Gemma" in prefix:
        inputs["token_type_ids"] = (ids == IMAGE).long() if prefix == "Gemma3" else ids * 0
    return model, inputs
