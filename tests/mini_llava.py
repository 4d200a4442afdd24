# SPDX-License-Identifier: Apache-2.0
"""Mini random LLaVA models: every tower family, every decoder type, no downloads."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    SiglipVisionConfig,
    ViTConfig,
)

IMAGE = 3
PAD = 0
GRID = 4
PATCHES = GRID * GRID
SIZE = GRID * 8

_vision = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    image_size=SIZE,
    patch_size=8,
)
_dinov2 = {k: v for k, v in _vision.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
TOWERS = {
    "clip": lambda: CLIPVisionConfig(**_vision),
    "siglip": lambda: SiglipVisionConfig(**_vision, vision_use_head=False),
    "dinov2": lambda: Dinov2Config(**_dinov2),
    "vit": lambda: ViTConfig(**_vision),
}
_text = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=5,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    max_position_embeddings=512,
    pad_token_id=PAD,
    bos_token_id=1,
    eos_token_id=2,
)
DECODERS = {
    "llama": lambda: LlamaConfig(**_text),
    "mistral": lambda: MistralConfig(**_text, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_text),
}


def build(
    tower: str = "clip",
    decoder: str = "llama",
    attention: str = "sdpa",
    seed: int = 0,
    gain: float = 4.0,
) -> LlavaForConditionalGeneration:
    """A random LLaVA whose attention is far from uniform, in eval mode."""
    torch.manual_seed(seed)
    config = LlavaConfig(
        vision_config=TOWERS[tower](),
        text_config=DECODERS[decoder](),
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-2,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        attn_implementation=attention,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def padded(rows: list[list[int]], pad: str | None) -> dict[str, torch.Tensor]:
    """Token ids of different lengths as one batch, padded on the "right" or else on the left."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), PAD)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for r, row in enumerate(rows):
        at = slice(0, len(row)) if pad == "right" else slice(length - len(row), length)
        ids[r, at] = torch.tensor(row)
        mask[r, at] = 1
    return {"input_ids": ids, "attention_mask": mask}


def prompt(
    images_per_row: list[int] | int = 1,
    batch: int = 2,
    pad: str | None = None,
    seed: int = 0,
    before: int = 3,
    after: int = 5,
) -> dict[str, torch.Tensor]:
    """A batch of prompts "text <image>*16 text", rows of different lengths when padded."""
    g = torch.Generator().manual_seed(seed)
    counts = [images_per_row] * batch if isinstance(images_per_row, int) else images_per_row
    rows = []
    for r, n in enumerate(counts):
        extra = r if pad else 0

        def words(k: int) -> list[int]:
            return torch.randint(4, 60, (k,), generator=g).tolist()

        row = words(before + extra)
        for _ in range(n):
            row += [IMAGE] * PATCHES + words(after)
        rows.append(row)
    pixels = torch.randn(sum(counts), 3, SIZE, SIZE, generator=g)
    return {**padded(rows, pad), "pixel_values": pixels}
