# SPDX-License-Identifier: Apache-2.0
"""Attention rows without attention maps: a tap in Hugging Face's attention interface.

A tapped implementation, "vtc_sdpa" for instance, keeps references to the queries, keys and mask
that an attention module was called with and calls the stock function. Rows that a method asks for
are computed from them afterwards, for any architecture, with SDPA or FlashAttention left on.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from ..reduction import gather_tokens
from .attention_patch import Around
from .per_thread import PerThread, Threaded

PREFIX = "vtc_"

ROTATIONS = ("rotary_pos_emb", "multimodal_rotary_pos_emb")


def partners(attn: Any) -> Tensor | None:
    """(d,) the channel that RoPE turns each channel of a head with, itself where it turns none.

    None: halves, as in Llama. Cohere and GLM turn neighbours, GLM not all of them.
    """
    rotate = getattr(sys.modules[type(attn).__module__], "rotate_half", None)
    dim = getattr(attn, "head_dim", None)
    if rotate is None or not isinstance(dim, int):
        return None
    settings = getattr(getattr(attn, "config", None), "rope_parameters", None) or {}
    turned = int(dim * settings.get("partial_rotary_factor", 1.0))
    channels = torch.arange(dim)
    pairs = rotate(torch.arange(1.0, turned + 1)).abs().long() - 1
    return torch.cat([pairs, channels[turned:]])


class Tap(Threaded):
    """Tensors that the attention module of one decoder layer was last called with.

    Attributes:
        partners: as the function of that name says.
        open: in a forward; not when a layer runs again in the backward pass.
    """

    open: PerThread[bool] = PerThread(bool)
    query: PerThread[Tensor | None] = PerThread(lambda: None)
    key: PerThread[Tensor | None] = PerThread(lambda: None)
    mask: PerThread[Tensor | None] = PerThread(lambda: None)
    scale: PerThread[float] = PerThread(float)
    sublayers: PerThread[dict[str, tuple[Tensor, Tensor]]] = PerThread(dict)

    def __init__(self, partners: Tensor | None = None) -> None:
        self.partners = partners

    def clear(self) -> None:
        """Let go of the tensors, and read no more."""
        self.open, self.query, self.key, self.mask, self.sublayers = False, None, None, None, {}

    @property
    def length(self) -> int:
        """Tokens of the forward, whose keys stand at the end."""
        return self.query.shape[2]  # type: ignore[union-attr]

    def attention(self, rows: Tensor) -> Tensor:
        """Post-softmax attention in fp32 of the query rows (B, R) to all keys: (B, H, R, T_kv)."""
        query: Any = self.query
        key: Any = self.key
        q = gather_tokens(query.transpose(1, 2), rows).transpose(1, 2)
        return attend(q, key, self.mask, rows.to(key.device), query.shape[2], self.scale)


@dataclass
class Ahead:
    """Attention rows of a layer that has not run yet, from its own weights.

    Attributes:
        attn: its attention module; x: (B, T, D) its normed input.
        tables: cos and sin, (B or 1, T, d) or (3, B or 1, T, d), for the T tokens.
        mask: what the layer will get; past: keys in its cache, (B, H_kv, P, d), or None.
    """

    attn: Any
    x: Tensor
    tables: tuple[Tensor, Tensor]
    mask: Tensor | None
    past: Tensor | None

    @property
    def length(self) -> int:
        """As `Tap.length`."""
        return self.x.shape[1]

    def attention(self, rows: Tensor) -> Tensor:
        """As `Tap.attention`."""
        rows = rows.to(self.x.device)
        every = torch.arange(self.x.shape[1], device=rows.device).expand(len(rows), -1)
        cos, sin = (take_rows(t.to(rows.device), every) for t in self.tables)
        key = self._project("k", self.x, cos, sin)
        if self.past is not None:
            key = torch.cat([self.past.to(key), key], 2)
        picked = (take_rows(t, rows) for t in (self.x, cos, sin))
        query = self._project("q", *picked)
        return attend(query, key, self.mask, rows, self.x.shape[1], self.attn.scaling)

    def _project(self, which: str, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Queries or keys (B, H, T, d) with their norm, if the model has one, and RoPE."""
        y = getattr(self.attn, which + "_proj")(x).unflatten(2, (-1, self.attn.head_dim))
        norm = getattr(self.attn, which + "_norm", None)
        y = (y if norm is None else norm(y)).transpose(1, 2)
        module: Any = sys.modules[type(self.attn).__module__]
        if cos.dim() == 4:  # pragma: no cover (Qwen2-VL up to 5.12 joins the axes here)
            section = self.attn.config.rope_parameters["mrope_section"]
            return module.apply_multimodal_rotary_pos_emb(y, y, cos, sin, section)[0]
        return module.apply_rotary_pos_emb(y, y, cos, sin)[0]

    @staticmethod
    def fits(layer: Any) -> bool:
        """Whether a decoder layer has the parts this class reads."""
        attn = getattr(layer, "self_attn", None)
        parts = ("q_proj", "k_proj", "head_dim", "scaling")
        norms = [
            n
            for n, m in getattr(attn, "_modules", {}).items()
            if "norm" in type(m).__name__.lower()
        ]
        return (
            {"q_norm", "k_norm"}.issuperset(norms)
            and hasattr(layer, "input_layernorm")
            and all(hasattr(attn, p) for p in parts)
            and any(hasattr(sys.modules[type(attn).__module__], f"apply_{r}") for r in ROTATIONS)
        )


