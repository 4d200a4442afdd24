# SPDX-License-Identifier: Apache-2.0
"""Questions as prompts, padded batches of them, and the greedy answers of a model."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
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
    ``image_of`` says which of them a question is about.
    """

    items: list[Any]
    text: dict[str, torch.Tensor]
    vision: dict[str, torch.Tensor]
    image_of: list[int]

    def inputs(self, model: Any) -> dict[str, torch.Tensor]:
        """What the model takes, on its device."""
        return {
            **{k: v.to(model.device) for k, v in self.text.items()},
            **self.images(model),
        }

    def images(self, model: Any) -> dict[str, torch.Tensor]:
        """The images alone, pixels in the dtype of the model."""
        moved = {k: v.to(model.device) for k, v in self.vision.items()}
        return {**moved, "pixel_values": moved["pixel_values"].to(model.dtype)}


def image_key(image: Image.Image) -> str:
    """What identifies an image: size and content."""
    digest = hashlib.blake2b(image.tobytes(), digest_size=16)
    return f"{image.mode}{image.size}{digest.hexdigest()}"


def make_batches(processor: Any, items: Sequence[Any], size: int) -> list[Batch]:
    """Left-padded batches of at most ``size`` questions, sorted so that images are shared."""
    keys = [image_key(item.image) for item in items]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    order = sorted(range(len(items)), key=lambda i: (first[keys[i]], i))
    batches = []
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        unique = list(dict.fromkeys(keys[i] for i in chosen))
        inputs = processor(
            text=[prompt_of(processor, items[i].question) for i in chosen],
            images=[items[i].image.convert("RGB") for i in chosen],
            return_tensors="pt",
            padding=True,
            padding_side="left",
        )
        image_of = [unique.index(keys[i]) for i in chosen]
        rows = [image_of.index(u) for u in range(len(unique))]
        vision = {k: inputs.pop(k)[rows] for k in VISION_INPUTS if k in inputs}
        batches.append(Batch([items[i] for i in chosen], dict(inputs), vision, image_of))
    return batches


@torch.no_grad()
def answer_batch(model: Any, processor: Any, batch: Batch, max_new_tokens: int) -> list[str]:
    """Greedy answers to a batch; the encoder runs once for each of its images."""
    text = {k: v.to(model.device) for k, v in batch.text.items()}
    images = batch.images(model)
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        encoded = model.get_image_features(**images)
        features = [encoded.pooler_output[i] for i in batch.image_of]
        outputs = {"image": type(encoded)(pooler_output=features)}
        vision: dict[str, Any] = {"mm_encoder_outputs": outputs}
    else:  # transformers before 5.18: one encoder pass for each question
        vision = {k: v[batch.image_of] for k, v in images.items()}
    out = model.generate(**text, **vision, do_sample=False, max_new_tokens=max_new_tokens)
    new = out[:, text["input_ids"].shape[1] :]
    return [t.strip() for t in processor.batch_decode(new, skip_special_tokens=True)]
