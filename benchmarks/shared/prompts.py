# SPDX-License-Identifier: Apache-2.0
"""Questions as prompts, and padded batches of them in which each image is held once."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

VISION_INPUTS = ("pixel_values", "image_sizes")


def prompt_of(processor: Any, question: str, images: int = 1) -> str:
    """The text of one question about an image or more, as the model was trained to read it."""
    if getattr(processor, "chat_template", None):
        content = [*[{"type": "image"}] * images, {"type": "text", "text": question}]
        return processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
    marks = "<image>\n" * images
    return f"USER: {marks}{question} ASSISTANT:"


@dataclass
class Batch:
    """Questions about a few images, ready for the model.

    ``vision`` holds each image once (pixel values, and sizes where the model cuts crops);
    ``image_of`` says which of them a question is about, ``indices`` where it stands in its task.
    """

    items: list[Any]
    text: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]
    image_of: list[int]
    indices: list[int] = field(default_factory=list)

    def inputs(self, model: Any) -> dict[str, torch.Tensor]:
        """Arguments of the model, on its device."""
        return {
            **{k: v.to(model.device) for k, v in self.text.items()},
            **self.images(model),
        }

    def images(self, model: Any) -> dict[str, torch.Tensor]:
        """The images alone, pixels in the dtype of the model."""
        moved = {k: v.to(model.device) for k, v in self.vision.items()}
        return {**moved, "pixel_values": moved["pixel_values"].to(model.dtype)}


def image_key(image: Image.Image) -> str:
    """Key of an image, from size and content."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16)
    return f"{image.mode}{image.size}{digest.hexdigest()}"


def arrange(keys: Sequence[Hashable], size: int) -> list[list[int]]:
    """Batches of at most ``size`` positions, sorted so that questions with equal keys of their
    images share one."""
    first: dict[Hashable, int] = {}
    for i, key in enumerate(keys):
        first.setdefault(key, i)
    order = sorted(range(len(keys)), key=lambda i: (first[keys[i]], i))
    return [order[start : start + size] for start in range(0, len(order), size)]


def make_batch(
    processor: Any, items: Sequence[Any], keys: Sequence[Hashable], indices: Sequence[int] = ()
) -> Batch:
    """One left-padded batch; items with equal ``keys`` are about the same image."""
    inputs = processor(
        text=[prompt_of(processor, item.question) for item in items],
        images=[item.image.convert("RGB") for item in items],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    unique = list(dict.fromkeys(keys))
    image_of = [unique.index(key) for key in keys]
    rows = [image_of.index(u) for u in range(len(unique))]
    vision = {k: inputs.pop(k)[rows] for k in VISION_INPUTS if k in inputs}
    return Batch(list(items), dict(inputs), vision, image_of, list(indices))


def make_batches(processor: Any, items: Sequence[Any], size: int) -> list[Batch]:
    """All batches of some items at once; `batches.Samples` reads them one by one."""
    keys = [image_key(item.image) for item in items]
    return [
        make_batch(processor, [items[i] for i in chosen], [keys[i] for i in chosen], chosen)
        for chosen in arrange(keys, size)
    ]
