# SPDX-License-Identifier: Apache-2.0
"""Prompts with videos and images for mini LLaVA-OneVision, LLaVA-NeXT-Video and Qwen-VL models."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import mini_anyres
import mini_llava
import mini_qwen
import torch
from mini_anyres import POINTS
from mini_llava import IMAGE, PAD, SIZE, padded
from transformers import LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration

VIDEO = 4
START, END = mini_qwen.START, mini_qwen.END
FAMILIES = ("onevision", "next-video", "qwen2", "qwen2.5", "qwen3")


@dataclass(frozen=True)
class Clip:
    """A video: frames (pairs of them on Qwen-VL) and the grid of LLM tokens of each."""

    frames: int
    grid: tuple[int, int] = (2, 2)

    @property
    def tokens(self) -> int:
        return self.frames * self.grid[0] * self.grid[1]


Unit = Clip | tuple[int, int]
"""A video, or an image: its size in pixels (its grid of LLM tokens on Qwen-VL)."""

SHORT, LONG = Clip(3), Clip(5)
FLAT = Clip(4, (2, 3))  # Qwen-VL only: videos of other families are square


def qwen(family: str) -> bool:
    return family.startswith("qwen")


def build(
    family: str, attention: str = "sdpa", seed: int = 0, gain: float = 4.0, **config: Any
) -> Any:
    """A random model whose attention is far from uniform, in eval mode."""
    if qwen(family):
        return mini_qwen.build(family, attention, seed, gain)
    if family == "onevision":
        return mini_anyres.build(family, attention, seed, gain)
    torch.manual_seed(seed)
    model: Any = LlavaNextVideoForConditionalGeneration(
        LlavaNextVideoConfig(
            vision_config=mini_llava.TOWERS["clip"](),
            text_config=mini_llava.DECODERS["llama"](),
            image_token_index=IMAGE,
            video_token_index=VIDEO,
            image_grid_pinpoints=POINTS,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            attn_implementation=attention,
            **config,
        )
    ).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "embed" not in name and "lm_head" not in name:
                weight.mul_(gain)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = None
    return model


def tokens(unit: Unit, family: str) -> int:
    """Visual tokens of a video or image, newlines not counted."""
    if isinstance(unit, Clip):
        return unit.tokens
    return unit[0] * unit[1] if qwen(family) else mini_anyres.patches_of(unit, family)


def prompt(
    rows: list[list[Unit]],
    family: str,
    pad: str | None = None,
    seed: int = 0,
    before: int = 3,
    after: int = 5,
) -> dict[str, torch.Tensor]:
    """Rows of "text <video> text <image> ... text", a list of videos and images for each row."""
    g = torch.Generator().manual_seed(seed)

    def words(k: int) -> list[int]:
        return torch.randint(7, 60, (k,), generator=g).tolist()

    ids = []
    for r, units in enumerate(rows):
        row = words(before + (r if pad else 0))
        for i, unit in enumerate(units):
            row += words(2) if i else []
            n = tokens(unit, family)
            if not isinstance(unit, Clip):
                if not qwen(family):
                    n += mini_anyres.shape_of(unit, family)[0]
                row += [START, *[IMAGE] * n, END] if qwen(family) else [IMAGE] * n
            elif family == "qwen3":  # a time stamp in front of each frame
                for _ in range(unit.frames):
                    row += [*words(2), START, *[VIDEO] * (n // unit.frames), END]
            elif qwen(family):
                row += [START, *[VIDEO] * n, END]
            else:
                row += [VIDEO] * (n + (family == "onevision"))
        ids.append(row + words(after))
    out = padded(ids, pad)
    flat = [unit for row in rows for unit in row]
    clips = [unit for unit in flat if isinstance(unit, Clip)]
    images: Any = [unit for unit in flat if not isinstance(unit, Clip)]
    if qwen(family):
        kinds = out["input_ids"]
        out["mm_token_type_ids"] = (kinds == IMAGE).long() + 2 * (kinds == VIDEO).long()
        out |= _packed("pixel_values", "image_grid_thw", [(1, *size) for size in images], g)
        sizes = [(clip.frames, *clip.grid) for clip in clips]
        return out | _packed("pixel_values_videos", "video_grid_thw", sizes, g)
    if clips:
        frames = {clip.frames for clip in clips}
        assert len(frames) == 1, "one tensor holds the videos of a batch"
        shape = (len(clips), frames.pop(), 3, SIZE, SIZE)
        out["pixel_values_videos"] = torch.randn(shape, generator=g)
    if images:
        most = max(1 + math.prod(mini_anyres.grid_of(size)) for size in images)
        out["pixel_values"] = torch.zeros(len(images), most, 3, SIZE, SIZE)
        for i, size in enumerate(images):
            n = 1 + math.prod(mini_anyres.grid_of(size))
            out["pixel_values"][i, :n] = torch.randn(n, 3, SIZE, SIZE, generator=g)
        out["image_sizes"] = torch.tensor(images)
    return out


def _packed(
    pixels: str, grids: str, sizes: list[tuple[int, int, int]], g: torch.Generator
) -> dict[str, torch.Tensor]:
    if not sizes:
        return {}
    table = torch.tensor([[t, 2 * h, 2 * w] for t, h, w in sizes])
    count = int(table.prod(1).sum())
    return {
        pixels: torch.randn(count, 3 * 2 * mini_qwen.PATCH**2, generator=g),
        grids: table,
    }


def part(
    inputs: dict[str, torch.Tensor], row: int, rows: list[list[Unit]], family: str
) -> dict[str, torch.Tensor]:
    """One row of a batch without its padding and mates."""
    real = inputs["attention_mask"][row].bool()
    names = ("input_ids", "attention_mask", "mm_token_type_ids")
    out = {name: inputs[name][row : row + 1, real] for name in names if name in inputs}
    for pixels, grids, wanted in (
        ("pixel_values", "image_grid_thw", False),
        ("pixel_values_videos", "video_grid_thw", True),
    ):
        counts = [sum(isinstance(unit, Clip) is wanted for unit in units) for units in rows]
        mine = slice(sum(counts[:row]), sum(counts[: row + 1]))
        if not counts[row]:
            continue
        if qwen(family):
            amounts = inputs[grids].prod(1).tolist()
            out[pixels] = torch.cat(inputs[pixels].split(amounts)[mine])
            out[grids] = inputs[grids][mine]
        else:
            out[pixels] = inputs[pixels][mine]
            if not wanted:
                out["image_sizes"] = inputs["image_sizes"][mine]
    return out
