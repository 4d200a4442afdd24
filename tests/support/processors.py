# SPDX-License-Identifier: Apache-2.0
"""Image processors, and mini models whose encoder has no attention, for tests of geometry."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf

from vtc.adapters.locate import locate
from vtc.benchmarks.support.mini_families import build

POINTS = [[32 * r, 32 * c] for r, c in ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1), (3, 3))]
SQUARE = {"height": 32, "width": 32}
TILE = {"height": 64, "width": 64}
PAN = {
    "do_pan_and_scan": True,
    "pan_and_scan_min_crop_size": 20,
    "pan_and_scan_max_num_crops": 4,
    "pan_and_scan_min_ratio_to_activate": 1.2,
}
CROPPED = {"size": {"shortest_edge": 36}, "crop_size": SQUARE}


def anyres(name: str, **more: Any) -> Any:
    return getattr(hf, name)(image_grid_pinpoints=POINTS, **more)


def qwen(name: str) -> Any:
    return getattr(hf, name)(patch_size=4, merge_size=2, min_pixels=64, max_pixels=6400)


def cut() -> Any:
    return hf.GotOcr2ImageProcessor(size=TILE, crop_to_patches=True, min_patches=1, max_patches=6)


def named(name: str) -> Any:
    edges = {"size": {"longest_edge": 192}, "max_image_size": {"longest_edge": 64}}
    return getattr(hf, name)(**edges)


PROCESSORS: dict[str, tuple[str, Callable[[], Any]]] = {
    "CLIP crop": ("LLaVA, CLIP", lambda: hf.CLIPImageProcessor(**CROPPED)),
    "CLIP squeeze": (
        "LLaVA, CLIP",
        lambda: hf.CLIPImageProcessor(size=SQUARE, do_center_crop=False),
    ),
    "LLaVA pad": (
        "LLaVA, CLIP",
        lambda: hf.LlavaImageProcessor(do_pad=True, size={"shortest_edge": 32}, crop_size=SQUARE),
    ),
    "SigLIP": ("LLaVA, SigLIP", lambda: hf.SiglipImageProcessor(size=SQUARE)),
    "DINOv2": ("LLaVA, DINOv2", lambda: hf.BitImageProcessor(**CROPPED)),
    "LLaVA-NeXT": (
        "LLaVA-NeXT",
        lambda: anyres("LlavaNextImageProcessor", size={"shortest_edge": 32}, crop_size=SQUARE),
    ),
    "OneVision": ("LLaVA-OneVision", lambda: anyres("LlavaOnevisionImageProcessor", size=SQUARE)),
    "OneVision resampled": (
        "LLaVA-OneVision",
        lambda: anyres("LlavaOnevisionImageProcessor", size=SQUARE),
    ),
    "Qwen2-VL": ("Qwen2-VL", lambda: qwen("Qwen2VLImageProcessor")),
    "Qwen2.5-VL": ("Qwen2.5-VL", lambda: qwen("Qwen2VLImageProcessor")),
    "Qwen3-VL": ("Qwen3-VL", lambda: qwen("Qwen2VLImageProcessor")),
    "InternVL": ("InternVL", cut),
    "Aya Vision": ("Aya Vision", cut),
    "Idefics3": ("Idefics3", lambda: named("Idefics3ImageProcessor")),
    "SmolVLM": ("SmolVLM", lambda: named("SmolVLMImageProcessor")),
    "PaliGemma": ("PaliGemma", lambda: hf.SiglipImageProcessor(size=SQUARE)),
    "Gemma 3": ("Gemma 3", lambda: hf.Gemma3ImageProcessor(size=TILE)),
    "Gemma 3 crops": ("Gemma 3", lambda: hf.Gemma3ImageProcessor(size=TILE, **PAN)),
    "Mistral 3": (
        "Mistral 3",
        lambda: hf.PixtralImageProcessor(patch_size=16, size={"longest_edge": 96}),
    ),
    "Pixtral": (
        "LLaVA, Pixtral",
        lambda: hf.PixtralImageProcessor(patch_size=8, size={"longest_edge": 72}),
    ),
}

OUTPUTS = ("out_proj", "o_proj", "attn.proj", "projection_layer", "attention.output.dense")


@functools.cache
def model_of(family: str) -> Any:
    """A mini model whose encoder has no attention."""
    model = build(family)
    if hasattr(model.config, "image_grid_pinpoints"):
        model.config.image_grid_pinpoints = POINTS
    tower = locate(model).vision.tower
    with torch.no_grad():
        off = [p for n, p in tower.named_parameters() if any(f"{x}.weight" in n for x in OUTPUTS)]
        assert off
        for weight in off:
            weight.zero_()
    return model


def features(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(N, D) the features of an image, in the order of the prompt, without newline tokens."""
    out = model.model.get_image_features(**inputs, return_dict=True).pooler_output
    parts = [out] if isinstance(out, torch.Tensor) else list(out)
    rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
    newline = getattr(model.model, "image_newline", None)
    return rows if newline is None else rows[~(rows == newline).all(1)]
