# SPDX-License-Identifier: Apache-2.0
"""Mini random models that only the generic adapter knows, built from their configurations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutputWithPooling

IMAGE = 3
TOKENS = 16
TEXT: dict[str, Any] = dict(
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=60,
    max_position_embeddings=512,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)
VISION: dict[str, Any] = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=2,
    image_size=32,
    patch_size=8,
)
IDS: dict[str, Any] = dict(image_token_id=IMAGE, image_token_index=IMAGE)


def text(kind: str = "llama", **kwargs: Any) -> dict[str, Any]:
    return {"model_type": kind, **TEXT, **kwargs}


def vision(kind: str, **kwargs: Any) -> dict[str, Any]:
    return {"model_type": kind, **VISION, **kwargs}


@dataclass(frozen=True)
class GenericFamily:
    """One class: its configuration, whether patches and tokens are one to one, and its pixels.

    Attributes:
        pixels: what the encoder side takes for ``n`` images; None: encoded images are handed in,
            so that only the LLM runs.
        tokens: placeholders of an image.
    """

    name: str
    config: Callable[[], Any]
    one_to_one: bool = False
    pixels: Callable[[int], dict[str, Tensor]] | None = None
    tokens: int = TOKENS
    stacked: bool = False  # this class hands images around as one tensor
    ahead: bool = True  # its layers have the parts that tell the attention of the next layer

    def build(self, seed: int = 0, gain: float = 4.0) -> Any:
        torch.manual_seed(seed)
        model: Any = getattr(hf, self.name)._from_config(self.config()).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() == 2 and not any(n in name for n in ("embed", "lm_head", "router")):
                    weight.mul_(gain)
        model.generation_config.pad_token_id = 0
        model.generation_config.eos_token_id = None
        return model

    def inputs(self, model: Any, counts: list[int], seed: int = 0) -> dict[str, Any]:
        """Left-padded prompts with so many images in each row."""
        g = torch.Generator().manual_seed(seed)
        rows = []
        for r, n in enumerate(counts):
            row = torch.randint(5, 60, (3 + r,), generator=g).tolist()
            for _ in range(n):
                row += [IMAGE] * self.tokens + torch.randint(5, 60, (5,), generator=g).tolist()
            rows.append(row)
        length = max(map(len, rows))
        ids = torch.tensor([[0] * (length - len(row)) + row for row in rows])
        out: dict[str, Any] = {"input_ids": ids, "attention_mask": (ids > 0).long()}
        if self.pixels is not None:
            torch.manual_seed(seed)
            return {**out, **self.pixels(sum(counts))}
        width = model.config.get_text_config().hidden_size
        features = [torch.randn(self.tokens, width, generator=g) for _ in range(sum(counts))]
        packed: Any = torch.stack(features) if self.stacked else features
        encoded = BaseModelOutputWithPooling(pooler_output=packed)
        return {**out, "mm_encoder_outputs": {"image": encoded}}


def _square(n: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(n, 3, 32, 32)}


def clip_llama(**kwargs: Any) -> dict[str, Any]:
    return dict(
        vision_config=vision("clip_vision_model"),
        text_config=text(),
        vision_feature_select_strategy="default",
        **IDS,
        **kwargs,
    )


def _axes(**kwargs: Any) -> dict[str, Any]:
    """Rotary embedding of time, height and width."""
    section = [1, 1, 1] if kwargs else [2, 2, 2]
    return dict(rope_type="default", rope_theta=1e4, mrope_section=section, **kwargs)


FAMILIES = (
    GenericFamily(
        "VipLlavaForConditionalGeneration",
        lambda: hf.VipLlavaConfig(**clip_llama(vision_feature_layers=[-2, -3, 1])),
        pixels=_square,
    ),
    GenericFamily(
        "DeepseekVLForConditionalGeneration",
        lambda: hf.DeepseekVLConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text(),
            **IDS,
        ),
        one_to_one=True,
        pixels=_square,
    ),
    GenericFamily(
        "GotOcr2ForConditionalGeneration",
        lambda: hf.GotOcr2Config(
            vision_config=dict(
                hidden_size=32,
                output_channels=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=256,
                patch_size=16,
                mlp_dim=48,
                window_size=4,
                global_attn_indexes=[1],
            ),
            text_config=text("qwen2"),
            **IDS,
        ),
        pixels=lambda n: {"pixel_values": torch.randn(n, 3, 256, 256)},
    ),
    GenericFamily(
        "Cohere2VisionForConditionalGeneration",
        lambda: hf.Cohere2VisionConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text("cohere"),
            downsample_factor=2,
            alignment_intermediate_size=32,
            **IDS,
        ),
        pixels=_square,
        tokens=4,
    ),
    GenericFamily(
        "Cohere2VisionForConditionalGeneration",  # with layers that look back 64 tokens
        lambda: hf.Cohere2VisionConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            text_config=text("cohere2", sliding_window=64),
            downsample_factor=2,
            alignment_intermediate_size=32,
            **IDS,
        ),
        pixels=_square,
        tokens=4,
    ),
    GenericFamily(
        "Ovis2ForConditionalGeneration",
        lambda: hf.Ovis2Config(
            vision_config=dict(
                VISION, hidden_stride=2, vocab_size=20, num_visual_indicator_tokens=5
            ),
            text_config=text("qwen2"),
            image_token_id=IMAGE,
            visual_indicator_token_ids=[50, 51, 52, 53, 54],
            hidden_size=48,
        ),
        pixels=_square,
        tokens=4,
    ),
    GenericFamily(
        "JanusForConditionalGeneration",
        lambda: hf.JanusConfig(
            vision_config=dict(VISION, projection_dim=48, num_image_tokens=16, mlp_ratio=2.0),
            vq_config=dict(
                embed_dim=4,
                num_embeddings=8,
                latent_channels=8,
                base_channels=32,
                channel_multiplier=[1, 1],
                num_res_blocks=1,
                image_token_embed_dim=8,
                projection_dim=48,
                num_patches=4,
            ),
            text_config=text(),
            image_token_id=IMAGE,
        ),
        stacked=True,
    ),
    GenericFamily(
        "DeepseekVLHybridForConditionalGeneration",
        lambda: hf.DeepseekVLHybridConfig(
            vision_config=vision("siglip_vision_model", vision_use_head=False),
            high_res_vision_config=dict(
                model_type="sam_vision_model",
                hidden_size=32,
                output_channels=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                image_size=64,
                patch_size=16,
                mlp_dim=48,
                window_size=2,
                global_attn_indexes=[1],
            ),
            text_config=text(),
            **IDS,
        ),
        stacked=True,
    ),
    GenericFamily(
        "PerceptionLMForConditionalGeneration",
        lambda: hf.PerceptionLMConfig(
            vision_config=dict(
                model_type="timm_wrapper",
                architecture="vit_pe_core_large_patch14_336",
                model_args=dict(embed_dim=32, depth=2, num_heads=2, img_size=(28, 28)),
            ),
            text_config=text(),
            image_token_id=IMAGE,
        ),
        stacked=True,
    ),
    GenericFamily(
        "VideoLlavaForConditionalGeneration",
        lambda: hf.VideoLlavaConfig(**clip_llama(video_token_index=4)),
        stacked=True,
    ),
    GenericFamily(
        "FastVlmForConditionalGeneration",
        lambda: hf.FastVlmConfig(
            vision_config=dict(
                model_type="timm_wrapper",
                architecture="fastvit_mci3",
                hidden_size=64,
                model_args=dict(layers=[1] * 5, embed_dims=[16, 16, 32, 32, 64]),
            ),
            text_config=text("qwen2"),
            **IDS,
        ),
        stacked=True,
    ),
    GenericFamily(
        "Lfm2VlForConditionalGeneration",
        lambda: hf.Lfm2VlConfig(
            vision_config=dict(VISION, num_patches=16, model_type="siglip2_vision_model"),
            text_config=text("lfm2", layer_types=["full_attention"] * 4),
            image_token_id=IMAGE,
            projector_hidden_size=32,
        ),
        ahead=False,
    ),
    GenericFamily(
        "LightOnOcrForConditionalGeneration",
        lambda: hf.LightOnOcrConfig(
            vision_config=vision("pixtral"),
            text_config=text("qwen3", head_dim=12),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "Idefics2ForConditionalGeneration",
        lambda: hf.Idefics2Config(
            vision_config=VISION,
            perceiver_config=dict(
                hidden_size=48,
                resampler_n_latents=4,
                resampler_depth=1,
                resampler_n_heads=4,
                resampler_head_dim=12,
                num_key_value_heads=2,
            ),
            text_config=text("mistral", sliding_window=None),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "QianfanOCRForConditionalGeneration",
        lambda: hf.QianfanOCRConfig(
            vision_config=dict(VISION, image_size=[32, 32], patch_size=[8, 8]),
            text_config=text("qwen3", head_dim=12),
            **IDS,
        ),
        stacked=True,
    ),
    GenericFamily(
        "VideoLlama3ForConditionalGeneration",
        lambda: hf.VideoLlama3Config(
            vision_config={k: v for k, v in VISION.items() if k != "image_size"},
            text_config=text("qwen2"),
            image_token_id=IMAGE,
            video_token_id=4,
        ),
    ),
    GenericFamily(
        "Molmo2ForConditionalGeneration",
        lambda: hf.Molmo2Config(
            vision_config=dict(VISION, image_size=[32, 32]),
            adapter_config=dict(
                hidden_size=32,
                intermediate_size=32,
                text_hidden_size=48,
                vision_feature_layer=[2, 1],
            ),
            text_config=dict(TEXT, head_dim=12),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "Glm4vForConditionalGeneration",
        lambda: hf.Glm4vConfig(
            vision_config=dict(depth=2, out_hidden_size=48, **VISION, num_heads=2),
            text_config=text("glm4v_text", rope_parameters=_axes(partial_rotary_factor=0.5)),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "Glm4vMoeForConditionalGeneration",
        lambda: hf.Glm4vMoeConfig(
            vision_config=dict(depth=2, out_hidden_size=48, **VISION, num_heads=2),
            text_config=text(
                "glm4v_moe_text",
                rope_parameters=_axes(partial_rotary_factor=0.5),
                n_routed_experts=4,
                num_experts_per_tok=2,
                moe_intermediate_size=16,
                first_k_dense_replace=1,
            ),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "PaddleOCRVLForConditionalGeneration",
        lambda: hf.PaddleOCRVLConfig(
            vision_config=VISION,
            text_config=text("paddleocr_vl_text", head_dim=12, rope_parameters=_axes()),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "GlmOcrForConditionalGeneration",
        lambda: hf.GlmOcrConfig(
            vision_config=dict(depth=2, out_hidden_size=48, **VISION, num_heads=2),
            text_config=text("glm_ocr_text", head_dim=12, rope_parameters=_axes()),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        lambda: hf.HyperCLOVAXVisionV2Config(
            vision_config=dict(depth=2, hidden_size=32, num_heads=2, out_hidden_size=48),
            text_config=text("hyperclovax"),
            image_token_id=IMAGE,
        ),
    ),
    GenericFamily(
        "Exaone4_5_ForConditionalGeneration",
        lambda: hf.Exaone4_5_Config(
            vision_config=dict(depth=2, hidden_size=32, num_heads=2, out_hidden_size=48),
            text_config=text("exaone4", sliding_window=None, layer_types=["full_attention"] * 4),
            image_token_id=IMAGE,
        ),
        ahead=False,
    ),
    GenericFamily(
        "MiniMaxM3SparseForConditionalGeneration",
        lambda: hf.MiniMaxM3VLConfig(
            vision_config=VISION,
            text_config=text(
                "minimax_m3_vl_text",
                head_dim=12,
                num_local_experts=4,
                num_experts_per_tok=2,
                layer_types=["full_attention"] * 4,
            ),
            **IDS,
        ),
    ),
    GenericFamily(
        "Cosmos3EdgeForConditionalGeneration",
        lambda: hf.Cosmos3EdgeConfig(
            vision_config=VISION,
            text_config=text("cosmos3_edge_text", head_dim=12, rope_parameters=_axes()),
            image_token_id=IMAGE,
        ),
    ),
)
"""Classes that work, each with what its images look like to the LLM."""
