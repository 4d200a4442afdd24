# SPDX-License-Identifier: Apache-2.0
"""Assemble the asset folders from the pretrained tower and the trained weights.

python -m vtc.benchmarks.tiny.export --tower dinov2.safetensors --trained run --assets vtc/assets
python -m vtc.benchmarks.tiny.export --next next/llava_next.safetensors
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    CLIPImageProcessor,
    CLIPTextModelWithProjection,
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)

from .extract import build_tower
from .models import (
    ASSETS,
    BOS,
    CHAT_TEMPLATE,
    EOS,
    PAD,
    PINPOINTS,
    VIEW,
    digests,
    llava_config,
    llava_next_config,
    make_tokenizer,
    text_config,
)
from .train import MEAN, STD, load_trained


def make_processor() -> LlavaProcessor:
    """Return the processor: 336 px, ImageNet statistics, 576 image tokens."""
    image_processor = CLIPImageProcessor(
        size={"shortest_edge": 336},
        crop_size={"height": 336, "width": 336},
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaProcessor(image_processor=image_processor, **_processor())


def make_next_processor() -> LlavaNextProcessor:
    """Return the processor of the LLaVA-NeXT: views of 112 px, ImageNet statistics."""
    side = {"height": VIEW, "width": VIEW}
    image_processor = LlavaNextImageProcessor(
        size=side,
        crop_size=side,
        image_grid_pinpoints=PINPOINTS,
        image_mean=list(MEAN),
        image_std=list(STD),
    )
    return LlavaNextProcessor(image_processor=image_processor, **_processor())


def _processor() -> dict[str, Any]:
    return {
        "tokenizer": make_tokenizer(),
        "patch_size": 14,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "chat_template": CHAT_TEMPLATE,
    }


def _generation() -> GenerationConfig:
    return GenerationConfig(
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, max_new_tokens=8, do_sample=False
    )


def export_next(trained: Path, assets: Path) -> None:
    """Write `assets`/tiny-llava-next in fp16, without the tower that tiny-llava holds."""
    model = LlavaNextForConditionalGeneration(llava_next_config())
    load_trained(model, trained)
    model.tie_weights()
    model.generation_config = _generation()
    folder = assets / "tiny-llava-next"
    model.to(torch.float16).save_pretrained(folder)
    make_next_processor().save_pretrained(folder)
    path = folder / "model.safetensors"
    state = {k: v for k, v in load_file(path).items() if "vision_tower" not in k}
    save_file(state, path, metadata={"format": "pt"})


def export(tower: Path, trained: Path, assets: Path) -> None:
    """Write `assets`/tiny-llava and `assets`/tiny-text in fp16."""
    model = LlavaForConditionalGeneration(llava_config())
    model.model.vision_tower = build_tower(load_file(tower))
    load_trained(model, trained / "llava.safetensors")
    model.tie_weights()
    model.generation_config = _generation()
    model.to(torch.float16).save_pretrained(assets / "tiny-llava")
    make_processor().save_pretrained(assets / "tiny-llava")

    text = CLIPTextModelWithProjection(text_config())
    missing, unexpected = text.load_state_dict(
        load_file(trained / "text.safetensors"), strict=False
    )
    if [k for k in missing if "position_ids" not in k] or unexpected:
        raise ValueError(f"text weights do not fit: {missing}, {unexpected}")
    text.to(torch.float16).save_pretrained(assets / "tiny-text")
    make_tokenizer(end=True).save_pretrained(assets / "tiny-text")
    projection = load_file(trained / "visual_projection.safetensors")
    save_file(projection, assets / "tiny-text" / "visual_projection.safetensors")


def main() -> None:
    """Parse the arguments and export."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tower", type=Path, help="output of extract.py")
    parser.add_argument("--trained", type=Path, help="work folder of train.py, with --tower")
    parser.add_argument("--next", type=Path, help="output of train_next.py")
    parser.add_argument("--assets", type=Path, default=ASSETS)
    args = parser.parse_args()
    if args.next:
        export_next(args.next, args.assets)
    if args.trained:
        export(args.tower, args.trained, args.assets)
    sums = [f"{digest}  {path}\n" for path, digest in digests(args.assets).items()]
    (args.assets / "SHA256SUMS").write_text("".join(sums))
    size = sum(f.stat().st_size for f in args.assets.rglob("*") if f.is_file())
    print(f"{args.assets}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
