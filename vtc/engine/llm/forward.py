# SPDX-License-Identifier: Apache-2.0
"""The state of one forward through the LLM: which tokens are left, and how more are dropped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels.compact_tokens import compact
from ...reduction import Reduction, gather_tokens
from ...views.decoder import DecoderView
from ..record import Tokens


@dataclass
class Bypass:
    """Tokens that go around one layer, or its attention, and come back behind it.

    Attributes:
        hidden: (B, T, D) of all tokens; index: (B, T') those that take part.
        filler: (B, T') bool, rows that take part only to keep the batch rectangular, or None.
        around: "layer" or "attention".
    """

    hidden: Tensor
    index: Tensor
    filler: Tensor | None
    around: str

    def back(self, part: Tensor, full: Tensor) -> Tensor:
        """Rows of the part (B, T', D) at their places in the full sequence (B, T, D)."""
        if self.filler is not None:
            part = part.where(~self.filler.unsqueeze(-1), gather_tokens(full, self.index))
        return full.scatter(1, self.index.unsqueeze(-1).expand_as(part), part)


@dataclass
class Forward:
    """One forward through the LLM. L logical tokens came in, T of them are still there."""

    base: int  # logical tokens in the cache before this forward
    length: int  # L
    real: Tensor  # (B, T) not padding
    visual: Tensor  # (B, T)
    image: Tensor  # (B, T) ordinal of the image in its row
    position: Tensor  # (B, T) patch index inside that image
    images: list[list[int]]  # visual tokens of each image of each row
    kinds: list[list[str]]  # of each of them, "image" or "video"
    count: int | None  # visual tokens there now where all rows have as many
    renumbers: bool  # whether later tokens take the positions of dropped ones ("compact")
    separator: Tensor | None = None  # (B, T) newlines between rows of patches, which always stay
    # (B, L) bool and for each of the first layers the rows (M, D) that DeepStack adds behind it
    deepstack: tuple[Tensor, Sequence[Tensor]] | None = None
    # (B, T) logical index in this forward; None until something is dropped
    local: Tensor | None = None
    filler: Tensor | None = None  # (B, T) dropped tokens that only keep the batch rectangular
    shift: Tensor | None = None  # (B, T) positions lost before each token, where renumbered
    lost: Tensor | None = None  # (B,) positions lost in all, behind the last token left, too
    scratch: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # (B, N, ...) by method
    memos: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # (B, ...) by method
    places: tuple[Tensor, Tensor | None] | None = None  # (B, N) columns of visual tokens, valid
    bypass: Bypass | None = None  # of the layer that runs now
    unnoted: bool = False  # whether methods took notes on some of the images only
    ran: Tensor | None = None  # `local` of the tokens that the last layer has run on
    partial: set[int] = field(default_factory=set)  # layers whose attention saw part of the tokens
    memo: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def once(self, name: str, source: Any, device: torch.device, compute: Any) -> Any:
        """What Hugging Face hands to all layers alike is gathered once between reductions."""
        if torch.compiler.is_compiling():
            return compute()
        known = self.memo.get(name)
        if (
            known is None
            or known[0] is not source
            or known[1] is not self.local
            or known[2] != device
        ):
            self.memo[name] = known = (source, self.local, device, compute())
        return known[3]

    @property
    def tokens(self) -> Tokens:
        """What is there now, for the record."""
        return Tokens(self.visual, self.image, self.position)

    def columns(self, hidden: Tensor) -> Tensor:
        """(B, T) logical column of each token of hidden (B, T, D)."""
        rows = arange(hidden) if self.local is None else self.local.to(hidden.device)
        return self.once("columns", None, hidden.device, lambda: self.base + rows)

    def visual_places(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """(B, N) columns of the visual tokens; (B, N) bool, None where all rows have N."""
        if self.places is None:  # the same until something is dropped again
            visual = self.visual.to(device)
            order = visual.long().argsort(dim=1, descending=True, stable=True)
            if self.count is not None:
                self.places = order[:, : self.count], None
            else:
                counts = visual.sum(1)
                n = int(counts.max())
                real = torch.arange(n, device=device) < counts[:, None]
                self.places = order[:, :n], None if bool(real.all()) else real
        index, valid = self.places
        return index.to(device), None if valid is None else valid.to(device)

    def drop(
        self, hidden: Tensor, view: DecoderView, reduction: Reduction, merged: Tensor | None = None
    ) -> Tensor:
        """Carry out a reduction of the N visual tokens on the sequence and all that is aligned.

        Args:
            merged: (B, K, D) new hidden states of the survivors; None to keep theirs.
        """
        if merged is not None:
            hidden = _put(hidden, view, reduction, merged.to(hidden.dtype))
        for named in self.scratch.values():
            for name, x in named.items():
                named[name] = reduction.select(x)
        n, keep = reduction.source_count, reduction.keep
        if reduction.valid is not None:
            keep = keep.where(reduction.valid, n)  # column n takes the padding slots
        alive = torch.zeros(keep.shape[0], n + 1, dtype=torch.bool, device=keep.device)
        alive = alive.scatter(1, keep, True)[:, :n]
        real, visual = self.real.to(hidden.device), view.visual
        # Where a row is short, visual_index points at other tokens behind the visual ones.
        kept = torch.zeros_like(visual).scatter(1, view.visual_index, alive) & visual
        if view.valid is None and reduction.valid is None:
            keep = ~visual | kept
            length = hidden.shape[1] - reduction.source_count + reduction.count
            order = keep.long().argsort(dim=1, descending=True, stable=True)
            index, filler = order[:, :length], None
            self.count = reduction.count
        else:
            self.count = None
            # Rows differ: as long as the longest row without its padding, padding first to fill.
            needed = real & (~visual | kept)
            needed[:, -1] |= ~visual[:, -1]  # generate() goes on from here, padding or not
            length = int(needed.sum(1).max())
            rank = (~needed).long() + (~needed & visual).long()
            index = rank.argsort(dim=1, stable=True)[:, :length].sort(dim=1).values
            filler = gather_tokens(visual & ~kept, index)
        aligned: dict[str, Tensor] = {
            "local": arange(hidden) if self.local is None else self.local,
            "visual": visual & kept,
            "real": real & (~visual | kept),
            "image": self.image,
            "position": self.position,
        }
        for name in ("separator", "filler"):
            if getattr(self, name) is not None:
                aligned[name] = getattr(self, name)
        if self.renumbers:
            lost = (visual & ~kept).long()
            gone = lost.sum(1)
            self.lost = gone if self.lost is None else gone + self.lost.to(gone.device)
            shift = lost.cumsum(1) - lost
            aligned["shift"] = shift if self.shift is None else shift + self.shift.to(hidden.device)
        hidden, *rest = compact([hidden, *(x.to(hidden.device) for x in aligned.values())], index)
        for name, x in zip(aligned, rest, strict=True):
            setattr(self, name, x)
        self.places = None
        if self.filler is not None:
            filler = self.filler if filler is None else filler | self.filler
        if filler is not None and not bool(filler.any()):
            filler = None
        self.filler = filler
        return hidden if filler is None else hidden.masked_fill(filler.unsqueeze(-1), 0)

    def reached_end(self) -> Tensor:
        """(B, logical length) bool, tokens that entered the last layer, and all of the cache."""
        batch = self.real.shape[0]
        device = self.real.device
        if self.local is None:
            return torch.ones(batch, self.base + self.length, dtype=torch.bool, device=device)
        new = torch.zeros(batch, self.length, dtype=torch.bool, device=device)
        there = (
            torch.ones_like(self.local, dtype=torch.bool) if self.filler is None else ~self.filler
        )
        new = new.scatter(1, self.local.to(device), there.to(device))
        return torch.cat([new.new_ones(batch, self.base), new], 1)


def _put(hidden: Tensor, view: DecoderView, reduction: Reduction, merged: Tensor) -> Tensor:
    """Hidden states (B, T, D) with those of the survivors (B, K, D) in their places."""
    target = view.visual_index.gather(1, reduction.keep)
    length = hidden.shape[1]
    if reduction.valid is not None:  # padding slots, which may repeat a real one, go behind
        target = target.where(reduction.valid, length)
        hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
    return hidden.scatter(1, target.unsqueeze(-1).expand_as(merged), merged)[:, :length]


def arange(hidden: Tensor) -> Tensor:
    """(B, T) places of the tokens of hidden (B, T, D)."""
    return torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)