def attend(
    q: Tensor, key: Tensor, mask: Tensor | None, rows: Tensor, q_len: int, scale: float
) -> Tensor:
    """softmax(q k^T * scale) in fp32 under the mask of a layer, (B, H, R, T_kv).

    Args:
        q: (B, H, R, d), the rows (B, R) of ``q_len`` queries; key: (B, H_kv, T_kv, d).
        mask: None (causal), (B, T_kv), or (B, 1, q_len, T_kv), bool or additive.
    """
    batch, heads, r, dim = q.shape
    q = q.reshape(batch, key.shape[1], heads // key.shape[1] * r, dim)
    scores = (q.float() @ key.float().transpose(-1, -2)) * scale
    scores = scores.reshape(batch, heads, r, key.shape[2])
    columns = torch.arange(key.shape[2], device=key.device)
    if mask is None or mask.dim() == 2:
        allowed = columns <= (rows + key.shape[2] - q_len)[..., None]
        if mask is not None:
            allowed = allowed & mask[:, None, : key.shape[2]].bool()
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
    else:
        mask = mask.expand(batch, -1, -1, -1)
        index = rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3])
        mask = mask.gather(2, index)
        if mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        else:
            scores = scores + mask.float()
    return scores.softmax(-1)


def _tapped(
    stock: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    tap = getattr(module, "_vtc_tap", None)
    if tap is not None and tap.open:
        tap.query, tap.key, tap.mask = query, key, attention_mask
        tap.scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
    return stock(module, query, key, value, attention_mask, **kwargs)


def install(attentions: list[Any]) -> tuple[list[Tap], Around]:
    """Tap these attention modules: one `Tap` for each, and what `remove` takes."""
    taps = [Tap(partners(module)) for module in attentions]
    for module, tap in zip(attentions, taps, strict=True):
        module._vtc_tap = tap
    return taps, Around(attentions, PREFIX, _tapped)


def remove(handle: Around) -> None:
    """Undo `install`."""
    handle.remove()
    for module in handle.modules:
        del module._vtc_tap


class _NoTap:
    """Stands where no attention can be read."""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            "the attention of this layer cannot be read here: before the first layer there is "
            "none, behind a layer that some tokens jumped over (a bypass method in the chain) it "
            "saw part of them, and on_cache comes after it is gone (use note_cache)"
        )


no_tap: Any = _NoTap()


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of a rotary table (..., T, d) at index (B, T'): batch on dim -3, tokens on dim -2."""
    index = index.to(x.device)
    if x.dim() == 2:
        x = x.unsqueeze(0)
    if x.dim() == 3:
        return gather_tokens(x.expand(index.shape[0], -1, -1), index)
    return torch.stack([take_rows(part, index) for part in x])
