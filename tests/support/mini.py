# SPDX-License-Identifier: Apache-2.0
"""Mini random encoders of every family: an 8 x 8 grid, attention far from uniform, no downloads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import open_clip.transformer
import timm
import torch
import transformers as hf
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

GRID = 8
PATCH = 4
SIZE = GRID * PATCH
WIDTH = 32
HEADS = 4
DEPTH = 5

HF_VISION = dict(
    hidden_size=WIDTH,
    intermediate_size=64,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    image_size=SIZE,
    patch_size=PATCH,
)
HF_DINOV2 = {k: v for k, v in HF_VISION.items() if k != "intermediate_size"} | {"mlp_ratio": 2}
TIMM = dict(
    img_size=SIZE, patch_size=PATCH, embed_dim=WIDTH, depth=DEPTH, num_heads=HEADS, num_classes=7
)


@dataclass(frozen=True)
class Mini:
    """One family: how to build the model, and what of its output is compared."""

    build: Callable[[], nn.Module]
    run: Callable[[nn.Module, Tensor], dict[str, Tensor]]
    has_cls: bool = True
    pooled: bool = False  # the head averages the patch tokens or attends to them
    resizes: bool = True  # takes other image sizes

    def __call__(self, seed: int = 0, gain: float = 4.0) -> nn.Module:
        """The model in eval mode, the same weights for the same seed."""
        torch.manual_seed(seed)
        return loud(self.build(), gain)


def loud(model: nn.Module, gain: float = 4.0) -> nn.Module:
    """Random weights such that attention is far from uniform and no part is a no-op."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() < 2 or "pos_embed" in name or "position" in name or "token" in name:
                weight.add_(0.3 * torch.randn_like(weight))
            elif weight.dim() == 2:
                fan_in = weight.shape[1]
                weight.copy_(torch.randn_like(weight) * (gain / 2) * fan_in**-0.5)
    return model.eval()


