# SPDX-License-Identifier: Apache-2.0
"""Mini random Qwen2-VL, Qwen2.5-VL and Qwen3-VL, and prompts with images of any size for them."""

from __future__ import annotations

from typing import Any

import torch
from mini_llava import IMAGE, PAD, padded
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
)

VIDEO, START, END = 4, 5, 6
PATCH = 4
FAMILIES = ("qwen2", "qwen2.5", "qwen3")

# Rows and columns of LLM tokens; twice as many patches each way.
SQUARE = (4, 4)
WIDE = (3, 5)
TALL = (5, 2)
TINY = (2, 2)
ROW = (2, 7)

_vision: dict[str, Any] = dict(
    depth=4, num_heads=2, patch_size=PATCH, temporal_patch_size=2, spatial_merge_size=2
)
_VISION: dict[str, dict[str, Any]] = {
    "qwen2": dict(embed_dim=32, hidden_size=48, mlp_ratio=2),
    "qwen2.5": dict(
        hidden_size=32,
        out_hidden_size=48,
        intermediate_size=48,
        window_size=4 * PATCH,  # 2 x 2 LLM tokens
        fullatt_block_indexes=[1, 3],
    ),
    "qwen3": dict(
        hidden_size=32,
        out_hidden_size=48,
        intermediate_size=48,
        num_position_embeddings=36,
        deepstack_visual_indexes=[0, 1, 2],
    ),
}
_VISION["qwen3-moe"] = _VISION["qwen3"]
_text: dict[str, Any] = dict(
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
_CLASSES: dict[str, tuple[Any, Any]] = {
    "qwen2": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2.5": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
    "qwen3": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3-moe": (Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration),
}


def build(
    family: str = "qwen2.5", attention: str = "sdpa", seed: int = 0, gain: float = 4.0
) -> Any:
    """A random model whose attention is far from uniform, in eval mode."""
    torch.manual_seed(seed)
    make_config, make = _CLASSES[family]
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}
    text = _text | ({"head_dim": 12} if family.startswith("qwen3") else {})
    if family == "qwen3-moe":
        text |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    config = make_config(
        vision_config=_vision | _VISION[family],
        text_config=text | {"rope_parameters": rope},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
        attn_implementation=attention,
    )
    model = make(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() in (2, 3) and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def prompt(
    sizes: list[list[tuple[int, int]]],
    pad: str | None = None,
    seed: int = 0,
    before: int = 3,
    after: int = 5,
) -> dict[str, torch.Tensor]:
    """Rows of "text <start> <image>*n <end> ... text", one list of image sizes for each row."""
    g = torch.Generator().manual_seed(seed)

    def words(k: int) -> list[int]:
        return torch.randint(7, 60, (k,), generator=g).tolist()

    rows = []
    for r, images in enumerate(sizes):
        row = words(before + (r if pad else 0))
        for height, width in images:
            row += [START] + [IMAGE] * (height * width) + [END]
        rows.append(row + words(after))
    out = padded(rows, pad)
    out["mm_token_type_ids"] = (out["input_ids"] == IMAGE).long()
    flat = [size for images in sizes for size in images]
    if flat:
        grids = torch.tensor([[1, 2 * height, 2 * width] for height, width in flat])
        patches = int(grids.prod(1).sum())
        out["pixel_values"] = torch.randn(patches, 3 * 2 * PATCH**2, generator=g)
        out["image_grid_thw"] = grids
    return out


def part(
    inputs: dict[str, torch.Tensor], row: int, sizes: list[list[tuple[int, int]]]
) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding and mates."""
    real = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = {name: inputs[name][row : row + 1, real] for name in names}
    first = sum(map(len, sizes[:row]))
    mine = slice(first, first + len(sizes[row]))
    counts = inputs["image_grid_thw"].prod(1).tolist()
    out["image_grid_thw"] = inputs["image_grid_thw"][mine]
    out["pixel_values"] = torch.cat(inputs["pixel_values"].split(counts)[mine])
    return out
