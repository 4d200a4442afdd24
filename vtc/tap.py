# SPDX-License-Identifier: Apache-2.0
"""Attention rows without attention maps: a tap in Hugging Face's attention interface.

A tapped implementation, "vtc_sdpa" for instance, keeps references to the queries, keys and mask
that an attention module was called with and calls the stock function. Rows that a method asks for
are computed from them afterwards, for any architecture, with SDPA or FlashAttention left on.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .reduction import gather_tokens

PREFIX = "vtc_"


class Tap:
    """What the attention module of one decoder layer was last called with."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.query: Tensor | None = None
        self.key: Tensor | None = None
        self.mask: Tensor | None = None
        self.scale = 1.0
        self.sublayers: dict[str, tuple[Tensor, Tensor]] = {}

    def attention(self, rows: Tensor) -> Tensor:
        """Post-softmax attention in fp32 of the query rows (B, R) to all keys: (B, H, R, T_kv)."""
        query: Any = self.query
        key: Any = self.key
        batch, heads, q_len, dim = query.shape
        rows = rows.to(query.device)
        q = gather_tokens(query.transpose(1, 2), rows).transpose(1, 2)
        groups = heads // key.shape[1]
        q = q.reshape(batch, key.shape[1], groups * rows.shape[1], dim)
        scores = (q.float() @ key.float().transpose(-1, -2)) * self.scale
        scores = scores.reshape(batch, heads, rows.shape[1], key.shape[2])
        columns = torch.arange(key.shape[2], device=query.device)
        if self.mask is None:
            allowed = columns <= (rows + key.shape[2] - q_len)[..., None]
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        elif self.mask.dim() == 2:
            allowed = columns <= (rows + key.shape[2] - q_len)[..., None]
            allowed = allowed & self.mask[:, None, : key.shape[2]].bool()
            scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        else:
            mask = self.mask.expand(batch, -1, -1, -1)
            index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
            mask = mask.gather(2, index)
            if mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask, -torch.inf)
            else:
                scores = scores + mask.float()
        return scores.softmax(-1)


def _tapped(name: str) -> Any:
    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        tap = getattr(module, "_vtc_tap", None)
        if tap is not None:
            tap.query, tap.key, tap.mask = query, key, attention_mask
            tap.scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        if name == "eager":  # has no entry: every model file brings its own
            stock = sys.modules[type(module).__module__].eager_attention_forward
        else:
            stock = ALL_ATTENTION_FUNCTIONS[name]
        return stock(module, query, key, value, attention_mask, **kwargs)

    return attention


def install(decoder: Any, attentions: list[Any]) -> tuple[str, list[Tap]]:
    """Tap the attention of every decoder layer.

    Returns:
        The implementation name to give back to `remove`, and one `Tap` a layer.
    """
    stock = decoder.config._attn_implementation
    name = PREFIX + stock
    AttentionInterface.register(name, _tapped(stock))
    # Without a mask function of the same name, padding would silently be ignored.
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    decoder.set_attn_implementation(name)
    taps = []
    for module in attentions:
        taps.append(Tap())
        module._vtc_tap = taps[-1]
    return stock, taps


def remove(decoder: Any, attentions: list[Any], stock: str) -> None:
    """Undo `install`."""
    decoder.set_attn_implementation(stock)
    for module in attentions:
        del module._vtc_tap
