# SPDX-License-Identifier: Apache-2.0
"""Mini random models with the structure of the real ones: for tests and for the support matrix."""

from __future__ import annotations

from typing import Any

import torch

IMAGE_TOKEN = "<image>"
WORDS = "is there a red blue circle square what shape colour yes no USER: ASSISTANT: ? ."


def mini_tower_config(kind: str = "clip", image_size: int = 56, patch: int = 14) -> Any:
    """Configuration of a 4-block encoder of width 32: "clip", "siglip", "dinov2" or "vit"."""
    import transformers

    names = {"clip": "CLIPVision", "siglip": "SiglipVision", "dinov2": "Dinov2", "vit": "ViT"}
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": patch,
    }
    if kind == "dinov2":
        shape["mlp_ratio"] = 2
    else:
        shape["intermediate_size"] = 64
    return getattr(transformers, f"{names[kind]}Config")(**shape)


def mini_llava(
    tower: str = "clip", decoder: str = "llama", image_size: int = 56, seed: int = 0
) -> Any:
    """A random LLaVA with a 4-block encoder and a 4-layer decoder, in eval mode."""
    import transformers
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    names = {"llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2"}
    text = getattr(transformers, f"{names[decoder]}Config")(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    vision = mini_tower_config(tower, image_size)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=3,
        image_token_id=3,
        vision_feature_select_strategy="full" if tower == "siglip" else "default",
        vision_feature_layer=-2,
        image_seq_length=(image_size // 14) ** 2,
    )
    torch.manual_seed(seed)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    return model


def mini_crops(family: str = "next", seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random LLaVA-NeXT ("next"), its "next-video" or "onevision", and a prompt with an image.

    The image is cut into a thumbnail and two crops side by side: 16 + 4 rows of 8 + 1 tokens.
    """
    import transformers

    plain = mini_llava("siglip" if family == "onevision" else "clip", seed=seed).config
    prefixes = {"next": "LlavaNext", "next-video": "LlavaNextVideo", "onevision": "LlavaOnevision"}
    prefix = prefixes[family]
    config = getattr(transformers, prefix + "Config")(
        vision_config=plain.vision_config,
        text_config=plain.text_config,
        image_token_index=3,
        video_token_index=4,
        image_grid_pinpoints=[[56, 112]],
        vision_feature_layer=-2,
        vision_feature_select_strategy=plain.vision_feature_select_strategy,
        vision_aspect_ratio="anyres_max_9",
    )
    torch.manual_seed(seed)
    model = getattr(transformers, prefix + "ForConditionalGeneration")(config).eval()
    pixels = torch.randn(1, 3, 3, 56, 56, generator=torch.Generator().manual_seed(seed))
    return model, {
        "input_ids": torch.tensor([[1, *[3] * 52, 5, 6, 7]]),
        "pixel_values": pixels,
        "image_sizes": torch.tensor([[56, 112]]),
    }


def mini_retrieval(version: str = "Blip", seed: int = 0) -> Any:
    """A random "Blip" or "Blip2" for image-text retrieval with a 4-block tower, in eval mode."""
    import transformers

    shape: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "initializer_range": 0.2,
    }
    reader = {**shape, "num_hidden_layers": 2, "vocab_size": 64, "encoder_hidden_size": 32}
    parts: dict[str, Any]
    if version == "Blip":
        parts = {"text_config": {**reader, "bos_token_id": 1, "sep_token_id": 2}}
    else:
        parts = {"qformer_config": {**reader, "use_qformer_text_input": True}}
    config = getattr(transformers, version + "Config")(
        vision_config={**shape, "image_size": 56, "patch_size": 14}, **parts
    )
    torch.manual_seed(seed)
    return getattr(transformers, version + "ForImageTextRetrieval")(config).eval()


def mini_qwen(family: str = "Qwen2_5_VL", seed: int = 0) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random "Qwen2VL", "Qwen2_5_VL" or "Qwen3VL", and a prompt with an image of 6 x 4 tokens."""
    import transformers

    vision: dict[str, Any] = {"depth": 4, "num_heads": 4, "patch_size": 8, "hidden_size": 32}
    if family == "Qwen2VL":
        vision |= {"embed_dim": 32, "mlp_ratio": 2}
    else:
        vision |= {"out_hidden_size": 32, "intermediate_size": 64}
    if family == "Qwen2_5_VL":
        vision |= {"window_size": 32, "fullatt_block_indexes": [1, 3]}
    if family == "Qwen3VL":
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [1, 2]}
    text = mini_llava().config.text_config.to_dict() | {
        "model_type": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
    }
    config = getattr(transformers, family + "Config")(
        vision_config=vision,
        text_config={k: v for k, v in text.items() if v is not None},
        image_token_id=3,
        video_token_id=4,
        vision_start_token_id=5,
        vision_end_token_id=6,
    )
    torch.manual_seed(seed)
    model = getattr(transformers, family + "ForConditionalGeneration")(config).eval()
    model.generation_config.pad_token_id = 0
    model.generation_config.eos_token_id = 2
    ids = torch.tensor([[1, 5, *[3] * 24, 6, 7, 8, 9]])
    g = torch.Generator().manual_seed(seed)
    return model, {
        "input_ids": ids,
        "mm_token_type_ids": (ids == 3).long(),
        "pixel_values": torch.randn(4 * 24, 3 * 2 * 8 * 8, generator=g),
        "image_grid_thw": torch.tensor([[1, 12, 8]]),
    }


def mini_video(family: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """A random model of `mini_crops` or `mini_qwen` and a prompt with a video of 4 x 2 x 2 tokens.

    Qwen3-VL has a time stamp in front of each of the four frames.
    """
    g = torch.Generator().manual_seed(0)
    if not family.startswith("Qwen"):
        model, _ = mini_crops(family)
        newline = family == "onevision"
        return model, {
            "input_ids": torch.tensor([[1, *[4] * (16 + newline), 5, 6, 7]]),
            "pixel_values_videos": torch.randn(1, 4, 3, 56, 56, generator=g),
        }
    model, _ = mini_qwen(family)
    frames = [9, 5, *[4] * 4, 6] * 4 if family == "Qwen3VL" else [5, *[4] * 16, 6]
    ids = torch.tensor([[1, *frames, 7, 8, 9]])
    return model, {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == 4).long(),
        "pixel_values_videos": torch.randn(4 * 16, 3 * 2 * 8 * 8, generator=g),
        "video_grid_thw": torch.tensor([[4, 4, 4]]),
    }


def mini_processor(model: Any) -> Any:
    """A processor for `mini_llava`: word-level tokenizer over a few words, CLIP pixels."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

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
