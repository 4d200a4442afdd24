# SPDX-License-Identifier: Apache-2.0
"""The features stage on the rows that go to the LLM."""

from __future__ import annotations

import functools
import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ...adapters.base import Sites
from ...hooks.per_thread import PerThread, Threaded
from ...method import Method
from ...reduction import Reduction
from ...transformers_contract import FEATURES, features_of
from ..handoff import Handoff
from ..record import Packed, Recording, Records
from .engine import VisionEngine
from .flat import FlatTokens


class PackedEngine(Recording, Threaded):
    """The features stage on the rows that go to the LLM: wraps ``base.get_image_features``.

    Subclasses say how the rows are laid out (`_layouts`, before anything is computed) and which
    token is which row (`_flatten`). A layout has the ``length`` of its image in rows.

    Args:
        sites: of the model.
        vision: the engine of the encoder side, None where no method acts there.
        methods: all of the session.
        handoff: takes what is left of the images, their lengths and notes on them.
        records: what the report reads.
    """

    modality = "image"
    # Of the last call's rows, where tokens were merged.
    merged: PerThread[Reduction | None] = PerThread(lambda: None)

    def __init__(
        self,
        sites: Sites,
        vision: VisionEngine | None,
        methods: tuple[Method, ...],
        handoff: Handoff,
        records: Records,
    ) -> None:
        self.sites, self.methods, self.handoff, self.records = sites, methods, handoff, records
        self.vision: Any = vision
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
        FEATURES.replace(output, self._replaced(features, layouts))
        self._merge_deepstack(output)
        return output if named else output.to_tuple()

    def remove(self) -> None:
        """The model's own method again."""
        self.base.__dict__.pop(self._name, None)

    @property
    def _name(self) -> str:
        return f"get_{self.modality}_features"

    def _part_of_video(self, pixels: Any) -> bool:
        """Qwen3-VL encodes videos by its method for images."""
        return self.handoff.is_video(pixels)

    def _telling(self, pixels: Any) -> AbstractContextManager[Any]:
        """Around the encoder's run, for what the other engines must know."""
        return nullcontext() if self.vision is None else self.vision.taking(None)

    def _check(self, layouts: list[Any]) -> None:
        """Refuse, before anything is computed, what a method cannot do with these images."""
        for layout in layouts:
            for m in self.methods:
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
        self.handoff.rows(self.modality, lengths)
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
                self.handoff.note(self.modality, list(projected.split(counts)), notes)
            if flat.reduction is None:
                return packed
            if any(m.merges for _, m in self.vision.behind):
                self.merged = flat.reduction
            out = packed.clone()
            out[every] = torch.nan
            out[rows[flat.keep]] = projected
            return out
