# SPDX-License-Identifier: Apache-2.0
"""Images of any resolution: where packed rows come from, and the features stage behind packing.

LLaVA-NeXT and its relatives encode a thumbnail and a grid of crops, put the crops together to a
canvas, cut off its padding, put a newline token at the end of each row and pack all into one
sequence. Which packed row is which patch is found by packing patch numbers with the model's own
function. Methods see the thumbnail and the rest of each crop as images of their own; dropped
patches become rows of NaN in the packed features, which the LLM engine drops. Newlines are
separators between rows: no method chooses among them, and all of them stay.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters.base import CropSites, Sites
from .encoding import History
from .errors import UnsupportedError
from .finite import Finite
from .method import Method, split_answer
from .records import Recording, Records
from .reduction import Reduction
from .threads import PerThread, Threaded
from .transformers_contract import FEATURES, features_of
from .views import FeaturesView, How, fold
from .vision import apply_method


@dataclass(frozen=True)
class Region:
    """A rectangle of patches of one image that methods see as an image of its own.

    Attributes:
        image: which image.
        grid: (rows, columns) of its patches.
        patches: (n,) which of the image's P patches, in raster order.
        blended: its patches are blends of the encoder's, from a resampled canvas.
    """

    image: int
    grid: tuple[int, int]
    patches: Tensor
    blended: bool = False


@dataclass(frozen=True)
class CropLayout:
    """The P patches of one image in packed order: thumbnail, then the canvas row by row.

    Attributes:
        size: (height, width) of the image in pixels.
        side: (rows, columns) of patches of a crop.
        crops: (rows, columns) of crops, without the thumbnail; (0, 0) where it is alone.
        canvas: (rows, columns) of patches of the canvas of all crops, without padding.
        length: packed rows, newlines included.
        rows: (P,) packed row of each patch.
        crop: (P,) crop each patch lies in, 0 for the thumbnail, then in raster order.
        place: (P,) where it lies in that crop's grid; of a resampled canvas, the nearest patch.
        source: (S,) the encoder's patches, crop * N + patch, of thumbnail and canvas; another
            number than P only where the canvas is resampled from ``full`` (rows, columns).
    """

    size: tuple[int, int]
    side: tuple[int, int]
    crops: tuple[int, int]
    canvas: tuple[int, int]
    length: int
    rows: Tensor
    crop: Tensor
    place: Tensor
    source: Tensor
    full: tuple[int, int]

    @property
    def thumbnail(self) -> int:
        """Patches of the thumbnail, which come first."""
        return prod(self.side)

    @property
    def frames(self) -> list[int] | None:
        """Tokens of each frame; None as this is no video."""
        return None

    @property
    def resampled(self) -> bool:
        """Whether the canvas was too large and shrunk bilinearly."""
        return self.full != self.canvas

    def regions(self, image: int = 0) -> list[Region]:
        """Thumbnail and crops without padding, or the whole canvas where it is resampled."""
        index = torch.arange(len(self.rows))
        out = [Region(image, self.side, index[: self.thumbnail])]
        if self.resampled:
            return [*out, Region(image, self.canvas, index[self.thumbnail :], True)]
        for crop in range(1, prod(self.crops) + 1):
            here = index[self.crop == crop]
            if len(here):  # padding alone otherwise
                y, x = self.place[here] // self.side[1], self.place[here] % self.side[1]
                grid = (int(y[-1] - y[0]) + 1, int(x[-1] - x[0]) + 1)
                out.append(Region(image, grid, here))
        return out

    def lift(self, x: Tensor) -> Tensor:
        """x (S, ...) of the encoder's patches at ``source``, on the P patches."""
        return resize(x, self.thumbnail, self.full, self.canvas) if self.resampled else x


def resize(x: Tensor, first: int, grid: tuple[int, int], to: tuple[int, int]) -> Tensor:
    """x (first + rows * columns, ...) with the grid behind the first rows resized bilinearly."""
    canvas = x[first:].reshape(*grid, -1).permute(2, 0, 1)[None]
    small = F.interpolate(canvas, to, mode="bilinear")[0].permute(1, 2, 0)
    return torch.cat([x[:first], small.reshape(-1, *x.shape[1:])])


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


