# SPDX-License-Identifier: Apache-2.0
"""Models to time, with random weights or the user's own, and prompts of a given length for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from ...adapters.locate import locate
from ..shared.prompts import prompt_of

Inputs = dict[str, Any]
PREFILL: Inputs = {"use_cache": True, "logits_to_keep": 1}
"""How generate() calls a language model on a prompt."""


@dataclass(frozen=True)
class Prompt:
    """Size of a prompt: rows of the batch, text tokens and images of each row."""

    batch: int = 1
    text_tokens: int = 64
    images: int = 1


@dataclass(frozen=True)
class Shape:
    """A model and how its prompts are made.

    Attributes:
        name: for the command line; title: for tables.
        build: (device, dtype) -> the model, in eval mode.
        inputs: (model, prompt) -> the arguments of a call, on its device.
        encoder: an encoder alone, of whose prompts only the batch counts.
    """

    name: str
    title: str
    build: Callable[[str, torch.dtype], Any]
    inputs: Callable[[Any, Prompt], Inputs]
    encoder: bool = False


def dtype_on(device: str) -> torch.dtype:
    """As users have their weights there."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32


def _pixels(model: Any, images: int) -> torch.Tensor:
    return torch.randn(images, 3, 336, 336).to(model.device, model.dtype)


def vit_large(device: str, dtype: torch.dtype) -> Any:
    """CLIP ViT-L/14 at 336 px (24 layers, width 1024) with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    return CLIPVisionModel(config).eval().to(device, dtype)


def _llava(
    device: str, dtype: torch.dtype, text: Any, tower: tuple[int, int, int], image_token: int
) -> Any:
    """A LLaVA with random weights and 576 tokens an image.

    Args:
        text: configuration of the decoder; tower: layers, width and heads of the CLIP tower.
    """
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            num_hidden_layers=tower[0],
            hidden_size=tower[1],
            intermediate_size=4 * tower[1],
            num_attention_heads=tower[2],
            image_size=336,
            patch_size=14,
        ),
        text_config=text,
        image_token_index=image_token,
        image_token_id=image_token,
        image_seq_length=576,
        dtype=dtype,
    )
    with torch.device(device):
        return LlavaForConditionalGeneration._from_config(config).eval()


def half_billion(device: str, dtype: torch.dtype) -> Any:
    """A decoder of the shape of Qwen2-0.5B.

    Its tower is small (4 layers, width 128), so that what is timed is the language model.
    """
    from transformers import Qwen2Config

    text = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return _llava(device, dtype, text, (4, 128, 4), 151646)


def seven_billion(device: str, dtype: torch.dtype) -> Any:
    """The shape of LLaVA-1.5-7B: CLIP ViT-L/14 at 336 px and a Llama of 32 layers of width 4096."""
    from transformers import LlamaConfig

    text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    return _llava(device, dtype, text, (24, 1024, 16), 32000)


def llava_inputs(model: Any, prompt: Prompt) -> Inputs:
    """A few words, the images, the other words; the same ids in every row."""
    words = 1000 + torch.arange(prompt.text_tokens) % 1000
    before = min(5, prompt.text_tokens - 1)
    tokens = model.config.image_seq_length * prompt.images
    image = torch.full((tokens,), model.config.image_token_id)
    ids = torch.cat([words[:before], image, words[before:]])
    ids = ids.expand(prompt.batch, -1).to(model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": _pixels(model, prompt.batch * prompt.images),
        **PREFILL,
    }


def encoder_inputs(model: Any, prompt: Prompt) -> Inputs:
    """Random pixels."""
    return {"pixel_values": _pixels(model, prompt.batch)}


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("vit-large", "ViT-L/14, 336 px, encoder alone", vit_large, encoder_inputs, True),
        Shape("half-billion", "decoder of Qwen2-0.5B's shape", half_billion, llava_inputs),
        Shape("seven-billion", "LLaVA-1.5-7B's shape", seven_billion, llava_inputs),
    )
}


def text_prompt(model: Any, batch: int, length: int) -> Inputs:
    """Text alone, without images."""
    ids = (5 + torch.arange(length, device=model.device) % 50).expand(batch, -1)
    return {"input_ids": ids, **PREFILL}


def visual_tokens(model: Any, inputs: Inputs) -> int:
    """Image placeholders in the first row."""
    decoder = locate(model).decoder
    if decoder is None:
        return 0
    ids = inputs["input_ids"][0]
    return int(torch.isin(ids, torch.tensor(decoder.token_ids, device=ids.device)).sum())


def own(model: Any, processor: Any, title: str, edge: int) -> Shape:
    """A loaded model of the user's, on random square images of ``edge`` pixels."""

    def inputs(model: Any, prompt: Prompt) -> Inputs:
        noise = np.random.default_rng(0).integers(0, 256, (edge, edge, 3), dtype=np.uint8)
        pictures = [Image.fromarray(noise)] * prompt.images
        text = prompt_of(processor, "What is this?", prompt.images)
        made = dict(processor(text=[text], images=pictures, return_tensors="pt"))
        shape = made["input_ids"].shape
        visual = visual_tokens(model, made)
        if not visual:
            raise ValueError("the processor's prompt has no image tokens that vtc knows")
        missing = prompt.text_tokens - (shape[1] - visual)
        if missing < 0:
            least = prompt.text_tokens - missing
            raise ValueError(
                f"the shortest prompt of this model has {least} text tokens; ask for at least "
                "that many"
            )
        for name, x in made.items():
            if x.shape == shape:  # ids, mask, token types: more of the last token, which is text
                x = torch.cat([x, x[:, -1:].expand(-1, missing)], 1)
            # Rows lie one behind the other in all of a processor's tensors.
            x = x.repeat(prompt.batch, *[1] * (x.dim() - 1)).to(model.device)
            made[name] = x.to(model.dtype) if x.is_floating_point() else x
        return {**made, **PREFILL}

    return Shape("model", title, lambda device, dtype: model, inputs)
