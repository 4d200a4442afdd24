# SPDX-License-Identifier: Apache-2.0
"""Measure the exported models with ordinary greedy generation and print every figure.

python -m vtc.benchmarks.tiny.evaluate                  # 1,000 questions per task
python -m vtc.benchmarks.tiny.evaluate --full           # the whole easy-VQA test split
python -m vtc.benchmarks.tiny.evaluate --tasks          # the LLaVA-NeXT only
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch.nn import functional as F

from ..accuracy.answering import answer_batch
from ..shared.prompts import make_batches, prompt_of
from ..tasks import scenes
from ..tasks.items import Item, score
from ..tasks.registry import Task
from .models import ASSETS, Retrieval, load_llava, load_llava_next, load_retrieval, pool


def accuracy(
    model, processor, items: Sequence[Item], blank: bool = False, batch: int = 16
) -> dict[str, float]:
    """Return accuracies by question kind, and "all"; every image a uniform gray if `blank`."""
    if blank:
        gray = Image.new("RGB", (336, 336), (128,) * 3)
        items = [replace(item, image=gray) for item in items]
    batches = make_batches(processor, items, batch)
    asked = [item for b in batches for item in b.items]
    answers = [text for b in batches for text in answer_batch(model, processor, b, 4)]
    return by_kind(asked, [float(score(a, i.answer)) for a, i in zip(answers, asked)])


def by_kind(items: Iterable[Item], scores: Iterable[float]) -> dict[str, float]:
    """Return mean scores by question kind, and "all"."""
    kinds: dict[str, list[float]] = defaultdict(list)
    for item, right in zip(items, scores, strict=True):
        kinds[item.kind].append(right)
        kinds["all"].append(right)
    return {kind: sum(r) / len(r) for kind, r in sorted(kinds.items())}


VIEWS = ("crops", "thumbnail", "blank")
"""Views of the LLaVA-NeXT: the image; its first 64 tokens alone, which are the thumbnail; a
uniform gray of the image's size."""


@torch.no_grad()
def accuracy_next(
    model, processor, items: Sequence[Item], view: str = "crops", batch: int = 16
) -> dict[str, float]:
    """Return accuracies of a LLaVA-NeXT by question kind, and "all", with one of VIEWS."""
    scores = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        images = [item.image for item in part]
        if view == "blank":
            images = [Image.new("RGB", image.size, (128,) * 3) for image in images]
        prompts = [prompt_of(processor, item.question) for item in part]
        options = {"padding": True, "return_tensors": "pt"}
        inputs = processor(text=prompts, images=images, **options).to(model.device)
        if view == "thumbnail":
            pixels = inputs.pixel_values.to(model.dtype)
            features = model.get_image_features(pixels, inputs.image_sizes).pooler_output
            tokens = [image[: model.config.image_seq_length] for image in features]
            longer = [p.replace("<image>", "<image>" * len(t)) for p, t in zip(prompts, tokens)]
            text = processor.tokenizer(longer, **options).to(model.device)
            embeds = model.get_input_embeddings()(text.input_ids)
            embeds[text.input_ids == model.config.image_token_id] = torch.cat(tokens)
            out = model.generate(
                inputs_embeds=embeds, attention_mask=text.attention_mask, max_new_tokens=4
            )
        else:
            out = model.generate(**inputs, max_new_tokens=4)[:, inputs.input_ids.shape[1] :]
        answers = processor.batch_decode(out, skip_special_tokens=True)
        scores += [float(score(a, i.answer)) for a, i in zip(answers, part)]
    return by_kind(items, scores)


@torch.no_grad()
def recall(retrieval: Retrieval, count: int = 100, seed: int = 0) -> tuple[float, float]:
    """Return recall@1 image->text and text->image over `count` held-out scenes."""
    held = [scenes.make_scene(i, "test", seed) for i in range(count)]
    device, dtype = retrieval.vision.device, retrieval.vision.dtype
    images, embeds = [scenes.render(s) for s in held], []
    for start in range(0, count, 16):
        pixels = retrieval.image_processor(images[start : start + 16], return_tensors="pt")
        pixels = pixels.pixel_values.to(device, dtype)
        hidden: torch.Tensor = retrieval.vision(pixels).last_hidden_state
        embeds.append(retrieval.projection(pool(hidden)))
    ids = retrieval.tokenizer(
        [scenes.caption(s) for s in held], padding=True, return_tensors="pt"
    ).to(device)
    text = retrieval.text(input_ids=ids.input_ids, attention_mask=ids.attention_mask).text_embeds
    scores = F.normalize(torch.cat(embeds), dim=-1) @ F.normalize(text, dim=-1).T
    target = torch.arange(count, device=device)
    return (
        (scores.argmax(1) == target).float().mean().item(),
        (scores.argmax(0) == target).float().mean().item(),
    )


def main() -> None:
    """Print accuracy with image and blank for every task, then recall@1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--n", type=int, default=1000, help="questions per task")
    parser.add_argument(
        "--blank", type=int, default=200, help="questions per task with a blank image"
    )
    parser.add_argument("--full", action="store_true", help="all easy-VQA test questions")
    parser.add_argument("--tasks", nargs="*", default=["scenes", "scenes-hard", "easy-vqa"])
    parser.add_argument("--next-tasks", nargs="*", default=["small-text"], help="of the LLaVA-NeXT")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args()
    size = sum(f.stat().st_size for f in args.assets.rglob("*") if f.is_file())
    print(f"assets: {size / 1e6:.1f} MB")
    if args.tasks:
        i2t, t2i = recall(load_retrieval(args.device, assets=args.assets))
        print(
            f"recall@1 over 100 held-out scenes: image->text {i2t:.1%}, text->image {t2i:.1%}",
            flush=True,
        )
        model, processor = load_llava(args.device, assets=args.assets)
    for name in args.tasks:
        start = time.perf_counter()
        task = Task(name, "test", None if args.full and name == "easy-vqa" else args.n)
        full = accuracy(model, processor, task, batch=args.batch)
        empty = accuracy(model, processor, Task(name, "test", args.blank), True, args.batch)
        seconds = time.perf_counter() - start
        print(f"{name}: {full['all']:.1%} of {len(task)} questions, blank image {empty['all']:.1%} "
              f"of {args.blank} ({seconds:.0f} s)", flush=True)  # fmt: skip
        for kind in full:
            if kind != "all":
                print(f"  {kind:9s} {full[kind]:6.1%}   blank {empty.get(kind, float('nan')):6.1%}")
    if args.next_tasks:
        model, processor = load_llava_next(args.device, assets=args.assets)
    for name in args.next_tasks:
        task = Task(name, "test", args.n)
        for view in VIEWS:
            start = time.perf_counter()
            found = accuracy_next(model, processor, task, view, args.batch)
            kinds = ", ".join(f"{kind} {found[kind]:.1%}" for kind in found if kind != "all")
            print(f"LLaVA-NeXT, {name}, {view}: {found['all']:.1%} of {len(task)} questions "
                  f"({kinds}; {time.perf_counter() - start:.0f} s)", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
