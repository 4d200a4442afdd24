# SPDX-License-Identifier: Apache-2.0
"""Mini random LLaVA-NeXT (CLIP, Llama) and LLaVA-OneVision (SigLIP, Qwen2), and prompts for
them."""

from __future__ import annotations

import math
from typing import Any

import mini_llava
import torch
from mini_llava import GRID, IMAGE, PAD, PATCHES, SIZE, padded
from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
)

VIDEO = 4
POINTS = [[SIZE * r, SIZE * c] for r, c in ((1, 1), (1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3))]
FAMILIES = ("next", "onevision")

SQUARE = (60, 60)  # 2 x 2 crops, no padding
WIDE = (40, 60)  # 2 x 2 crops, padding above and below
TALL = (60, 34)  # 2 x 2 crops, padding on both sides
TINY = (20, 22)  # one crop
SLIVER = (16, 96)  # 1 x 3 crops, half of each is padding
LARGE = (96, 90)  # 3 x 3 crops; OneVision resamples the canvas


def build(
    family: str = "next", attention: str = "sdpa", seed: int = 0, gain: float = 4.0, limit: int = 4
) -> Any:
    """A random model whose attention is far from uniform, in eval mode.

    Args:
        limit: crops that OneVision's canvas may have before it is resampled.
    """
    torch.manual_seed(seed)
    common: dict[str, Any] = dict(
        image_token_index=IMAGE, image_grid_pinpoints=POINTS, attn_implementation=attention
    )
    if family == "next":
        model: Any = LlavaNextForConditionalGeneration(
            LlavaNextConfig(
                vision_config=mini_llava.TOWERS["clip"](),
                text_config=mini_llava.DECODERS["llama"](),
                vision_feature_layer=-2,
                vision_feature_select_strategy="default",
                **common,
            )
        )
    else:
        model = LlavaOnevisionForConditionalGeneration(
            LlavaOnevisionConfig(
                vision_config=mini_llava.TOWERS["siglip"](),
                text_config=mini_llava.DECODERS["qwen2"](),
                video_token_index=VIDEO,
                vision_feature_layer=-1,
                vision_feature_select_strategy="full",
                vision_aspect_ratio=f"anyres_max_{limit}",
                **common,
            )
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model.eval()


def grid_of(size: tuple[int, int]) -> tuple[int, int]:
    """(rows, columns) of crops: the resolution that loses least, then wastes least."""
    height, width = size

    def rank(point: list[int]) -> tuple[int, int]:
        scale = min(point[1] / width, point[0] / height)
        used = min(int(width * scale) * int(height * scale), height * width)
        return used, -(point[0] * point[1] - used)

    best = max(POINTS, key=rank)
    return best[0] // SIZE, best[1] // SIZE


def canvas_of(size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of the canvas of all crops that are not padding."""
    (height, width), (r, c) = size, grid_of(size)
    rows, columns = r * GRID, c * GRID
    if width / height > columns / rows:
        inner = int(round(height * columns / width, 7))
        pad = (rows - inner) // 2
        return slice(pad, rows - pad), slice(0, columns)
    inner = int(round(width * rows / height, 7))
    pad = (columns - inner) // 2
    return slice(0, rows), slice(pad, columns - pad)


def shape_of(size: tuple[int, int], family: str = "next", limit: int = 4) -> tuple[int, int]:
    """(rows, columns) of the canvas as it is packed."""
    y, x = canvas_of(size)
    rows, columns = y.stop - y.start, x.stop - x.start
    ratio = math.sqrt(rows * columns / (limit * GRID**2))
    if family == "onevision" and ratio > 1.1:
        return int(rows // ratio), int(columns // ratio)
    return rows, columns


def patches_of(size: tuple[int, int], family: str = "next") -> int:
    """Visual tokens of an image, newlines not counted."""
    rows, columns = shape_of(size, family)
    return PATCHES + rows * columns


def prompt(
    sizes: list[list[tuple[int, int]]],
    family: str = "next",
    pad: str | None = None,
    seed: int = 0,
    before: int = 3,
    after: int = 5,
    between: int = 2,
) -> dict[str, torch.Tensor]:
    """Rows of "text <image>*n text <image>*n text", one list of image sizes for each row.

    Args:
        between: words between two images of a row; 0 makes one run of placeholders of them.
    """
    g = torch.Generator().manual_seed(seed)

    def words(k: int) -> list[int]:
        return torch.randint(5, 60, (k,), generator=g).tolist()

    rows = []
    for r, images in enumerate(sizes):
        row = words(before + (r if pad else 0))
        for i, size in enumerate(images):
            n = PATCHES + shape_of(size, family)[0] * (shape_of(size, family)[1] + 1)
            row += (words(between) if i else []) + [IMAGE] * n
        rows.append(row + words(after))
    flat = [size for images in sizes for size in images]
    most = max(1 + math.prod(grid_of(size)) for size in flat)
    pixels = torch.zeros(len(flat), most, 3, SIZE, SIZE)
    for i, size in enumerate(flat):
        n = 1 + math.prod(grid_of(size))
        pixels[i, :n] = torch.randn(n, 3, SIZE, SIZE, generator=g)
    return {
        **padded(rows, pad),
        "pixel_values": pixels,
        "image_sizes": torch.tensor(flat),
    }
