# SPDX-License-Identifier: Apache-2.0
"""timm: `VisionTransformer` (vit, deit, dinov2, siglip, ...) and `Eva` with rotary embeddings."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnsupportedError
from ..reduction import gather_tokens
from .base import BlockSites, Call, VisionSites, is_a, mlp_width

POOLS = {"token": "cls", "map": "map", "prr": "map", "": "none"}
"""timm's names for pooling; all others ("avg", "max", ...) are means to us."""

QUERY, KEY = 0, 1


def _rotate(attn: Any, x: Tensor, rows: slice, call: Call) -> Tensor:
    """Rotary embedding of queries or keys x (B, H, R, d) of the tokens ``rows``."""
    args, kwargs = call
    rope = kwargs.get("rope", args[1] if len(args) > 1 else None)
    if rope is None:
        return x
    from timm.layers import apply_rot_embed_cat

    start, stop, _ = rows.indices(args[0].shape[1])
    prefix = attn.num_prefix_tokens
    bare = min(max(prefix - start, 0), x.shape[2])  # of these rows are prefix tokens
    table = rope[..., start + bare - prefix : stop - prefix, :]
    half = {"half": True} if getattr(attn, "rotate_half", False) else {}
    patches = apply_rot_embed_cat(x[:, :, bare:], table, **half).type_as(x)
    return torch.cat([x[:, :, :bare], patches], 2)


def _groups(attn: Any, x: Tensor) -> Tensor:
    """One key head for each query head."""
    return (
        x.repeat_interleave(attn.num_heads // x.shape[1], 1) if x.shape[1] < attn.num_heads else x
    )


def _project(attn: Any, part: int, call: Call, rows: slice) -> Tensor:
    """Queries or keys (B, H, R, d), as attention sees them."""
    x = call[0][0][:, rows]
    if attn.qkv is None:
        y = (attn.q_proj, attn.k_proj)[part](x)
    else:
        bias = attn.qkv.bias
        if bias is not None:
            bias = bias.chunk(3)[part]
        elif getattr(attn, "q_bias", None) is not None:
            bias = attn.q_bias if part == QUERY else None  # EVA: keys have none
        y = F.linear(x, attn.qkv.weight.chunk(3)[part], bias)
    y = y.unflatten(2, (-1, attn.head_dim)).transpose(1, 2)
    y = (attn.q_norm, attn.k_norm)[part](y)
    return _groups(attn, _rotate(attn, y, rows, call))


def _split(attn: Any, keys: Tensor, call: Call) -> Tensor:
    """The output of k_norm, (B, H, T, d), rotated."""
    return _groups(attn, _rotate(attn, keys, slice(None), call))


def _bias(call: Call, bias: Tensor) -> Call:
    args, kwargs = call
    bias = bias[:, None, None, :].to(args[0].dtype)
    mask = kwargs.get("attn_mask")
    return args, {**kwargs, "attn_mask": bias if mask is None else mask + bias}


def _gather(prefix: int, call: Call, keep: Tensor) -> Call:
    """Rotary tables, which start behind the prefix, of the tokens at keep (B, T')."""
    args, kwargs = call
    table = kwargs.get("rope")
    if table is None:
        return call
    index = keep[:, prefix:] - prefix
    if table.dim() == 2:  # (N, d)
        table = table[index][:, None]
    elif table.dim() == 3:  # (H, N, d)
        table = table[:, index].transpose(0, 1)
    else:  # (B, H or 1, N, d)
        table = gather_tokens(table.transpose(1, 2), index).transpose(1, 2)
    return args, {**kwargs, "rope": table}


def _block(block: Any, prefix: int) -> BlockSites:
    attn: Any = getattr(block, "attn", None)
    if not is_a(block, "Block", "EvaBlock") or not is_a(
        attn, "Attention", "EvaAttention", "AttentionRope"
    ):
        raise UnsupportedError(
            f"timm blocks of type {type(block).__name__} with {type(attn).__name__} do not follow "
            "x + attn(norm(x)), x + mlp(norm(x)); supported are Block and EvaBlock (pre-norm)"
        )
    return BlockSites(
        module=block,
        attn=attn,
        norm2=block.norm2,
        mlp=block.mlp,
        heads=attn.num_heads,
        scale=attn.scale,
        query=partial(_project, attn, QUERY),
        key=partial(_project, attn, KEY),
        bias=_bias,
        key_source=attn.k_norm,
        split=partial(_split, attn),
        gather=None if is_a(attn, "Attention") else partial(_gather, prefix),
    )


def _resize(call: Call) -> Call:
    """Nothing to do: with dynamic_img_size, timm interpolates to the grid that comes in."""
    return call


def locate(model: Any) -> VisionSites | None:
    """Sites of a timm ViT, None for any other model.

    Raises:
        UnsupportedError: its blocks are not pre-norm.
    """
    if not is_a(model, "timm.models.vision_transformer.VisionTransformer", "timm.models.eva.Eva"):
        return None
    height, width = model.patch_embed.patch_size
    if height != width:
        raise UnsupportedError(f"patches of {height} x {width} pixels; only square ones work")
    prefix = model.num_prefix_tokens
    return VisionSites(
        tower=model,
        blocks=[_block(block, prefix) for block in model.blocks],
        prefix=prefix,
        has_cls=getattr(model, "cls_token", None) is not None,
        patch=height,
        pool=POOLS.get(model.global_pool, "mean"),
        width=model.embed_dim,
        mlp_width=mlp_width(model.blocks[0].mlp),
        resize=_resize if model.dynamic_img_size else None,
        entry=model.patch_embed,
    )
