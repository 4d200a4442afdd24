# SPDX-License-Identifier: Apache-2.0
"""Crops: where packed rows come from, and the features stage behind packing."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...adapters.base import CropSites, Sites
from ...errors import UnsupportedError
from ...layouts import CropLayout, Region
from ...views.projections import How
from .flat import FlatTokens
from .image_features import PackedEngine


def layout_of(
    sites: CropSites, size: tuple[int, int], crops: int, call: dict[str, Any]
) -> CropLayout:
    """Layout of an image of ``size`` (height, width) in ``crops`` crops, thumbnail included."""
    n = prod(sites.side)
    numbers = torch.arange(crops * n, dtype=torch.float32).reshape(crops, n, 1)
    newline = torch.full((1,), -1.0)
    packed = sites.pack(numbers, size, newline, call, True)[:, 0]
    exact = sites.pack(numbers, size, newline, call, False)[:, 0]

    def shape(rows: Tensor) -> tuple[int, int]:
        """Rows and columns of the canvas."""
        lines = (rows == -1).nonzero()[:, 0]
        return (len(lines), int(lines[0]) - n) if crops > 1 and len(lines) else (0, 0)

    canvas, full = shape(packed), shape(exact)
    source = exact[exact != -1].long()
    near = source
    if canvas != full:
        y, x = ((2 * torch.arange(m) + 1) * f // (2 * m) for m, f in zip(canvas, full, strict=True))
        near = torch.cat([source[:n], source[n:][(y[:, None] * full[1] + x).flatten()]])
    return CropLayout(
        size=size,
        side=sites.side,
        crops=sites.grid(size) if crops > 1 else (0, 0),
        canvas=canvas,
        length=len(packed),
        rows=(packed != -1).nonzero()[:, 0],
        crop=near // n,
        place=near % n,
        source=source,
        full=full,
    )


class CropEngine(PackedEngine):
    """The features stage on a model that packs crops."""

    def __init__(self, sites: Sites, *given: Any) -> None:
        super().__init__(sites, *given)
        llm: Any = sites.decoder
        self.crops: CropSites = llm.crops
        self.known: dict[Any, CropLayout] = {}

    def _describe(self, layouts: list[CropLayout]) -> None:
        self.record.layouts = layouts

    def _layouts(self, call: dict[str, Any]) -> list[CropLayout]:
        """Layouts of the images of a call, before anything is computed.

        Raises:
            UnsupportedError: a method acts inside the encoder and an image will be resampled.
        """
        if call.get("image_sizes") is None:
            raise ValueError("this model needs image_sizes, as its processor gives them")
        layouts = []
        for size, crops in self.crops.images(call):
            key = size, crops, call.get("vision_aspect_ratio")
            if key not in self.known:
                self.known[key] = layout_of(self.crops, size, crops, call)
            layouts.append(self.known[key])
        inside = [] if self.vision is None else self.vision.resizing + self.vision.inside
        large = next((layout for layout in layouts if layout.resampled), None)
        if inside and large is not None:
            height, width = large.size
            raise UnsupportedError(
                f"{inside[0][1].name} removes tokens inside the encoder, and the crops of an image "
                f"of {width} x {height} pixels are too many for this model, which would blend "
                "neighbours that are no longer there; use a method that acts behind the encoder, "
                "or a smaller image"
            )
        return layouts

    def _flatten(
        self, st: Any, packed: Tensor, layouts: list[CropLayout]
    ) -> tuple[FlatTokens, Tensor, Tensor]:
        """All patches that the encoder left; packed rows of them, and of all patches."""
        features, device = st.unpacked, packed.device
        n = prod(self.crops.side)
        # Where each patch of the encoder's grid is now, -1 where it is gone.
        slot = torch.arange(n, device=device).expand(st.images, -1)
        if st.reduction is not None:
            slot = slot.new_full((st.images, n + 1), -1)
            keep = st.reduction.keep.to(device)
            index = torch.arange(keep.shape[1], device=device).expand_as(keep)
            if st.reduction.valid is not None:
                keep = keep.where(st.reduction.valid.to(device), n)
            slot = slot.scatter(1, keep, index)[:, :n]
        sources, lists, crop, row = [], [], 0, 0
        regions: list[Region] = []
        names = ("rows", "region", "place", "image", "order")
        for i, layout in enumerate(layouts):
            source = layout.source.to(device) + crop * n
            slots = slot.flatten()[source]
            p = len(layout.rows)
            table = torch.empty(len(names), p, dtype=torch.int64)
            table[0], table[3], table[4] = layout.rows + row, i, torch.arange(p)
            for region in layout.regions(i):
                table[1, region.patches] = len(regions)
                table[2, region.patches] = torch.arange(len(region.patches))
                regions.append(region)
            sources.append((source // n, slots))
            lists.append(table)
            crop += 1 + prod(layout.crops)
            row += layout.length
        every = torch.cat([table[0] for table in lists]).to(device)
        alive = [
            torch.ones(len(lay.rows), dtype=torch.bool, device=device) if lay.resampled else s >= 0
            for lay, (_, s) in zip(layouts, sources, strict=True)
        ]
        table = torch.cat(lists, 1).to(device)[:, torch.cat(alive)]

        def lift(x: Tensor, how: How = "mean") -> Tensor:
            parts = []
            for layout, (crops, slots), there in zip(layouts, sources, alive, strict=True):
                part = x.to(device)[crops, slots.clamp(min=0)]
                parts.append(layout.lift(part) if layout.resampled else part[there])
            return torch.cat(parts)

        rows, region, place, image, order = table
        flat = FlatTokens(
            features=lift(features),
            size=lift(st.size.to(device)),
            notes=[{name: lift(x) for name, x in note.items()} for note in st.scratch],
            lift=lift,
            regions=regions,
            region=region,
            place=place,
            image=image,
            order=order,
            totals=[len(layout.rows) for layout in layouts],
            common=self.vision.view_arguments(st),
            finite=self.vision.finite,
            projected=packed[rows],
            layouts=layouts,
        )
        return flat, rows, every
