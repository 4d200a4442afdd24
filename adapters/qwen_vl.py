# SPDX-License-Identifier: Apache-2.0
"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: flat towers, a merger of 2 x 2 patches, M-RoPE, DeepStack.

The tower takes the patches of all images in one sequence without a batch, ordered so that the four
patches of an LLM token follow each other; Qwen2.5-VL puts the tokens of a window together on top
of that, and back in order behind the merger. An LLM token is one square of the image, so the LLM
sees an image of h x w patches as a grid of h/2 x w/2 tokens in raster order. A video is as many
grids as it has pairs of frames, each attending to itself alone; Qwen3-VL's prompts put time stamps
between them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .base import BlockSites, Call, GridSites, Sites, VisionSites, language_sites, mlp_width

FAMILIES = {
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL MoE",
}

QUERY, KEY = 0, 1


def _project(attn: Any, part: int, call: Call, rows: slice) -> Tensor:
    """Queries or keys (1, H, R, d) of the flat sequence, rotary embedding included."""
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


def _windows(edge: int, side: int) -> list[slice]:
    """Stretches of ``side`` along an edge; the last may be shorter."""
    return [slice(i, min(i + side, edge)) for i in range(0, edge, side)]


def _window_order(side: int, fold: int, name: str, call: dict[str, Any]) -> Tensor:
    """(T,) where each patch lies when windows of side x side groups follow each other."""
    order, start = [], 0
    for height, width in [grid for image in _grids(name, call) for grid in image]:
        rows, columns = height // fold, width // fold
        index = torch.arange(rows * columns).reshape(rows, columns)
        windows = [
            index[y, x].flatten() for y in _windows(rows, side) for x in _windows(columns, side)
        ]
        order.append(torch.cat(windows).argsort() + start)
        start += rows * columns
    area = fold**2
    return (torch.cat(order)[:, None] * area + torch.arange(area)).flatten()


def _grids(name: str, call: dict[str, Any]) -> list[list[tuple[int, int]]]:
    """A grid for each frame; two frames of a video share one, as the tower embeds them together."""
    return [[(h, w)] * t for t, h, w in call[name].tolist()]


def _merge(merger: Any, x: Tensor) -> Tensor:
    """Project joined patches by the merger."""
    if hasattr(merger, "mlp"):
        return merger.mlp.forward(x)
    return merger.linear_fc2(merger.act_fn(merger.linear_fc1.forward(x)))


def _nearest(full: list[int], block: int) -> int:
    """The block of full attention nearest to one, the later of two."""
    return min(full, key=lambda j: (abs(block - j), -j), default=block)


def _attended(side: int, fold: int, full: list[int], grid: tuple[int, int], i: int) -> list[int]:
    if i in full:
        return [grid[0] * grid[1]]
    rows, columns = (_windows(edge // fold, side) for edge in grid)
    return [(y.stop - y.start) * (x.stop - x.start) * fold**2 for y in rows for x in columns]


def grid_sites(tower: Any, name: str) -> GridSites:
    """Sites of the merger: `PatchMerger` with an ``mlp``, or with its layers spelled out.

    Args:
        name: of the argument that holds times, rows and columns of patches.
    """
    merger: Any = tower.merger
    fold, depth = tower.spatial_merge_size, len(tower.blocks)
    full = list(getattr(tower, "fullatt_block_indexes", range(depth)))
    windowed = len(full) < depth
    side = tower.window_size // fold // tower.patch_size if windowed else 0
    mergers = [merger, *getattr(tower, "deepstack_merger_list", ())]
    matrices = [m for part in mergers for m in part.modules() if isinstance(m, nn.Linear)]

    return GridSites(
        images=partial(_grids, name),
        source=merger.mlp if hasattr(merger, "mlp") else merger.linear_fc1,
        project=partial(_merge, merger),
        fold=fold,
        grouped=True,
        packed=True,
        order=partial(_window_order, side, fold, name) if windowed else None,
        whole=partial(_nearest, full) if windowed else None,
        attended=partial(_attended, side, fold, full),
        weights=sum(m.weight.numel() for m in matrices),
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
    )
    last = len(vision.blocks) - 1
    sites = language_sites(model, base, base.language_model, tower.merger, last, None)
    sites = replace(
        sites,
        grids=grid_sites(tower, "image_grid_thw"),
        video=True,
        videos=grid_sites(tower, "video_grid_thw"),
        video_ids=(config.video_token_id,),
        mrope=True,
        delimited=True,
    )
    if hasattr(text, "num_experts_per_tok"):
        sites = replace(sites, mlp_width=text.moe_intermediate_size * text.num_experts_per_tok)
    return Sites(family, vision, sites)
