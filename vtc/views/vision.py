# SPDX-License-Identifier: Apache-2.0
"""The view inside the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..errors import UnsupportedError
from .projections import Projections, Watched, cached_property


@dataclass
class VisionView:
    """Inside one encoder block. T counts prefix tokens ([CLS], distillation, registers) too.

    Attributes:
        x: (B, T, C) hidden states, after the attention residual or at the block's output.
        layer: 0-based block index; depth: number of blocks whose output matters to the model.
        prefix: tokens in front that must survive; has_cls: the first of them is a class token.
        size: (B, T) patches behind each token.
        total: patches of the full grid; grid: (rows, columns).
        scratch: this method's named tensors (B, T, ...), gathered with the survivors.
        places: (B, N) patch of the full grid each patch token stands at; None while all are there.
        valid: (B, T) bool, False on padding where images keep different numbers; None if none does.
    """

    x: Tensor
    layer: int
    depth: int
    prefix: int
    has_cls: bool
    size: Tensor
    total: int
    grid: tuple[int, int]
    projections: Projections
    scratch: dict[str, Tensor] = field(default_factory=dict)
    places: Tensor | None = None
    valid: Tensor | None = None

    @property
    def watched(self) -> Watched:
        return {"tokens": self.x}, self.valid

    @property
    def count(self) -> int:
        """Patch tokens now, without the prefix."""
        return self.x.shape[1] - self.prefix

    @property
    def index(self) -> Tensor:
        """(B, N) patch of the full grid that each patch token stands at."""
        if self.places is not None:
            return self.places
        return torch.arange(self.count, device=self.x.device).expand(len(self.x), -1)

    def in_sequence(self, index: Tensor) -> Tensor:
        """(B, prefix + K) places in the sequence: the prefix, then patches (B, K); -1 stays -1."""
        front = torch.arange(self.prefix, device=index.device).expand(len(index), -1)
        return torch.cat([front, index + self.prefix * (index >= 0)], 1)

    @cached_property
    def key(self) -> Tensor:
        """(B, H, T, d) keys of this block, as attention sees them."""
        return self.projections.fold(self.projections.key().transpose(1, 2), "mean").transpose(1, 2)

    @cached_property
    def key_mean(self) -> Tensor:
        """(B, T, d) keys averaged over heads."""
        return self.projections.fold(self.projections.key_mean(), "mean")

    @cached_property
    def attention(self) -> Tensor:
        """(B, H, T, T) attention of this block, fp32."""
        return self.projections.folded_attention()

    @cached_property
    def cls_attention(self) -> Tensor:
        """(B, H, T) attention row of the class token, fp32, prefix columns included."""
        if not self.has_cls:
            raise UnsupportedError("this encoder has no [CLS] token")
        row = self.projections.attention(slice(0, 1))[:, :, 0]
        return self.projections.fold(row.transpose(1, 2), "sum").transpose(1, 2)
