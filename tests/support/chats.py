# SPDX-License-Identifier: Apache-2.0
"""Chat template, pictures, models and processors for tests of chat models."""

from __future__ import annotations

import numpy as np
import torch
import transformers
from PIL import Image

from vtc.benchmarks.harnesses.chat import ChatModel
from vtc.benchmarks.support.mini_models import WORDS, mini_llava, mini_processor

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}:{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %} {{ p['text'] }}{% endif %}"
    "{% endfor %}{% endfor %} ASSISTANT:"
)


def picture(seed: int) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (56, 56, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def made(method=None) -> ChatModel:
    """Weights so large that answers depend on what a model sees."""
    model = mini_llava()
    with torch.no_grad():
        for parameter in model.model.language_model.parameters():
            parameter.mul_(3)
    model.generation_config.eos_token_id = 63
    return ChatModel(model, mini_processor(model), method)


def qwen_processor():
    """For the models of mini_qwen: a few words, patches of 4 x 4 pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    names = ["<pad>", "<s>", "</s>", "<|image_pad|>", "<|video_pad|>", "<|vision_start|>"]
    vocab = {
        w: i
        for i, w in enumerate(dict.fromkeys([*names, "<|vision_end|>", "<unk>", *WORDS.split()]))
    }
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=[*names[3:], "<|vision_end|>"],
        extra_special_tokens={"image_token": names[3], "video_token": names[4]},
    )
    shape = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"min_pixels": 8 * 8 * 4, "max_pixels": 8 * 8 * 40}
    return transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(**shape, **pixels),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**shape),
        chat_template=TEMPLATE.replace("<image>", "<|vision_start|><|image_pad|><|vision_end|>"),
    )
