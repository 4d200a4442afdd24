# SPDX-License-Identifier: Apache-2.0
"""Tokens that jump over a layer and come back behind it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...reduction import gather_tokens


@dataclass
class Aside:
    """Tokens that jump over one layer, or its attention, and come back behind it.

    Attributes:
        hidden: (B, T, D) of all tokens; index: (B, T') those that take part.
        filler: (B, T') bool, rows that take part only to keep the batch rectangular, or None.
        over: what is jumped over.
    """

    hidden: Tensor
    index: Tensor
    filler: Tensor | None
    over: str

    def back(self, part: Tensor, full: Tensor) -> Tensor:
        """Rows of the part (B, T', D) at their places in the full sequence (B, T, D)."""
        if self.filler is not None:
            part = part.where(~self.filler.unsqueeze(-1), gather_tokens(full, self.index))
        return full.scatter(1, self.index.unsqueeze(-1).expand_as(part), part)
