# SPDX-License-Identifier: Apache-2.0
"""Mini random models with the structure of the real ones: for tests and for the support matrix."""

from __future__ import annotations

from typing import Any

import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

from .mini_families import PAD, decoder, llava, random_model, tower

IMAGE_TOKEN = "<image>"
WORDS = "is there a red blue circle square what shape colour yes no USER: ASSISTANT: ? ."
SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
"""Of towers and decoders."""


def mini_tower_config(kind: str = "clip", image_size: int = 56, heads: int = 4) -> Any:
    """Configuration of a 4-block encoder of width 32: "clip", "siglip", "dinov2" or "vit"."""
    shape = SHAPE | {"num_attention_heads": heads, "image_size": image_size, "patch_size": 14}
    return tower(kind, **shape, **({"vision_use_head": True} if kind == "siglip" else {}))


def mini_llava(tower: str = "clip", image_size: int = 56, seed: int = 0, heads: int = 4) -> Any:
    """A random LLaVA with a 4-block encoder and a 4-layer decoder, in eval mode."""
    shape = SHAPE | {"num_attention_heads": heads, "num_key_value_heads": -(-heads // 2)}
    config = llava(
        mini_tower_config(tower, image_size, heads),
        decoder("Llama", **shape, vocab_size=64, max_position_embeddings=2048),
        image_seq_length=(image_size // 14) ** 2,
    )
    model = random_model("LlavaForConditionalGeneration", config, seed)
    model.generation_config.pad_token_id = PAD
    model.generation_config.eos_token_id = 2
    return model


def mini_retrieval(version: str = "Blip", seed: int = 0) -> Any:
    """A random "Blip" or "Blip2" for image-text retrieval with a 4-block tower, in eval mode."""
    shape = SHAPE | {"initializer_range": 0.2}
    reader = {**shape, "num_hidden_layers": 2, "vocab_size": 64, "encoder_hidden_size": 32}
    parts: dict[str, Any]
    if version == "Blip":
        parts = {"text_config": {**reader, "bos_token_id": 1, "sep_token_id": 2}}
    else:
        parts = {"qformer_config": {**reader, "use_qformer_text_input": True}}
    config = getattr(transformers, version + "Config")(
        vision_config={**shape, "image_size": 56, "patch_size": 14}, **parts
    )
    return random_model(version + "ForImageTextRetrieval", config, seed)


def mini_processor(model: Any) -> Any:
    """A processor for `mini_llava`: word-level tokenizer over a few words, CLIP pixels."""
    vocab = {"<pad>": 0, "<s>": 1, "</s>": 2, IMAGE_TOKEN: 3, "<unk>": 4}
    for word in WORDS.split():
        vocab.setdefault(word, len(vocab))
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE_TOKEN},
    )
    edge = model.config.vision_config.image_size
    images = CLIPImageProcessor(
        size={"shortest_edge": edge}, crop_size={"height": edge, "width": edge}
    )
    strategy = model.config.vision_feature_select_strategy
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=model.config.vision_config.patch_size,
        vision_feature_select_strategy=strategy,
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=1 if strategy == "default" else 0,
    )
