# SPDX-License-Identifier: Apache-2.0
"""Hugging Face: CLIP, SigLIP, DINOv2, ViT, InternVL's and Idefics3's encoders.

Attribute names differ between transformers 5.5 and 5.23, so they are looked for, not assumed.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..transformers_contract import moved, way_out
from .base import BlockSites, Call, VisionSites, is_a, mlp_width

BLOCKS = {
    "CLIPEncoderLayer": "cls",
    "SiglipEncoderLayer": "map",
    "Dinov2Layer": "cls",
    "Dinov2WithRegistersLayer": "cls",
    "ViTLayer": "cls",
    "InternVLVisionLayer": "none",
    "Idefics3EncoderLayer": "none",
    "SmolVLMEncoderLayer": "none",
}
"""Block classes and how the plain model pools."""

NATIVE = ("Idefics3EncoderLayer", "SmolVLMEncoderLayer")
"""Blocks of encoders that take images padded to the largest, with a mask of the padding."""

TOWERS = (
    "CLIPVisionModel",
    "SiglipVisionModel",
    "Dinov2Model",
    "Dinov2WithRegistersModel",
    "ViTModel",
    "InternVLVisionModel",
    "Idefics3VisionTransformer",
    "SmolVLMVisionTransformer",
)
"""Models that have such blocks."""

MEAN_HEADS = (
    "CLIPForImageClassification",
    "SiglipForImageClassification",
    "Dinov2ForImageClassification",
    "Dinov2WithRegistersForImageClassification",
)
"""Heads that average the patch tokens."""


def _first(module: Any, *names: str) -> Any:
    """The first of these attributes that the module has."""
    return next((x for n in names if (x := getattr(module, n, None)) is not None), None)


def _tower(model: nn.Module) -> tuple[nn.Module, nn.ModuleList] | None:
    """The module that takes the pixels, and its blocks."""
    tower: nn.Module | None = model
    while tower is not None:
        # Up to 5.5 the encoder lies one level deeper; either level takes the pixels.
        encoder = _first(tower, "encoder", "layers", "layer")
        blocks = encoder if isinstance(encoder, nn.ModuleList) else _first_list(encoder)
        if blocks is not None and hasattr(tower, "embeddings"):
            return tower, blocks
        tower = _first(tower, "vision_model", "dinov2", "dinov2_with_registers", "vit")
    return None


def _first_list(encoder: nn.Module | None) -> nn.ModuleList | None:
    found = None if encoder is None else _first(encoder, "layers", "layer")
    return found if isinstance(found, nn.ModuleList) else None


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


QUERY, KEY = ("q_proj", "query"), ("k_proj", "key")


def _project(
    attn: Any, names: tuple[str, ...], norm: nn.Module | None, heads: int, call: Call, rows: slice
) -> Tensor:
    """Queries or keys (B, H, R, d), from the layer that is there now: PEFT exchanges it."""
    y = _first(attn, *names)(_hidden(call)[:, rows])
    return _split(heads, y if norm is None else norm(y))


def _split(heads: int, projected: Tensor, call: Call | None = None) -> Tensor:
    return projected.unflatten(2, (heads, -1)).transpose(1, 2)


def _bias(call: Call, bias: Tensor) -> Call:
    args, kwargs = call
    bias = bias[:, None, None, :].to(_hidden(call).dtype)
    if (args[1] if len(args) > 1 else kwargs.get("attention_mask")) is not None:
        raise UnsupportedError(
            "an attention_mask of all patches does not fit the tokens that are left in the "
            "encoder; leave it out, or use a method that acts behind the encoder"
        )
    if len(args) > 1:
        return (args[0], bias, *args[2:]), kwargs
    return args, {**kwargs, "attention_mask": bias}


def _masked(call: Call) -> Tensor | None:
    """(B, T) fp32, -inf on the patches that the mask of a call hides from every query."""
    mask = call[1].get("attention_mask", call[0][1] if len(call[0]) > 1 else None)
    if mask is None:
        return None
    seen = mask if mask.dtype == torch.bool else mask > 0 if mask.dim() == 2 else mask >= 0
    if seen.dim() == 4:  # (B, 1, T, T), all rows alike
        seen = seen[:, 0, 0]
    return torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)


def _takes_mask(attn: Any) -> bool:
    """Whether the attention forwards an additive mask to a kernel that can use it."""
    kernel = str(getattr(getattr(attn, "config", None), "_attn_implementation", "sdpa"))
    takes = "attention_mask" in inspect.signature(attn.forward).parameters
    return takes and "flash" not in kernel and "flex" not in kernel


def _block(block: Any) -> BlockSites:
    attn = _first(block, "self_attn", "attention")
    attn = getattr(attn, "attention", attn)  # DINOv2 and ViT up to 5.17
    query, key = _first(attn, *QUERY), _first(attn, *KEY)
    norm2 = _first(block, "layer_norm2", "norm2", "layernorm_after")
    mlp = _first(block, "mlp", "intermediate")
    norms = {n for n, m in attn.named_children() if "norm" in type(m).__name__.lower()}
    known = norms <= {"q_norm", "k_norm"}
    if not known or any(part is None for part in (attn, query, key, norm2, mlp)):
        raise UnsupportedError(
            f"{type(block).__name__} has other parts than in the releases of transformers that vtc "
            f"knows; {way_out()}"
        )
    heads = _first(attn, "num_heads", "num_attention_heads")
    return BlockSites(
        module=block,
        attn=attn,
        norm2=norm2,
        mlp=mlp,
        heads=heads,
        scale=(query.out_features // heads) ** -0.5,
        query=partial(_project, attn, QUERY, _first(attn, "q_norm"), heads),
        key=partial(_project, attn, KEY, _first(attn, "k_norm"), heads),
        bias=_bias if _takes_mask(attn) else None,
        key_source=_first(attn, "k_norm") or key,
        split=partial(_split, heads),
        masked=_masked if is_a(block, *NATIVE) else None,
    )


def _interpolate(call: Call) -> Call:
    args, kwargs = call
    return args, {**kwargs, "interpolate_pos_encoding": True}


def _same(call: Call) -> Call:
    """DINOv2 and InternVL interpolate their position tables by themselves."""
    return call


def locate(model: Any) -> VisionSites | None:
    """Sites of a Hugging Face vision encoder or dual encoder, None for any other model."""
    if not is_a(model, "transformers.modeling_utils.PreTrainedModel"):
        return None
    found = _tower(model)
    if found is None and is_a(model, *TOWERS):
        raise moved(
            type(model).__name__,
            "no encoder.layers (or layer) beside embeddings",
            "adapters/hf_vision.py",
        )
    if found is None or not is_a(found[1][0], *BLOCKS):
        return None
    tower, blocks = found
    config: Any = tower.config
    family = next(name for name in BLOCKS if is_a(blocks[0], name))
    pool = "mean" if is_a(model, *MEAN_HEADS) else BLOCKS[family]
    if pool == "map" and getattr(tower, "head", None) is None:
        pool = "none"
    native = family in NATIVE
    has_cls = "Siglip" not in family and not native
    own = "Dinov2" in family or "InternVL" in family  # interpolate position tables by themselves
    patch = config.patch_size
    if not isinstance(patch, int):
        if len(set(patch)) > 1:
            raise UnsupportedError(f"patches of {patch} pixels; only square ones work")
        patch = patch[0]
    return VisionSites(
        tower=tower,
        blocks=[_block(block) for block in blocks],
        prefix=has_cls + getattr(config, "num_register_tokens", 0),
        has_cls=has_cls,
        patch=patch,
        pool=pool,
        width=config.hidden_size,
        mlp_width=mlp_width(_first(blocks[0], "mlp", "intermediate")),
        resize=None if native else _same if own else _interpolate,
        whole="its mask of padding is made for all patches" if native else "",
    )