def apportion(total: int, weights: Sequence[float], caps: Sequence[int]) -> list[int]:
    """``total`` divided in proportion to the weights, in whole numbers, none above its cap.

    Exactly ``total`` in sum, or all caps where they hold less. By largest remainder, ties to the
    first; what a cap holds back goes to the others.
    """
    shares = [0] * len(weights)
    open_ = [i for i, cap in enumerate(caps) if cap > 0]
    total = min(total, sum(caps))
    while open_:
        left = total - sum(shares)
        if sum(weights[i] for i in open_) <= 0:
            weights = [1] * len(weights)
        whole = sum(weights[i] for i in open_)
        full = {i for i in open_ if left * weights[i] >= caps[i] * whole}
        if not full:
            parts = {i: divmod(left * weights[i], whole) for i in open_}
            for i, (count, _) in parts.items():
                shares[i] = int(count)
            behind = sorted(open_, key=lambda i: -parts[i][1])
            for i in behind[: total - sum(shares)]:
                shares[i] += 1
            break
        for i in full:
            shares[i] = caps[i]
        open_ = [i for i in open_ if i not in full]
    return shares


@dataclass
class Packed:
    """What became of the tokens of several images, as references.

    M tokens entered the features stage.

    Attributes:
        layouts: of the images; history: of the encoder that made the tokens.
        image, order: (M,) as in `FlatTokens`; None if nothing acts on the tokens there.
        reduction: (1, M), None if all are left.
        ranked: for each view of the last method that ranked tokens: which of the M tokens were
            left, which of those (B, n) are in the view, their scores (B, n).
    """

    layouts: list[Any]
    history: History
    image: Tensor | None = None
    order: Tensor | None = None
    reduction: Reduction | None = None
    ranked: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def scores(self) -> Tensor | None:
        """(M,) what the tokens were ranked by, NaN where one was gone; None if nothing."""
        if self.image is None or not self.ranked:
            return None
        out = torch.full(self.image.shape, torch.nan, device=self.image.device)
        for keep, index, values in self.ranked:
            out[keep[index]] = values.float()
        return out


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


