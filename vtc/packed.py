# SPDX-License-Identifier: Apache-2.0
"""Towers that take the patches of all images in one sequence: the features stage behind the merger.

Qwen's towers have no batch: images of any size follow each other in a sequence (S, C), and squares
of patches become one LLM token each in the merger. Methods see each image as a grid of LLM tokens;
their features are what the merger's MLP gets, the patches of a square side by side, so all that a
method reads of a patch is added up or averaged over the square. Dropped tokens become rows of NaN
in the image features, which the LLM engine drops.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.base import Call, PackedSites, Sites
from .crops import FlatTokens, Region
from .errors import UnsupportedError
from .method import Method
from .reduction import Reduction
from .report import Record
from .views import Projections
from .vision import check_cls, usable_names


@dataclass
class PackedProjections(Projections):
    """Queries and keys of one block of a packed tower, (1, H, S, d).

    Attributes:
        lengths: of the sequences that attend each within itself, images or windows of them.
        whole: of the nearest block that sees whole images, where this one sees windows only.
    """

    lengths: Sequence[int] = ()
    whole: PackedProjections | None = None

    def logits(self, rows: slice) -> Tensor:
        raise UnsupportedError(
            "images that follow each other in one sequence have no common attention map; read "
            "attention_received"
        )

    def received(self, chunk: int = 256) -> Tensor:
        """(1, S) attention each patch receives within its image, mean over heads and query rows.

        A block that attends within windows says nothing of one window against another: read from
        the nearest block that sees the whole image instead.
        """
        if self.whole is not None:
            return self.whole.received(chunk)
        query, key = (
            x[0].split(list(self.lengths), 1) for x in (self.query(slice(None)), self.key())
        )
        out: list[Any] = [None] * len(self.lengths)
        for length in set(self.lengths):  # sequences of one length in one batch
            same = [i for i, n in enumerate(self.lengths) if n == length]
            q, k = (torch.stack([x[i] for i in same]) for x in (query, key))
            part = Projections(lambda rows, q=q: q[:, :, rows], lambda k=k: k, self.scale)
            for i, row in zip(same, part.received(chunk), strict=True):
                out[i] = row
        return torch.cat(out)[None]


class PackedEngine:
    """The features stage on a packed tower: wraps the model's ``get_image_features``.

    Args:
        sites: of a model whose tower is packed.
        methods: applied in this order.
        decoder: the engine of the language model, told how many tokens images have.
        record: what the report reads.

    Raises:
        UnsupportedError: a method acts on the pixels or inside the tower, or needs a class token.
    """

    def __init__(
        self, sites: Sites, methods: tuple[Method, ...], decoder: Any, record: Record
    ) -> None:
        llm: Any = sites.decoder
        self.sites, self.decoder, self.record = sites, decoder, record
        self.base: Any = llm.base
        self.packed: PackedSites = sites.vision.packed  # type: ignore[assignment]
        self.methods = methods
        self.behind = [s for s in enumerate(methods) if "features" in s[1].stages]
        depth = len(sites.vision.blocks)
        self.captured = {i % depth for _, m in self.behind for i in m.captures(depth)}
        self.handles: list[Any] = []
        self.calls: dict[int, Call] = {}
        self.joined: Tensor | None = None
        self._check()

    def _check(self) -> None:
        tower = type(self.sites.vision.tower).__name__
        usable = usable_names({"features"})
        for m in self.methods:
            if "pixels" in m.stages:
                raise UnsupportedError(
                    f"{m.name} resizes the image, which reaches {tower} as a sequence of patches; "
                    "give the processor a smaller max_pixels, or use a method that acts behind "
                    f"the encoder: {usable}"
                )
            if "vision" in m.stages:
                raise UnsupportedError(
                    f"{m.name} removes patches inside the encoder, and {tower} joins squares of "
                    "patches behind it and packs images without a batch; use a method that acts "
                    f"behind the encoder: {usable}"
                )
        check_cls(self.sites.vision, self.methods, {"features"})

    # ---- hooks in and out ----------------------------------------------------------------------

    def install(self) -> None:
        """Shadow the method with an instance attribute; register what the methods read."""
        stock = self.base.get_image_features
        signature = inspect.signature(stock)

        @functools.wraps(stock)  # generate() reads its signature
        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            call = dict(signature.bind(*args, **kwargs).arguments)
            extra = call.pop("kwargs", {})
            named = extra.pop("return_dict", None) is not False
            self.calls, self.joined = {}, None
            output = stock(**call, **extra, return_dict=True)
            self._pack(output, [tuple(g) for g in call["image_grid_thw"].tolist()])
            return output if named else output.to_tuple()

        self.base.get_image_features = get_image_features
        if not self.behind:
            return
        add = self.handles.append
        add(self.packed.joined.register_forward_pre_hook(self._keep_joined))
        whole = {self.packed.whole(i) for i in self.captured}
        for i in self.captured | whole:
            attn = self.sites.vision.blocks[i].attn
            add(attn.register_forward_pre_hook(partial(self._keep_call, i), with_kwargs=True))

    def remove(self) -> None:
        """The model's own method again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self.base.__dict__.pop("get_image_features", None)

    def _keep_joined(self, module: nn.Module, args: tuple) -> None:
        self.joined = args[0]

    def _keep_call(self, i: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        self.calls[i] = (args, kwargs)

    # ---- behind the merger ---------------------------------------------------------------------

    def _pack(self, output: Any, grids: list[tuple[int, int, int]]) -> None:
        """Put NaN in place of dropped tokens into the features of each image."""
        edge, decoder = self.packed.edge, self.decoder
        grids = [(t, h // edge, w // edge) for t, h, w in grids]
        self.record.packed, self.record.grid = grids, (grids[0][0] * grids[0][1], grids[0][2])
        decoder.lengths = [t * h * w for t, h, w in grids]
        decoder.carried, self.record.reprojected = None, 0
        if not self.behind:
            return
        with self.record.clock.measure("method"):
            projected = torch.cat(list(output.pooler_output))
            flat = self._flatten(projected, grids)
            for j, m in self.behind:
                flat.ask(j, m)
            self.calls, self.joined, self.record.reprojected = {}, None, flat.reprojected
            left = flat.image[flat.keep]
            counts = torch.bincount(left, minlength=len(grids)).tolist()
            chosen: Any = flat.projected
            if any(flat.notes):
                notes = [
                    {name: list(x.split(counts)) for name, x in note.items()} for note in flat.notes
                ]
                decoder.carried = list(chosen.split(counts)), notes
            if flat.reduction is None:
                return
            keep = flat.keep

            def spread(x: Tensor, fill: float) -> tuple[Tensor, ...]:
                out = x.new_full((len(projected), x.shape[1]), fill)
                out[keep] = x
                return out.split(decoder.lengths)

            output.pooler_output = spread(chosen, torch.nan)
            merged = any(m.merges for _, m in self.behind)
            if merged and getattr(output, "deepstack_features", None) is not None:
                # A survivor gets the mean of its group; those merely dropped leave theirs unread.
                output.deepstack_features = [
                    spread(flat.reduction.merge(torch.cat(list(rows))[None])[0][0], 0.0)
                    for rows in output.deepstack_features
                ]

    def _flatten(self, projected: Tensor, grids: list[tuple[int, int, int]]) -> FlatTokens:
        """All LLM tokens of all images, in raster order, and what methods may read of them."""
        device, area = projected.device, self.packed.edge**2
        place: Any = self.packed.order(grids)  # of each token in raster order, where it ran
        place = torch.arange(len(projected)) if place is None else place
        place = place.to(device)
        regions, region, order = [], [], []
        for i, (t, h, w) in enumerate(grids):
            regions.append(Region(i, (t * h, w), torch.arange(t * h * w)))
            region.append(torch.full((t * h * w,), i))
            order.append(torch.arange(t * h * w))
        image, index = torch.cat(region).to(device), torch.cat(order).to(device)
        joined: Any = self.joined
        total = len(projected)
        first = torch.arange(total, device=device)[None]
        squares = Reduction(first * area, first.repeat_interleave(area, 1))
        return FlatTokens(
            features=joined.to(device)[place],
            size=torch.ones(total, device=device),
            notes=[{} for _ in self.methods],
            lift=lambda x: x[0].to(device)[place],
            regions=regions,
            region=image,
            place=index,
            image=image,
            order=index,
            totals=[t * h * w for t, h, w in grids],
            common={
                "prefix": 0,
                "has_cls": False,
                "projector": self.packed.project,
                "layers": self._projections(squares),
                "depth": len(self.sites.vision.blocks),
            },
            projected=projected,
        )

    def _projections(self, squares: Reduction) -> dict[int, Projections]:
        """By block, what methods read of it, folded from patches to LLM tokens."""

        def block(i: int) -> PackedProjections:
            site, call = self.sites.vision.blocks[i], self.calls[i]
            lengths = call[1]["cu_seqlens"].diff().tolist()
            key = functools.cache(lambda: site.key(call, slice(None)))
            query = partial(site.query, call)
            return PackedProjections(query, key, site.scale, later=squares, lengths=lengths)

        found: dict[int, Projections] = {}
        for i in self.captured:
            projections, whole = block(i), self.packed.whole(i)
            projections.whole = None if whole == i else block(whole)
            found[i] = projections
        return found
