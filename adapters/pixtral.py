# SPDX-License-Identifier: Apache-2.0
"""Hugging Face's Pixtral tower: images of any size, one behind the other in one sequence."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from torch import Tensor

from .base import BlockSites, Call, VisionSites, is_a


def _rotate(attn: Any, x: Tensor, rows: slice, call: Call) -> Tensor:
    """Rotary embedding of queries or keys x (B, H, R, d) of the tokens ``rows``."""
    cos, sin = call[1]["position_embeddings"]
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb
    return rotate(x, x, cos[rows], sin[rows], unsqueeze_dim=0)[0]


def _project(attn: Any, name: str, call: Call, rows: slice) -> Tensor:
    """Queries or keys (B, H, R, d), as attention sees them."""
    args, kwargs = call
    x = (args[0] if args else kwargs["hidden_states"])[:, rows]
    y = getattr(attn, name)(x).unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    return _rotate(attn, y, rows, call)


def _split(attn: Any, keys: Tensor, call: Call) -> Tensor:
    """The output of k_proj (B, T, C), rotated."""
    y = keys.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)
    return _rotate(attn, y, slice(None), call)


def _block(block: Any) -> BlockSites:
    attn = block.attention
    return BlockSites(
        module=block,
        attn=attn,
        norm2=block.ffn_norm,
        mlp=block.feed_forward,
        heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        query=partial(_project, attn, "q_proj"),
        key=partial(_project, attn, "k_proj"),
        bias=None,
        key_source=attn.k_proj,
        split=partial(_split, attn),
    )


def locate(model: Any) -> VisionSites | None:
    """Sites of a Pixtral tower, None for any other model."""
    if not is_a(model, "PixtralVisionModel"):
        return None
    config = model.config
    return VisionSites(
        tower=model,
        blocks=[_block(block) for block in model.transformer.layers],
        prefix=0,
        has_cls=False,
        patch=config.patch_size,
        pool="none",
        width=config.hidden_size,
        mlp_width=config.intermediate_size,
        whole="the tokens of all images are one sequence in a Pixtral tower",
    )
