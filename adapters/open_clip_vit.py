# SPDX-License-Identifier: Apache-2.0
"""open_clip: its own `VisionTransformer`, alone or as the visual tower of a CLIP model."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnsupportedError
from . import timm_vit
from .base import BlockSites, Call, VisionSites, is_a, mlp_width

QUERY, KEY = 0, 1


def _weights(attn: Any, part: int) -> tuple[Tensor, Tensor | None]:
    """Rows of the joint projection, (C, C), and its bias (C,)."""
    bias = attn.in_proj_bias
    return attn.in_proj_weight.chunk(3)[part], None if bias is None else bias.chunk(3)[part]


def _project(attn: Any, part: int, call: Call, rows: slice) -> Tensor:
    """Queries or keys (B, H, R, d), as attention sees them."""
    y = F.linear(call[0][0][:, rows], *_weights(attn, part))
    y = y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    norm = getattr(attn, ("ln_q", "ln_k")[part], None)
    return y if norm is None else norm(y)


def _key_mean(attn: Any, call: Call) -> Tensor:
    """(B, T, d) head-averaged keys, by way of a head-averaged projection."""
    weight, bias = _weights(attn, KEY)
    weight = weight.unflatten(0, (attn.num_heads, -1)).mean(0)
    bias = None if bias is None else bias.unflatten(0, (attn.num_heads, -1)).mean(0)
    return F.linear(call[0][0], weight, bias)


def _bias_torch(call: Call, bias: Tensor) -> Call:
    """`nn.MultiheadAttention`: a float padding mask is added to the scores."""
    args, kwargs = call
    bias = bias.to(args[0].dtype)
    mask = kwargs.get("key_padding_mask")
    return args, {**kwargs, "key_padding_mask": bias if mask is None else mask + bias}


def _bias_own(call: Call, bias: Tensor) -> Call:
    """open_clip's own attention."""
    args, kwargs = call
    bias = bias[:, None, None, :].to(args[0].dtype)
    mask = kwargs.get("attn_mask")
    return args, {**kwargs, "attn_mask": bias if mask is None else mask + bias}


def _block(block: Any) -> BlockSites:
    attn: Any = getattr(block, "attn", None)
    torch_attention = isinstance(attn, nn.MultiheadAttention)
    plain = is_a(block, "ResidualAttentionBlock") and torch_attention
    custom = is_a(block, "CustomResidualAttentionBlock") and not getattr(
        attn, "scaled_cosine", False
    )
    if not (plain or custom) or (torch_attention and not attn.batch_first):
        raise UnsupportedError(
            f"open_clip blocks of type {type(block).__name__} work if they are batch_first and "
            "without scaled cosine attention"
        )
    head_dim = block.ln_1.normalized_shape[0] // attn.num_heads
    return BlockSites(
        module=block,
        attn=attn,
        norm2=block.ln_2,
        mlp=block.mlp,
        heads=attn.num_heads,
        scale=head_dim**-0.5,
        query=partial(_project, attn, QUERY),
        key=partial(_project, attn, KEY),
        bias=_bias_torch if torch_attention else _bias_own,
        key_mean=partial(_key_mean, attn) if torch_attention else None,
    )


def _pool(tower: Any) -> str:
    if tower.attn_pool is not None:
        return "map"
    return {"tok": "cls", "avg": "mean"}.get(tower.pool_type, "none")


def locate(model: Any) -> VisionSites | None:
    """Sites of an open_clip model or its visual tower, None for any other model.

    Raises:
        UnsupportedError: the tower is open_clip's but its blocks are unusual.
    """
    tower = model
    if type(model).__module__.startswith("open_clip.") and hasattr(model, "visual"):
        tower = model.visual
    if is_a(tower, "open_clip.timm_model.TimmModel"):
        return timm_vit.locate(tower.trunk)
    if not is_a(tower, "open_clip.transformer.VisionTransformer"):
        return None
    height, width = tower.patch_size
    if height != width:
        raise UnsupportedError(f"patches of {height} x {width} pixels; only square ones work")
    return VisionSites(
        tower=tower,
        blocks=[_block(block) for block in tower.transformer.resblocks],
        prefix=1,
        has_cls=True,
        patch=height,
        pool=_pool(tower),
        width=tower.conv1.out_channels,
        mlp_width=mlp_width(tower.transformer.resblocks[0].mlp),
        entry=tower.conv1,
    )
