# SPDX-License-Identifier: Apache-2.0
"""Mini random LLaVA models: every tower family, every decoder type, no downloads."""

from __future__ import annotations

from functools import partial

import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

from vtc.benchmarks.support.mini_families import IMAGE, PAD, decoder, padded, tower
from vtc.benchmarks.support.mini_families import TEXT as _text
from vtc.benchmarks.support.mini_families import VISION as _vision

__all__ = ["IMAGE", "PAD", "_text", "_vision", "padded"]

GRID = 4
PATCHES = GRID * GRID
SIZE = GRID * 8

TOWERS = {kind: partial(tower, kind) for kind in ("clip", "siglip", "dinov2", "vit")}
DECODERS = {
    "llama": partial(decoder, "Llama"),
    "mistral": partial(decoder, "Mistral", sliding_window=None),
    "qwen2": partial(decoder, "Qwen2"),
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
