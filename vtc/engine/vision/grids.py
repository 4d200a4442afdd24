# SPDX-License-Identifier: Apache-2.0
"""LLM tokens that are groups of encoder patches: the features stage behind the joining.

InternVL, Idefics3, Gemma 3, Mistral 3, Qwen-VL and their relatives join s x s patches to one LLM
token, by pixel shuffle, pooling or a learned merger. Methods see what goes into the rest of the
projector, one row for each LLM token; what the encoder knows of patches is brought to the tokens:
attention to a group is summed, its keys are averaged. Dropped tokens become rows of NaN in the
features, which the LLM engine drops, as everywhere.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...adapters.base import GridSites, Sites
from ...errors import UnsupportedError
from ...hooks.per_thread import PerThread
from ...layouts import GridLayout, Region
from ...views.projections import How, Projections
from .flat import FlatTokens
from .image_features import PackedEngine


def groups(patches: tuple[int, int], fold: int, grouped: bool) -> Tensor:
    """(n, fold * fold) patches, by place in the encoder's sequence, of each token of a grid.

    Args:
        patches: (rows, columns) of the grid's patches; what is left over belongs to no token.
        grouped: the sequence holds group behind group, else all patches in raster order.
    """
    rows, columns = (edge // fold for edge in patches)
    if grouped:
        return torch.arange(rows * columns * fold * fold).reshape(-1, fold * fold)
    index = torch.arange(prod(patches)).reshape(patches)[: rows * fold, : columns * fold]
    index = index.reshape(rows, fold, columns, fold).transpose(1, 2)
    return index.reshape(rows * columns, fold * fold)


def shrunk(grid: tuple[int, int], to: tuple[int, int], x: Tensor, how: How) -> Tensor:
    """x (B, rows * columns, ...) of B grids, resized bilinearly as (B * rows' * columns', ...)."""
    square = x.reshape(len(x), *grid, -1).permute(0, 3, 1, 2)
    small = F.interpolate(square, to, mode="bilinear").permute(0, 2, 3, 1)
    small = small.reshape(-1, *x.shape[2:])
    return small * (prod(grid) / prod(to)) if how == "sum" else small


class GridEngine(PackedEngine):
    """The features stage on a model that joins patches to tokens (`GridSites`)."""

    call: PerThread[dict[str, Any]] = PerThread(dict)  # arguments of the last call

    def __init__(self, sites: Sites, *given: Any) -> None:
        super().__init__(sites, *given)
        llm: Any = sites.decoder
        self.grids: GridSites = llm.videos if self.modality == "video" else llm.grids

    def _layouts(self, call: dict[str, Any]) -> list[GridLayout]:
        self.call, layouts = call, []
        shrink = self.grids.shrink or (lambda edge: edge // self.grids.fold)
        for image in self.grids.images(call):
            tokens = tuple((shrink(rows), shrink(columns)) for rows, columns in image)
            newlines, video = self.grids.newlines, self.modality == "video"
            layouts.append(GridLayout(tuple(image), tokens, newlines, video))
        return layouts

    def _describe(self, layouts: list[GridLayout]) -> None:
        self.record.grids = layouts
        self.record.grid = layouts[0].grids[0] if layouts else None

    def _flatten(
        self, st: Any, packed: Tensor, layouts: list[GridLayout]
    ) -> tuple[FlatTokens, Tensor, Tensor]:
        device, sites = packed.device, self.grids
        ordered = sites.order(self.call) if sites.order is not None and sites.packed else None
        lift = self._lift(layouts, ordered, device)
        features = st.unpacked
        if sites.shrink is not None:
            features = lift(features, "mean")
        features = features.reshape(-1, features.shape[-1]).to(device)
        tokens = sum(layout.tokens for layout in layouts)
        # Up to 5.12 the newline behind a video comes later.
        newlines = sites.newlines if len(packed) > tokens else 0
        if not len(features) == tokens == len(packed) - newlines * len(layouts):
            raise UnsupportedError(
                f"{type(sites.source).__name__} got {len(features)} rows where the images have "
                f"{tokens} tokens and {len(packed)} rows go to the "
                "LLM: features of several encoder layers, or tokens that are joined otherwise, "
                "are not supported"
            )
        regions: list[Region] = []
        parts, images = [], []
        for i, layout in enumerate(layouts):
            start = 0
            for grid in layout.grids:
                index = torch.arange(start, start + prod(grid))
                parts.append(torch.stack([torch.full_like(index, len(regions)), index - start]))
                regions.append(Region(i, grid, index, sites.shrink is not None))
                start += prod(grid)
            images.append(torch.stack([torch.full((start,), i), torch.arange(start)]))
        region, place = torch.cat(parts, 1).to(device)
        image, order = torch.cat(images, 1).to(device)
        if ordered is not None and sites.grouped:  # the source gets groups in the encoder's order
            area = sites.fold**2
            features = features[ordered[::area].to(device) // area]
        every = torch.arange(tokens, device=device) + image * newlines
        st.projections = self._own(st.projections, layouts)
        flat = FlatTokens(
            features=features,
            size=torch.ones(tokens, device=device),
            notes=[{} for _ in self.vision.methods],
            lift=lift,
            regions=regions,
            region=region,
            place=place,
            image=image,
            order=order,
            totals=[layout.tokens for layout in layouts],
            common=self.vision.view_arguments(st),
            finite=self.vision.finite,
            projected=packed[every],
            frames=self.modality == "video",
        )
        return flat, every, every

    def _own(self, known: dict[int, Projections], layouts: list[GridLayout]) -> Any:
        """Queries and keys that know which tokens are of one grid."""
        if not self.grids.packed:
            return known
        lengths = [prod(grid) for layout in layouts for grid in layout.patches]
        own = {i: replace(p, lengths=lengths) for i, p in known.items()}
        if self.grids.whole is not None:
            for i, p in own.items():
                nearest = self.grids.whole(i)
                p.whole = None if nearest == i else own[nearest]
        return own

    def _lift(self, layouts: list[GridLayout], ordered: Tensor | None, device: torch.device) -> Any:
        """From the encoder's patches (B, T, ...) to the M tokens.

        They are a row for each grid, or one row of all grids.
        """
        sites = self.grids
        shapes = [grid for layout in layouts for grid in layout.patches]
        if sites.shrink is not None:
            return functools.partial(shrunk, shapes[0], layouts[0].grids[0])
        known = {shape: groups(shape, sites.fold, sites.grouped) for shape in set(shapes)}
        row = torch.cat([torch.full((len(known[s]),), b) for b, s in enumerate(shapes)])
        index = torch.cat([known[s] for s in shapes])
        if sites.packed:
            index = index + torch.tensor([0, *map(prod, shapes)]).cumsum(0)[:-1][row][:, None]
            row = torch.zeros_like(row)
        if ordered is not None:
            index = ordered.cpu()[index]
        row, index = row.to(device), index.to(device)

        def lift(x: Tensor, how: How) -> Tensor:
            if sites.fold == 1:
                return x.to(device)[row, index[:, 0]]
            joined = x.to(device)[row[:, None], index]
            return joined.sum(1) if how == "sum" else joined.mean(1)

        return lift


class VideoEngine(GridEngine):
    """The features stage on the frames of videos: wraps ``base.get_video_features``."""

    modality = "video"

    def _describe(self, layouts: list[GridLayout]) -> None:
        self.record.videos = layouts
        llm: Any = self.sites.decoder
        if llm.grids is not None and layouts:
            self.record.grid = layouts[0].grids[0]

    def _part_of_video(self, pixels: Any) -> bool:
        return False

    @contextmanager
    def _telling(self, pixels: Any) -> Iterator[None]:
        taking = nullcontext() if self.vision is None else self.vision.taking(self.grids)
        with self.handoff.encoding_video(pixels), taking:
            yield

    def _check(self, layouts: list[GridLayout]) -> None:
        """Refuse methods that take tokens away before the frames' patches are joined."""
        super()._check(layouts)
        acting = [] if self.vision is None else self.vision.resizing + self.vision.inside
        if acting:
            m = acting[0][1]
            own = ", ".join(f"{k}={v!r}" for k, v in m.outside_encoder.items())
            own = own and f"give it {own}, with which it does not, or "
            raise UnsupportedError(
                f"{m.name} takes tokens away before or inside the encoder, and the model pools the "
                f"patches of each frame of a video behind it, which needs all of them; {own}use "
                f"methods that act behind the encoder: {self.vision.behind_encoder}"
            )
