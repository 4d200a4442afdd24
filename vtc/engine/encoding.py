# SPDX-License-Identifier: Apache-2.0
"""The state of one forward through the encoder: which tokens are left of its images."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..reduction import Reduction
from ..views.projections import Projections


def without_prefix(reduction: Reduction, prefix: int) -> Reduction:
    """The patches' part of a reduction of prefix and patch tokens."""
    valid = reduction.valid
    return Reduction(
        (reduction.keep[:, prefix:] - prefix).clamp(min=0),  # padding slots stand at token 0
        (reduction.group[:, prefix:] - prefix).clamp(min=-1),
        None if valid is None else valid[:, prefix:],
        reduction.scores,
    )


@dataclass(frozen=True)
class History:
    """What an encoder did to the tokens of its images.

    Attributes:
        images, grid, prefix, blocks, pixels: as in `VisionState`.
        steps: each reduction of the tokens, prefix included, and its block; None behind the last.
    """

    images: int
    grid: tuple[int, int]
    prefix: int
    blocks: int
    pixels: Reduction | None
    steps: list[tuple[int | None, Reduction]]


@dataclass
class VisionState:
    """What one forward of the encoder has done so far; the last one stays readable.

    Attributes:
        images: number of images; grid: (rows, columns) of patches of the pixels as they came in.
        entered: tokens that entered the first block, prefix included.
        prefix, blocks: prefix tokens and number of blocks of the encoder.
        pixels: from the patches of the full grid to those of the resized image, None without.
        tokens: from the tokens that entered the first block to those left; None while all are.
        sizes: (B, T) patches behind each token, prefix included.
        notes: for each method its named tensors.
    """

    images: int
    grid: tuple[int, int]
    entered: int
    prefix: int
    blocks: int
    sizes: Tensor
    notes: list[dict[str, Tensor]]
    pixels: Reduction | None = None
    tokens: Reduction | None = None
    left: dict[int, int] = field(default_factory=dict)
    projections: dict[int, Projections] = field(default_factory=dict)
    encoded: bool = False  # through all blocks: from here on they are called on their own
    projected: bool = False  # so is the projector
    pending: tuple[Reduction, Tensor | None] | None = None
    merged: bool = False
    unpacked: Tensor | None = None  # features before projector and packing, where crops are packed
    reprojected: int = 0  # tokens that the projector saw again after packing
    past_blocks: bool = False  # notes no longer hold rows for the prefix tokens
    steps: list[tuple[int | None, Reduction]] = field(default_factory=list)  # as in `History`

    @property
    def counts(self) -> list[int]:
        """Tokens after each block, prefix included."""
        counts, now = [], self.entered
        for i in range(self.blocks):
            now = self.left.get(i, now)
            counts.append(now)
        return counts

    @property
    def reduction(self) -> Reduction | None:
        """From the patches of the full grid, (images, N), to those left; None if all are left."""
        if self.tokens is None:
            return self.pixels
        tokens = without_prefix(self.tokens, self.prefix)
        return tokens if self.pixels is None else self.pixels.then(tokens)

    @property
    def size(self) -> Tensor:
        """(images, K) patches behind each token that is left."""
        return self.sizes[:, self.prefix :]

    @property
    def scratch(self) -> list[dict[str, Tensor]]:
        """For each method its named tensors (images, K, ...)."""
        start = 0 if self.past_blocks else self.prefix
        return [{name: x[:, start:] for name, x in note.items()} for note in self.notes]

    @property
    def history(self) -> History:
        """What is worth remembering of it."""
        return History(
            self.images, self.grid, self.prefix, self.blocks, self.pixels, list(self.steps)
        )

    def follow(self, device: torch.device) -> None:
        """Move to the device of the tokens."""
        if self.sizes.device != device:  # pragma: no cover (a model over several devices)
            self.sizes = self.sizes.to(device)
            self.tokens = None if self.tokens is None else self.tokens.to(device)
            self.pixels = None if self.pixels is None else self.pixels.to(device)
            self.notes = [{name: x.to(device) for name, x in note.items()} for note in self.notes]

    def advance(self, reduction: Reduction, sizes: Tensor, block: int | None) -> None:
        """Record a reduction of the tokens, prefix included, that are left now."""
        self.steps.append((block, reduction))
        self.tokens = reduction if self.tokens is None else self.tokens.then(reduction)
        self.sizes = sizes
        for p in self.projections.values():
            p.later = reduction if p.later is None else p.later.then(reduction)
        patches = without_prefix(reduction, self.prefix) if self.past_blocks else reduction
        for note in self.notes:
            for name, x in note.items():
                note[name] = patches.select(x)
