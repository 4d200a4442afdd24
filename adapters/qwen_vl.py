# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: packed towers, a merger of 2 x 2 patches, M-RoPE, DeepStack.

The tower takes the patches of all images in one sequence without a batch, ordered so that the four
patches of an LLM token follow each other; Qwen2.5-VL puts the tokens of a window together on top
of that, and back in order behind the merger. An LLM token is one square of the image, so the LLM
sees an image of h x w patches as a grid of h/2 x w/2 tokens in raster order.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .base import BlockSites, Call, DecoderSites, PackedSites, Sites, VisionSites, mlp_width

FAMILIES = {
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
}

QUERY, KEY = 0, 1


def _project(attn: Any, part: int, call: Call, rows: slice) -> Tensor:
    """Queries or keys (1, H, R, d) of the packed sequence, rotary embedding included."""
    args, kwargs = call
    x = (args[0] if args else kwargs["hidden_states"])[rows]
    y = attn.qkv(x).unflatten(1, (3, attn.num_heads, -1))[:, part]
    cos, sin = (table[rows] for table in kwargs["position_embeddings"])
    rotate = sys.modules[type(attn).__module__].apply_rotary_pos_emb_vision
    return rotate(y, y, cos, sin)[0].transpose(0, 1)[None]


def _block(block: Any) -> BlockSites:
    attn = block.attn
    return BlockSites(
        module=block,
        attn=attn,
        norm2=block.norm2,
        mlp=block.mlp,
        heads=attn.num_heads,
        scale=attn.head_dim**-0.5,
        query=partial(_project, attn, QUERY),
        key=partial(_project, attn, KEY),
        bias=None,
    )


def _windows(edge: int, side: int) -> list[int]:
    """Lengths of windows of ``side`` tokens along an edge; the last may be shorter."""
    return [min(side, edge - i) for i in range(0, edge, side)]


def _window_order(side: int, grids: list[tuple[int, int, int]]) -> Tensor:
    """Place of each token in raster order when tokens of a window follow each other."""
    order, start = [], 0
    for t, h, w in grids:
        index = torch.arange(t * h * w).reshape(t, h, w)
        windows = [
            index[f, y : y + side, x : x + side].flatten()
            for f in range(t)
            for y in range(0, h, side)
            for x in range(0, w, side)
        ]
        order.append(torch.cat(windows) + start)
        start += t * h * w
    return torch.cat(order).argsort()


def _packed(tower: Any) -> PackedSites:
    """Sites of the merger, `PatchMerger` with an ``mlp`` or with its layers spelled out."""
    merger: Any = tower.merger
    edge, depth = tower.spatial_merge_size, len(tower.blocks)
    full = list(getattr(tower, "fullatt_block_indexes", range(depth)))
    windowed = len(full) < depth
    side = tower.window_size // edge // tower.patch_size if windowed else 0

    def project(x: Tensor) -> Tensor:
        if hasattr(merger, "mlp"):
            return merger.mlp.forward(x)
        return merger.linear_fc2(merger.act_fn(merger.linear_fc1.forward(x)))

    def attended(grid: tuple[int, int, int], block: int) -> list[int]:
        t, h, w = grid
        if block in full:
            return [h * w * edge**2] * t
        return [y * x * edge**2 for y in _windows(h, side) for x in _windows(w, side)] * t

    return PackedSites(
        edge=edge,
        joined=merger.mlp if hasattr(merger, "mlp") else merger.linear_fc1,
        project=project,
        order=partial(_window_order, side) if windowed else lambda grids: None,
        whole=lambda i: min(full, key=lambda j: (abs(i - j), -j), default=i),
        attended=attended,
        values=tower.patch_embed.proj.weight[0].numel(),
        weights=sum(
            m.weight.numel()
            for part in (merger, getattr(tower, "deepstack_merger_list", None))
            for m in ([] if part is None else part.modules())
            if isinstance(m, nn.Linear)
        ),
    )


def locate(model: Any) -> Sites | None:
    """Sites of a Qwen2-VL, Qwen2.5-VL or Qwen3-VL model, None for any other."""
    family = FAMILIES.get(type(model).__name__)
    if family is None:
        return None
    base, config = model.model, model.config
    text, tower = config.get_text_config(), base.visual
    taps = getattr(config.vision_config, "deepstack_visual_indexes", ())
    if len(taps) >= text.num_hidden_layers:
        raise UnsupportedError(
            f"{family} adds {len(taps)} layers of image features (DeepStack) to a language model "
            f"of {text.num_hidden_layers} layers: it must have more layers than that"
        )
    mlp = tower.blocks[0].mlp
    vision = VisionSites(
        tower=tower,
        blocks=[_block(block) for block in tower.blocks],
        prefix=0,
        has_cls=False,
        patch=config.vision_config.patch_size,
        pool="none",
        width=tower.blocks[0].attn.qkv.in_features,
        # A gated MLP has three matrices where the cost model counts two.
        mlp_width=mlp_width(mlp) * 3 // 2 if hasattr(mlp, "gate_proj") else mlp_width(mlp),
        packed=_packed(tower),
    )
    heads = text.num_attention_heads
    sites = DecoderSites(
        base=base,
        decoder=base.language_model,
        projector=tower.merger,
        token_ids=(config.image_token_id,),
        tokens_per_image=None,
        feature_block=len(vision.blocks) - 1,
        hidden=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        video=True,
        mrope=True,
        delimited=True,
    )
    return Sites(family, vision, sites)
