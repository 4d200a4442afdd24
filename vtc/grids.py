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
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from .adapters.base import GridSites, Sites
from .crops import FlatTokens, PackedEngine, Region
from .errors import UnsupportedError
from .report import Record
from .views import How, Projections


@dataclass(frozen=True)
class GridLayout:
    """The tokens of one image in packed order: one grid behind the other, each in raster order.

    Attributes:
        patches: (rows, columns) of encoder patches of each grid.
        grids: (rows, columns) of LLM tokens of each grid.
    """

    patches: tuple[tuple[int, int], ...]
    grids: tuple[tuple[int, int], ...]

    @property
    def length(self) -> int:
        """Tokens of the image."""
        return sum(map(prod, self.grids))

    @property
    def encoded(self) -> int:
        """Patches of the image in the encoder."""
        return sum(map(prod, self.patches))


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


def segmented(p: Projections, lengths: list[int]) -> Projections:
    """Queries and keys of several sequences in one, as a batch padded to the longest.

    Args:
        p: of a block that ran them as one sequence (1, T, C), each attending to itself.
        lengths: tokens of each; T in sum.
    """
    counts = torch.tensor(lengths)
    start = counts.cumsum(0) - counts
    place = torch.arange(max(lengths))
    valid = place < counts[:, None]
    index = (start[:, None] + place).where(valid, 0)

    def batched(x: Tensor) -> Tensor:
        """(1, H, T, d) to (S, H, longest, d)."""
        return x[0][:, index.to(x.device)].transpose(0, 1)

    query = functools.cache(lambda: batched(p.query(slice(None))))
    key = functools.cache(lambda: batched(p.key()))
    bias = torch.zeros(valid.shape).masked_fill(~valid, -torch.inf)
    return replace(
        p,
        query=lambda rows: query()[:, :, rows],
        key=key,
        bias=bias,
        valid=valid,
        mean=None,
    )


class GridEngine(PackedEngine):
    """The features stage on a model that joins patches to tokens (`GridSites`)."""

    def __init__(self, sites: Sites, vision: Any, decoder: Any, record: Record) -> None:
        super().__init__(sites, vision, decoder, record)
        llm: Any = sites.decoder
        self.grids: GridSites = llm.grids
        self.call: dict[str, Any] = {}

    def _layouts(self, call: dict[str, Any]) -> list[GridLayout]:
        self.call, fold, layouts = call, self.grids.fold, []
        for image in self.grids.images(call):
            tokens = tuple((rows // fold, columns // fold) for rows, columns in image)
            layouts.append(GridLayout(tuple(image), tokens))
        return layouts

    def _describe(self, layouts: list[GridLayout]) -> None:
        self.record.grids = layouts
        self.record.grid = layouts[0].grids[0] if layouts else None

    def _flatten(
        self, st: Any, packed: Tensor, layouts: list[GridLayout]
    ) -> tuple[FlatTokens, Tensor, Tensor]:
        device, sites = packed.device, self.grids
        features = st.unpacked.reshape(-1, st.unpacked.shape[-1]).to(device)
        if not len(features) == len(packed) == sum(layout.length for layout in layouts):
            raise UnsupportedError(
                f"{type(sites.source).__name__} got {len(features)} rows where the images have "
                f"{sum(layout.length for layout in layouts)} tokens and {len(packed)} go to the "
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
                regions.append(Region(i, grid, index))
                start += prod(grid)
            images.append(torch.stack([torch.full((start,), i), torch.arange(start)]))
        region, place = torch.cat(parts, 1).to(device)
        image, order = torch.cat(images, 1).to(device)
        ordered = sites.order(self.call) if sites.order is not None and sites.packed else None
        if ordered is not None and sites.grouped:  # the source gets groups in the encoder's order
            area = sites.fold**2
            features = features[ordered[::area].to(device) // area]
        lift = self._lift(layouts, ordered, device)
        every = torch.arange(len(packed), device=device)
        st.projections = self._own(st.projections, layouts)
        flat = FlatTokens(
            features=features,
            size=torch.ones(len(packed), device=device),
            notes=[{} for _ in self.vision.methods],
            lift=lift,
            regions=regions,
            region=region,
            place=place,
            image=image,
            order=order,
            totals=[layout.length for layout in layouts],
            common=self.vision.view_arguments(st),
            projected=packed,
        )
        return flat, every, every

    def _own(self, known: dict[int, Projections], layouts: list[GridLayout]) -> Any:
        """Queries and keys of each grid by itself."""
        if not self.grids.packed:
            return known
        lengths = [prod(grid) for layout in layouts for grid in layout.patches]
        own = {i: segmented(p, lengths) for i, p in known.items()}
        if self.grids.whole is not None:
            for i, p in own.items():
                nearest = self.grids.whole(i)
                p.whole = None if nearest == i else own[nearest]
        return own

    def _lift(self, layouts: list[GridLayout], ordered: Tensor | None, device: torch.device) -> Any:
        """From the encoder's patches, a row for each grid (B, T, ...), to the M tokens."""
        sites = self.grids
        shapes = [grid for layout in layouts for grid in layout.patches]
        known = {shape: groups(shape, sites.fold, sites.grouped) for shape in set(shapes)}
        row = torch.cat([torch.full((len(known[s]),), b) for b, s in enumerate(shapes)])
        index = torch.cat([known[s] for s in shapes])
        if ordered is not None:  # a grid's patches stay together, in another order
            starts = torch.tensor([0, *map(prod, shapes)]).cumsum(0)[:-1][row][:, None]
            index = ordered.cpu()[index + starts] - starts
        row, index = row.to(device), index.to(device)

        def lift(x: Tensor, how: How) -> Tensor:
            if sites.fold == 1:
                return x.to(device)[row, index[:, 0]]
            joined = x.to(device)[row[:, None], index]
            return joined.sum(1) if how == "sum" else joined.mean(1)

        return lift
