# SPDX-License-Identifier: Apache-2.0
"""What the engines leave of the steps that take visual tokens away, and the encoder's part of it.

A record holds references to tensors that the engines have anyway, until the next forward; nothing
is copied or computed for it. What `vtc.trace` makes of them runs when somebody asks, on the CPU.
Blocks of the encoder and layers of the LLM count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .encoding import History, without_prefix
from .reduction import Reduction

if TYPE_CHECKING:
    from .crops import Packed

BEFORE = "before the LLM"


class Tokens(NamedTuple):
    """A batch of sequences: which tokens are visual, of which image of their row, and their places
    in that image; all (B, T)."""

    visual: Tensor
    image: Tensor
    position: Tensor


class Choice(NamedTuple):
    """A reduction of the N visual tokens of each row in front of an LLM layer.

    Attributes:
        image, position: (B, N) as in `Tokens`; valid: (B, N) bool, None if rows agree.
        bypass: whether the tokens that are left out come back behind the layer.
    """

    layer: int
    image: Tensor
    position: Tensor
    valid: Tensor | None
    reduction: Reduction
    bypass: bool = False


class Eviction(NamedTuple):
    """What the P slots of an LLM layer's KV cache, of logical columns (B, P), were ranked by."""

    layer: int
    columns: Tensor
    scores: Tensor


@dataclass(frozen=True)
class Stage:
    """The N visual tokens of one image at one place of the model.

    Attributes:
        label: of the place.
        owner: (N,) the token that each of them is part of there; -1 where it is gone, N and above
            where it went into a token of another image.
        scores: (N,) what they were ranked by right before, NaN where one was gone; None if nothing.
        changed: whether other tokens are there than at the stage before.
        share: (N,) of the LLM layers, those whose KV cache holds the token; at the end only.
    """

    label: str
    owner: Tensor
    scores: Tensor | None = None
    changed: bool = True
    share: Tensor | None = None

    @property
    def kept(self) -> Tensor:
        """(N,) bool, the tokens that are there."""
        return self.owner == torch.arange(len(self.owner))


def spread(n: int, ids: Tensor, values: Tensor) -> Tensor:
    """(n,) fp32: the values at ids, which are -1 where there is no token; NaN elsewhere."""
    out = torch.full((n,), torch.nan)
    out[ids[ids >= 0]] = values.float().cpu()[ids >= 0]
    return out


def owners(reduction: Reduction) -> Tensor:
    """(N,) the source token that each one is part of, of a reduction of one row; -1 if dropped."""
    group, keep = reduction.group[0], reduction.keep[0]
    return keep[group.clamp(min=0)].where(group >= 0, -1)


def moved(owner: Tensor, ids: Tensor, reduction: Reduction) -> Tensor:
    """Owners (n,) behind a reduction, of one row, of the tokens with the numbers ids (N,).

    Entries of ids that are -1 are no tokens.
    """
    into = torch.full((len(owner) + 1,), -1)
    target = owners(reduction)
    real = ids >= 0
    into[ids[real]] = ids[target.clamp(min=0)].where(target >= 0, -1)[real]
    return into[owner]  # -1 reads the last entry, which is -1


# ---- the encoder side ----------------------------------------------------------------------------


def encoded(history: History, image: int, behind: str) -> list[Stage]:
    """Stages of one image (or crop) of an encoder, over the patches of its full grid.

    Args:
        behind: label of what acts on the encoder's output.
    """
    steps = [] if history.pixels is None else [("before the encoder", history.pixels)]
    for block, step in history.steps:
        label = behind if block is None else f"encoder block {block}"
        steps.append((label, without_prefix(step, history.prefix)))
    now = Reduction.identity(1, prod(history.grid))
    done: dict[str, Stage] = {}
    for label, step in steps:
        one, scores = step.row(image), None
        if one.scores is not None:
            ids = now.keep[0] if now.valid is None else now.keep[0].where(now.valid[0], -1)
            scores = spread(now.source_count, ids, one.scores[0, -now.count :])
        elif label in done:
            scores = done[label].scores
        now = now.then(one)
        done[label] = Stage(label, owners(now), scores)
    out: list[Stage] = []
    owner = torch.arange(prod(history.grid))
    blocks = [f"encoder block {i}" for i in range(history.blocks)]
    for label in ["before the encoder", *blocks, behind]:
        if label in done:
            out.append(done[label])
            owner = out[-1].owner
        elif label in blocks:
            out.append(Stage(label, owner))
    return out


def _cropped(packed: Packed, i: int) -> list[Stage]:
    """Stages inside the encoder of an image in crops, over the patches of its layout."""
    layout, first = packed.layouts[i], sum(1 + prod(lay.crops) for lay in packed.layouts[:i])
    n, crops = prod(layout.side), 1 + prod(layout.crops)
    code = layout.crop * n + layout.place
    number = torch.full((crops * n + 1,), -1)  # of padding -1, too
    number[code] = torch.arange(len(code))
    start = (torch.arange(crops) * n)[:, None]
    out = []
    for parts in zip(*(encoded(packed.history, first + c, "") for c in range(crops)), strict=True):
        owner = torch.stack([p.owner for p in parts])
        owner = number[(owner + start).where(owner >= 0, -1).flatten()[code]]
        scores = None
        if parts[0].scores is not None:
            scores = torch.cat([p.scores for p in parts])[code]  # type: ignore[misc]
        out.append(Stage(parts[0].label, owner, scores))
    return out


def packed_stages(packed: Packed, i: int) -> list[Stage]:
    """Stages on the encoder side of one image of a model that packs them."""
    layout = packed.layouts[i]
    crops = hasattr(layout, "crops")
    out = _cropped(packed, i) if crops and not layout.resampled else []
    n = len(layout.rows) if crops else layout.tokens
    owner = out[-1].owner if out else torch.arange(n)
    if packed.image is None or packed.order is None:
        return out
    ids = packed.order.cpu().where(packed.image.cpu() == i, -1)
    ranked = packed.scores()
    scores = None if ranked is None else spread(n, ids, ranked)
    if packed.reduction is not None:
        owner = moved(owner, ids, packed.reduction.row(0))
    return [*out, Stage(BEFORE, owner, scores)]