class PackedEngine(Recording, Threaded):
    """The features stage on the rows that go to the LLM: wraps ``base.get_image_features``.

    Subclasses say how the rows are laid out (`_layouts`, before anything is computed) and which
    token is which row (`_flatten`). A layout has the ``length`` of its image in rows.

    Args:
        sites: of the model.
        vision: the engine of the encoder side, None where no method acts there.
        decoder: the engine of the language model, told how long the packed images are.
        records: what the report reads.
    """

    modality = "image"
    # Of the last call's rows, where tokens were merged.
    merged: PerThread[Reduction | None] = PerThread(lambda: None)

    def __init__(self, sites: Sites, vision: Any, decoder: Any, records: Records) -> None:
        self.sites, self.vision, self.decoder, self.records = sites, vision, decoder, records
        llm: Any = sites.decoder
        self.base: Any = llm.base

    def install(self) -> None:
        """Shadow the method with an instance attribute."""
        shadow: Any = functools.partial(self._get_features)  # copied with its model, no closure is
        stock = getattr(self.base, self._name)
        functools.update_wrapper(shadow, stock)
        shadow.__signature__ = inspect.signature(stock)  # generate() reads it
        setattr(self.base, self._name, shadow)

    def _get_features(self, *args: Any, **kwargs: Any) -> Any:
        stock = getattr(type(self.base), self._name).__get__(self.base)
        call = dict(inspect.signature(stock).bind(*args, **kwargs).arguments)
        pixels = next(iter(call.values()))
        if self._part_of_video(pixels):
            return stock(*args, **kwargs)
        extra = call.pop("kwargs", {})
        named = extra.pop("return_dict", None) is not False
        call |= extra  # LLaVA of 5.5 takes image_sizes among the others
        layouts = self._layouts(call)
        self._check(layouts)
        with self._telling(pixels):
            output = stock(**call, return_dict=True)
        self.merged = None
        features = features_of(output, self.base)
        output[FEATURES.among(output)] = self._replaced(features, layouts)
        self._merge_deepstack(output)
        return output if named else output.to_tuple()

    def remove(self) -> None:
        """The model's own method again."""
        self.base.__dict__.pop(self._name, None)

    @property
    def _name(self) -> str:
        return f"get_{self.modality}_features"

    def _part_of_video(self, pixels: Any) -> bool:
        """Qwen3-VL encodes videos by its method for images.

        Told by the pixels, so that what an interrupt leaves behind says nothing of other images.
        """
        video = self.decoder.video
        return video is not None and video() is pixels

    def _telling(self, pixels: Any) -> AbstractContextManager[Any]:
        """Around the encoder's run, for what the other engines must know."""
        return nullcontext() if self.vision is None else self.vision.taking(None)

    def _check(self, layouts: list[Any]) -> None:
        """Refuse, before anything is computed, what a method cannot do with these images."""
        for layout in layouts:
            for m in self.decoder.methods:
                m.check_frames(layout.frames)

    def _layouts(self, call: dict[str, Any]) -> list[Any]:
        """Layouts of the images of a call, before anything is computed."""
        raise NotImplementedError

    def _flatten(
        self, st: Any, packed: Tensor, layouts: list[Any]
    ) -> tuple[FlatTokens, Tensor, Tensor]:
        """All tokens that the encoder left; packed rows of them, and of all tokens."""
        raise NotImplementedError

    def _describe(self, layouts: list[Any]) -> None:
        """Write what is known of the images into the record."""
        raise NotImplementedError

    def _replaced(self, packed: Any, layouts: list[Any]) -> Any:
        """The packed features, in the container they came in, with NaN for dropped tokens."""
        together = not isinstance(packed, Tensor)
        # Up to 5.12 LLaVA-NeXT-Video has the frames of a video apart, (T, N, D).
        parts = [part.reshape(-1, part.shape[-1]) for part in packed] if together else []
        rows = torch.cat(parts) if together else packed.reshape(-1, packed.shape[-1])
        out = self._pack(rows, layouts)
        if out is rows:
            return packed
        if not together:
            return out.reshape(packed.shape)
        split = zip(out.split([len(part) for part in parts]), packed, strict=True)
        return type(packed)(part.reshape(stock.shape) for part, stock in split)

    def _merge_deepstack(self, output: Any) -> None:
        """Features for the first LLM layers: a merged token gets the mean of its group.

        Tokens that are only dropped leave theirs unread.
        """
        stacked = getattr(output, "deepstack_features", None)
        if self.merged is None or stacked is None:
            return
        keep = self.merged.keep[0]
        for i, parts in enumerate(stacked):
            whole = isinstance(parts, Tensor)  # of all images, up to 5.12
            rows = parts if whole else torch.cat(list(parts))
            means = self.merged.merge(rows[None])[0][0].to(rows.dtype)
            rows = rows.index_copy(0, keep.to(rows.device), means)
            stacked[i] = rows if whole else type(parts)(rows.split([len(p) for p in parts]))

    def _pack(self, packed: Tensor, layouts: list[Any]) -> Tensor:
        """The packed rows of all images with NaN in place of dropped tokens."""
        self._describe(layouts)
        lengths = [layout.length for layout in layouts]
        self.decoder.lengths[self.modality] = lengths
        self.decoder.made |= {(self.modality, n) for n in lengths}
        self.decoder.carried.pop(self.modality, None)
        st = None if self.vision is None else self.vision.state
        self.record.packed.pop(self.modality, None)
        if st is None or st.unpacked is None:
            return packed
        if not self.vision.behind and not any(st.notes):
            self.record.packed[self.modality] = Packed(layouts, st.history)
            return packed
        with self.record.clock.measure("method"):
            flat, rows, every = self._flatten(st, packed, layouts)
            for j, m in self.vision.behind:
                flat.ask(j, m)
            self.record.packed[self.modality] = flat.outcome(layouts, st.history)
            st.unpacked, st.projections, st.reprojected = None, {}, flat.reprojected
            left = flat.image[flat.keep]
            counts = torch.bincount(left, minlength=len(layouts)).tolist()
            projected: Any = flat.projected
            self.vision.finite.look_at_projected(projected[:, None], image=left)
            if any(flat.notes):
                notes = [
                    {name: list(x.split(counts)) for name, x in note.items()} for note in flat.notes
                ]
                self.decoder.carried[self.modality] = list(projected.split(counts)), notes
            if flat.reduction is None:
                return packed
            if any(m.merges for _, m in self.vision.behind):
                self.merged = flat.reduction
            out = packed.clone()
            out[every] = torch.nan
            out[rows[flat.keep]] = projected
            return out


class CropEngine(PackedEngine):
    """The features stage on a model that packs crops."""

    def __init__(self, sites: Sites, vision: Any, decoder: Any, records: Records) -> None:
        super().__init__(sites, vision, decoder, records)
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
