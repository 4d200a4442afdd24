# SPDX-License-Identifier: Apache-2.0
"""Tokens of several images of different sizes, one after another."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...budgets import apportion
from ...layouts import CropLayout, Region
from ...method import Method, split_answer
from ...reduction import Reduction
from ...views.features import FeaturesView
from ...views.projections import How, fold
from ..encoding import History
from ..finite import Finite
from ..record import Packed
from .reductions import apply_method


@dataclass
class FlatTokens:
    """Tokens of several images of different sizes, one after another, for rectangular views.

    M tokens entered the features stage, K are left.

    Attributes:
        features: (K, C); size: (K,) patches behind each; projected: (K, D) or None.
        notes: each method's named tensors (K, ...).
        lift: what the encoder has of its tokens, (B, T, ...), on the M tokens; where several of
            them are behind one of the M, their sum or mean.
        regions: what methods see as images; region: (M,) which of them, in ascending order of place
            (M,) in its grid. The same of whole images: image, order.
        totals: patches of each image in the prompt.
        layouts: of each image, where images have crops.
        frames: whether the images are videos, and the regions of each its frames in order.
        common: arguments that all views share.
        finite: what looks at the tokens that methods choose among.
    """

    features: Tensor
    size: Tensor
    notes: list[dict[str, Tensor]]
    lift: Callable[[Tensor, How], Tensor]
    regions: list[Region]
    region: Tensor
    place: Tensor
    image: Tensor
    order: Tensor
    totals: list[int]
    common: dict[str, Any]
    finite: Finite
    projected: Tensor | None = None
    layouts: list[CropLayout] | None = None
    frames: bool = False
    reduction: Reduction | None = None  # (1, M)
    reprojected: int = 0
    memo: dict[Any, Tensor] = field(default_factory=dict)
    ranked: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)  # as in `Packed`

    def outcome(self, layouts: list[Any], history: History) -> Packed:
        """What became of the tokens, without the tokens."""
        return Packed(layouts, history, self.image, self.order, self.reduction, self.ranked)

    @functools.cached_property
    def regions_of(self) -> list[list[int]]:
        """The regions of each image."""
        out: list[list[int]] = [[] for _ in self.totals]
        for r, region in enumerate(self.regions):
            out[region.image].append(r)
        return out

    @property
    def keep(self) -> Tensor:
        """(K,) which of the M tokens are left, ascending."""
        if self.reduction is None:
            return torch.arange(len(self.region), device=self.region.device)
        return self.reduction.keep[0]

    def _arrange(self, index: Tensor) -> Callable[[Any, How, Callable[[], Tensor]], Tensor]:
        """How a view at ``index`` (B, N) of the K tokens gets what it asks of the encoder."""
        memo, reduction = self.memo, self.reduction

        def arrange(what: Any, how: How, compute: Callable[[], Tensor]) -> Tensor:
            if what not in memo:
                memo[what] = fold(reduction, self.lift(compute(), how)[None], how)[0]
            return memo[what][index]

        return arrange

    def _joint(self, m: Method) -> bool:
        """Whether the method sees an image as a whole, where it has several regions."""
        return m.joint and (self.layouts is not None or self.frames)

    def _groups(self, m: Method) -> Iterator[tuple[Tensor, Region, int]]:
        """Views for a method: index (B, N) of the K tokens, one of their regions, their budget."""
        joint = self._joint(m)
        of = (self.image if joint else self.region)[self.keep]
        units = len(self.totals) if joint else len(self.regions)
        counts = torch.bincount(of, minlength=units).tolist()
        parts = of.argsort(stable=True).split(counts)
        last = not m.stages & {"decoder", "bypass", "cache"}
        same: dict[Any, list[int]] = {}
        for i, total in enumerate(self.totals):
            mine = [i] if joint else self.regions_of[i]
            grid = self.regions[mine[0]].grid if len(mine) == 1 and not joint else None
            caps = [counts[r] for r in mine]
            weights = [len(self.regions[r].patches) for r in mine]
            shares = apportion(m.budget(total, grid), weights, caps)
            for r, share in zip(mine, shares, strict=True):
                if counts[r] == 0 or (share == 0 and m.has_budget and last):
                    continue
                key = r if joint else (self.regions[r].grid, self.regions[r].blended)
                same.setdefault((key, counts[r], max(share, 1)), []).append(r)
        for (_, _, share), rows in same.items():
            region = self.regions[self.regions_of[rows[0]][0] if joint else rows[0]]
            yield torch.stack([parts[r] for r in rows]), region, share

    def ask(self, j: int, m: Method) -> None:
        """The features stage of method j on all regions."""
        keep, note = self.keep, self.notes[j]
        target = torch.full_like(keep, -1)
        new = {"features": self.features.clone(), "size": self.size.clone()}
        if self.projected is not None:
            new["projected"] = self.projected.clone()
        written: dict[str, Tensor] = {}
        ranked: list[tuple[Tensor, Tensor, Tensor]] = []
        joint = self._joint(m)
        place = (self.order if joint else self.place)[keep]
        of, part = self.image[keep], self.region[keep]
        for index, region, share in self._groups(m):
            layout = self.layouts[region.image] if joint and self.layouts is not None else None
            frame, frames = None, None
            if joint and self.frames:
                mine = self.regions_of[region.image]
                frame, frames = part[index] - mine[0], len(mine)
            view = FeaturesView(
                features=self.features[index],
                size=self.size[index],
                index=place[index],
                total=self.totals[region.image] if joint else prod(region.grid),
                grid=region.grid,
                scratch={name: x[index] for name, x in note.items()},
                crops=layout,
                frame=frame,
                frames=frames,
                image=of[index[:, 0]],
                images=len(self.totals),
                share=share,
                packed=None if self.projected is None else self.projected[index],
                arrange=self._arrange(index),
                **self.common,
            )
            reduction, tokens = split_answer(
                self.finite.ask(m.on_features, view, m.name, "features")
            )
            for name, x in view.scratch.items():
                if name not in written:
                    written[name] = x.new_zeros(len(keep), *x.shape[2:])
                written[name][index] = x
            if reduction is None:
                target[index] = index
                continue
            if reduction.scores is not None:
                ranked.append((keep, index, reduction.scores))
            kept = index.gather(1, reduction.keep)
            group = reduction.group
            target[index] = kept.gather(1, group.clamp(min=0)).where(group >= 0, -1)
            x, size = apply_method(m, reduction, view.features, view.size, tokens)
            real = slice(None) if reduction.valid is None else reduction.valid
            new["features"][kept[real]] = x[real]
            new["size"][kept[real]] = size[real]
            if self.projected is not None and (m.merges or tokens is not None):
                blended = region.blended or (layout is not None and layout.resampled)
                if tokens is None and blended:  # the projector ran before the blending
                    y = apply_method(m, reduction, view.projected, view.size, None)[0]
                else:
                    y = view.projector(x).to(self.projected.dtype)
                    self.reprojected += y.shape[0] * y.shape[1]
                new["projected"][kept[real]] = y[real]
        self.notes[j] = written
        self.ranked = ranked or self.ranked
        self._advance(Reduction.from_merge(target[None]), new)

    def _advance(self, reduction: Reduction, new: dict[str, Tensor]) -> None:
        if reduction.count == reduction.source_count:
            return
        kept = reduction.keep[0]
        for name, x in new.items():
            setattr(self, name, x[kept])
        self.notes = [{name: x[kept] for name, x in note.items()} for note in self.notes]
        self.reduction = reduction if self.reduction is None else self.reduction.then(reduction)
        self.memo = {}