def images(batch: int = 2, seed: int = 0, size: int = SIZE) -> Tensor:
    """Pixels (batch, 3, size, size)."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


# ---- timm ----------------------------------------------------------------------------------------


def _timm(cls: Callable[..., nn.Module] = VisionTransformer, **kwargs: Any) -> nn.Module:
    return cls(**{**TIMM, "dynamic_img_size": True, **kwargs})


def _unfused() -> nn.Module:
    model = _timm(qk_norm=True)
    for block in model.blocks:
        block.attn.fused_attn = False
    return model


def _run_timm(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    return {"tokens": model.forward_features(pixels), "logits": model(pixels)}


def _deit(**kwargs: Any) -> nn.Module:
    model = timm.create_model("deit_tiny_distilled_patch16_224", **{**TIMM, **kwargs})
    return model


# ---- Hugging Face --------------------------------------------------------------------------------

_text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)


def clip_config(**kwargs: Any) -> hf.CLIPVisionConfig:
    return hf.CLIPVisionConfig(**{**HF_VISION, "projection_dim": 16, **kwargs})


def siglip_config(**kwargs: Any) -> hf.SiglipVisionConfig:
    return hf.SiglipVisionConfig(**{**HF_VISION, **kwargs})


def dinov2_config(**kwargs: Any) -> hf.Dinov2Config:
    return hf.Dinov2Config(**{**HF_DINOV2, **kwargs})


def vit_config(**kwargs: Any) -> hf.ViTConfig:
    return hf.ViTConfig(**{**HF_VISION, **kwargs})


def _clip_model() -> nn.Module:
    text = hf.CLIPTextConfig(vocab_size=40, max_position_embeddings=8, eos_token_id=2, **_text)
    return hf.CLIPModel(
        hf.CLIPConfig(
            text_config=text.to_dict(), vision_config=clip_config().to_dict(), projection_dim=16
        )
    )


def _siglip_model() -> nn.Module:
    text = hf.SiglipTextConfig(vocab_size=40, max_position_embeddings=8, **_text)
    text = text.to_dict() | {"projection_size": WIDTH}
    return hf.SiglipModel(
        hf.SiglipConfig(text_config=text, vision_config=siglip_config().to_dict())
    )


def _run_hf(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    out = model(pixel_values=pixels)
    return {k: v for k, v in out.items() if isinstance(v, Tensor)}


def _run_dual(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    ids = torch.tensor([[5, 6, 2], [7, 8, 2]])
    out = model(input_ids=ids, pixel_values=pixels)
    return {"image_embeds": out.image_embeds, "logits": out.logits_per_image}


BLIP_VISION = {**HF_VISION, "initializer_range": 0.2}  # 1e-10 by default: pixels would not matter


def _blip(prefix: str, **kwargs: Any) -> nn.Module:
    config = getattr(hf, prefix + "VisionConfig")(**{**BLIP_VISION, **kwargs})
    return getattr(hf, prefix + "VisionModel")(config)


def blip_retrieval() -> nn.Module:
    text = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(vocab_size=40, encoder_hidden_size=WIDTH, max_position_embeddings=16)
    config = hf.BlipConfig(
        text_config=text, vision_config=BLIP_VISION, image_text_hidden_size=8, projection_dim=8
    )
    return hf.BlipForImageTextRetrieval(config)


def blip2_retrieval() -> nn.Module:
    qformer = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2)
    qformer |= dict(vocab_size=40, encoder_hidden_size=WIDTH, max_position_embeddings=16)
    config = hf.Blip2Config(
        vision_config=BLIP_VISION,
        qformer_config={**qformer, "use_qformer_text_input": True, "cross_attention_frequency": 1},
        image_text_hidden_size=8,
        num_query_tokens=3,
    )
    return hf.Blip2ForImageTextRetrieval(config)


def texts() -> dict[str, Tensor]:
    """Two captions of different lengths."""
    ids = torch.tensor([[5, 6, 7, 2], [8, 9, 2, 0]])
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def _run_blip(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    text = {k: v[: len(pixels)] for k, v in texts().items()}
    out = [model(pixel_values=pixels, use_itm_head=itm, **text) for itm in (True, False)]
    return {"itm": out[0].itm_score, "itc": out[1].itm_score}


def _run_blip2(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    text = {k: v[: len(pixels)] for k, v in texts().items()}
    out = [
        model(pixel_values=pixels, use_image_text_matching_head=itm, **text)
        for itm in (True, False)
    ]
    return {"itm": out[0].logits_per_image, "itc": out[1].logits_per_image}


# ---- open_clip -----------------------------------------------------------------------------------


def _open_clip(**kwargs: Any) -> nn.Module:
    return open_clip.transformer.VisionTransformer(
        **{
            **dict(image_size=SIZE, patch_size=PATCH, width=WIDTH, layers=DEPTH, heads=HEADS),
            **dict(mlp_ratio=2.0, output_dim=16, output_tokens=True),
            **kwargs,
        }
    )


def _open_clip_model() -> nn.Module:
    return open_clip.CLIP(
        embed_dim=16,
        vision_cfg=dict(
            layers=DEPTH, width=WIDTH, head_width=WIDTH // HEADS, patch_size=PATCH, image_size=SIZE
        ),
        text_cfg=dict(context_length=8, vocab_size=40, width=16, heads=2, layers=1),
    )


def _run_open_clip(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    pooled, tokens = model(pixels)
    return {"pooled": pooled, "tokens": tokens}


def _run_open_clip_model(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    return {"pooled": model.encode_image(pixels)}


ENCODERS: dict[str, Mini] = {
    "timm-vit": Mini(_timm, _run_timm),
    "timm-vit-unfused": Mini(_unfused, _run_timm),
    "timm-vit-avg": Mini(
        partial(_timm, class_token=False, global_pool="avg"), _run_timm, has_cls=False, pooled=True
    ),
    "timm-vit-fixed-size": Mini(partial(_timm, dynamic_img_size=False), _run_timm, resizes=False),
    "timm-deit-distilled": Mini(_deit, _run_timm, resizes=False),
    "timm-dinov2-reg": Mini(
        partial(_timm, init_values=0.5, reg_tokens=3, no_embed_class=True), _run_timm
    ),
    "timm-siglip": Mini(
        partial(_timm, class_token=False, global_pool="map"), _run_timm, has_cls=False, pooled=True
    ),
    "timm-eva": Mini(
        partial(_timm, Eva, mlp_ratio=2.0, init_values=0.5, use_rot_pos_emb=True),
        _run_timm,
        pooled=True,
    ),
    "timm-eva02": Mini(
        partial(
            _timm,
            Eva,
            qkv_fused=False,
            swiglu_mlp=True,
            scale_mlp=True,
            use_rot_pos_emb=True,
            ref_feat_shape=(4, 4),
            global_pool="token",
        ),
        _run_timm,
    ),
    "timm-eva-mixed": Mini(
        partial(
            _timm,
            Eva,
            use_rot_pos_emb=True,
            rope_type="mixed",
            use_abs_pos_emb=False,
            num_reg_tokens=2,
            attn_type="rope",
            rope_rotate_half=False,
            global_pool="token",
        ),
        _run_timm,
    ),
    "timm-eva-gqa": Mini(
        partial(
            _timm,
            Eva,
            use_rot_pos_emb=True,
            rope_type="dinov3",
            rope_rotate_half=True,
            attn_type="rope",
            qkv_fused=False,
            num_kv_heads=2,
            qk_norm=True,
            global_pool="token",
        ),
        _run_timm,
    ),
    "hf-clip": Mini(lambda: hf.CLIPVisionModel(clip_config()), _run_hf),
    "hf-clip-eager": Mini(
        lambda: hf.CLIPVisionModel._from_config(clip_config(), attn_implementation="eager"), _run_hf
    ),
    "hf-clip-projection": Mini(lambda: hf.CLIPVisionModelWithProjection(clip_config()), _run_hf),
    "hf-clip-model": Mini(_clip_model, _run_dual),
    "hf-siglip": Mini(
        lambda: hf.SiglipVisionModel(siglip_config()), _run_hf, has_cls=False, pooled=True
    ),
    "hf-siglip-model": Mini(_siglip_model, _run_dual, has_cls=False, pooled=True),
    "hf-dinov2": Mini(lambda: hf.Dinov2Model(dinov2_config(layerscale_value=0.5)), _run_hf),
    "hf-dinov2-classifier": Mini(
        lambda: hf.Dinov2ForImageClassification(dinov2_config()), _run_hf, pooled=True
    ),
    "hf-dinov2-reg": Mini(
        lambda: hf.Dinov2WithRegistersModel(
            hf.Dinov2WithRegistersConfig(**HF_DINOV2, num_register_tokens=2)
        ),
        _run_hf,
    ),
    "hf-vit": Mini(lambda: hf.ViTModel(vit_config()), _run_hf),
    "hf-vit-classifier": Mini(lambda: hf.ViTForImageClassification(vit_config()), _run_hf),
    "hf-blip": Mini(partial(_blip, "Blip"), _run_hf),
    "hf-blip-retrieval": Mini(blip_retrieval, _run_blip),
    "hf-blip2": Mini(partial(_blip, "Blip2"), _run_hf),
    "hf-blip2-retrieval": Mini(blip2_retrieval, _run_blip2),
    "hf-instructblip": Mini(partial(_blip, "InstructBlip", qkv_bias=False), _run_hf),
    "open-clip": Mini(_open_clip, _run_open_clip, resizes=False),
    "open-clip-qk-norm": Mini(
        partial(_open_clip, qk_norm=True, pool_type="avg", ls_init_value=0.5),
        _run_open_clip,
        pooled=True,
        resizes=False,
    ),
    "open-clip-model": Mini(_open_clip_model, _run_open_clip_model, resizes=False),
}
"""Every encoder that vtc supports, by name."""
