# SPDX-License-Identifier: Apache-2.0
"""The view of one layer of the KV cache."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..kernels.attention_reduce import column_sums
from .projections import Watched


@dataclass
class CacheView:
    """One layer of the KV cache.

    Attributes:
        keys, values: (B, H_kv, P, d) of the P physical slots.
        visual: (B, P) bool; valid: (B, P) bool, None when no slot is padding.
        layer: 0-based; depth: number of layers; step: 0 after prefill, then decoded tokens so far.
        budget: visual slots that the method would keep in each row, (B,) int64.
        scratch: this method's named tensors (B, P, ...), kept on the cache layer; slots decoded
            since hold zeros.
        reaches_end: (B, P) bool, tokens that also entered the last LLM layer (in `on_cache` only).
        peers: this method's scratch on every layer (in `on_cache` only).
    """

    keys: Tensor
    values: Tensor
    visual: Tensor
    valid: Tensor | None
    layer: int
    depth: int
    step: int
    budget: Tensor
    tap: Any = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    reaches_end: Tensor | None = None
    peers: list[dict[str, Tensor]] = field(default_factory=list)

    @property
    def watched(self) -> Watched:
        """Of a packed layer, what is not packed yet: the last slots."""
        parts = {"keys": self.keys.transpose(1, 2), "values": self.values.transpose(1, 2)}
        first = self.visual.shape[1] - self.keys.shape[2]
        return parts, None if self.valid is None else self.valid[:, first:]

    @property
    def queries(self) -> int:
        """Query rows of this forward; they stand at the end of the slots."""
        return self.tap.query.shape[2]

    def attention(self, rows: Tensor) -> Tensor:
        """(B, H, R, P) attention in fp32 of this forward's query rows (B, R); `note_cache` only."""
        return self.tap.attention(rows)

    def attention_received(self, chunk: int = 256) -> Tensor:
        """(B, P) attention each slot gets from all query rows, mean over heads, summed over rows.

        Padding rows do not count. In `note_cache` only.
        """
        n = self.queries
        if self.tap.mask is None and self.valid is None:  # causal, every row and slot counts
            q, k = self.tap.query, self.tap.key
            return column_sums(q, k, scale=self.tap.scale, causal=True).mean(1)
        rows = torch.arange(n, device=self.keys.device).expand(self.keys.shape[0], -1)
        real = None if self.valid is None else self.valid[:, -n:]
        total: Any = 0.0
        for i in range(0, n, chunk):
            part = self.attention(rows[:, i : i + chunk]).mean(1)
            if real is not None:
                part = part.where(real[:, i : i + chunk, None], 0.0)
            total = total + part.sum(1)
        return total
