# SPDX-License-Identifier: Apache-2.0
"""The features stage between encoder and LLM, on plain images: rectangular batches and ragged ones.

The two ways stay apart: the ragged one reads how many tokens each image has left, which no one
graph of `torch.compile` can hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import GridSites, VisionSites
from ...hooks.per_thread import PerThread, Threaded
from ...layouts import Region
from ...method import Method, split_answer
from ...reduction import Reduction
from ...views.features import FeaturesView
from ..encoding import VisionState
from ..finite import Finite
from ..record import Recording, Records
from ..refusals import check_patch_features, refuse_graph
from .flat import FlatTokens
from .reductions import apply_method, behind_prefix, is_identity, scatter_tokens

Step = tuple[int, Method]
"""A method and its place in the chain."""


class FeaturesStage(Recording, Threaded):
    """Methods that choose among the patch features of an encoder.

    Args:
        sites: the encoder.
        methods: the whole chain.
        projector, packs, grids, records: as in `VisionEngine`.
        finite: looks at the tokens that methods choose among.
    """

    taken: PerThread[GridSites | None] = PerThread(lambda: None)  # of the video encoded now

    def __init__(
        self,
        sites: VisionSites,
        methods: tuple[Method, ...],
        projector: nn.Module | None,
        packs: bool,
        grids: GridSites | None,
        records: Records,
        finite: Finite,
    ) -> None:
        self.sites, self.methods = sites, methods
        self.projector, self.packs, self.grids = projector, packs, grids
        self.records, self.finite = records, finite
        self.steps: list[Step] = [s for s in enumerate(methods) if "features" in s[1].stages]

    def install(self) -> list[Any]:
        """Register the hooks of the projector, where there is one; their handles."""
        handles: list[Any] = []
        if self.projector is None:
            return handles
        if self.steps or self.packs:
            source = self.projector if self.grids is None else self.grids.source
            handles.append(source.register_forward_pre_hook(self._enter_projector))
        if self.grids is None:
            hook = self._leave_projector
            handles.append(self.projector.register_forward_hook(hook, prepend=True))
        return handles

    @contextmanager
    def taking(self, grids: GridSites | None) -> Iterator[None]:
        """While the frames of a video are encoded, which the model joins as ``grids`` says; or
        images, None."""
        self.taken = grids
        try:
            yield
        finally:
            self.taken = None

    # ---- hooks, in order of execution ----------------------------------------------------------

    def finish(self, st: VisionState, x: Tensor) -> Tensor:
        """The end of an encoder alone, on (B, T, C) with the prefix."""
        if not self.steps:
            return x
        features, done = self._choose(st, x[:, st.prefix :])
        return x if done is None else torch.cat([x[:, : st.prefix], features], 1)

    def _enter_projector(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Choose among the patch features before they are projected, unless they are packed."""
        st = self.record.vision
        if st is None or st.projected:
            return None
        if self.taken is not None or self.grids is not None:  # the joined ones are chosen from
            st.unpacked = args[0]
            return None
        check_patch_features(args[0], st.images, st.size.shape[1], self.sites.tower)
        if self.packs:
            st.unpacked = args[0]
            return None
        with self.record.clock.measure("method"):
            features, done = self._choose(st, args[0])
        return None if done is None else (features, *args[1:])

    def _leave_projector(
        self, module: nn.Module, args: tuple[Any, ...], output: Tensor
    ) -> Tensor | None:
        """Projected survivors (B, K, D) at their places in the grid (B, N, D), NaN elsewhere."""
        st = self.record.vision
        if st is None or st.projected:
            return None
        st.projected = True
        reduction = st.reduction
        valid = None if reduction is None else reduction.valid
        if not (self.packs and self.steps):  # else when they are packed
            self.finite.look_at_projected(output, valid)
        if reduction is None:
            return None
        with self.record.clock.measure("method"):
            n, keep = reduction.source_count, reduction.keep
            if valid is not None:
                keep = keep.where(valid, n)  # one row more takes the padding slots
            return scatter_tokens(output, keep, n + (valid is not None), torch.nan)[:, :n]

    # ---- asking the methods --------------------------------------------------------------------

    def _project(self, features: Tensor) -> Tensor:
        """Features (..., C) in the space of the LLM, past all hooks."""
        if self.grids is not None:
            return self.grids.project(features)
        return features if self.projector is None else self.projector.forward(features)

    def view_arguments(self, st: VisionState) -> dict[str, Any]:
        """What all views of the stage have in common."""
        return {
            "prefix": st.prefix,
            "has_cls": self.sites.has_cls,
            "projector": self._project,
            "layers": st.projections,
            "depth": st.blocks,
        }

    def _choose(self, st: VisionState, features: Tensor) -> tuple[Tensor, Reduction | None]:
        """Ask the methods, in order, about features (B, N, C): what is left, and what was done."""
        refuse_graph(self.methods)
        st.follow(features.device)
        if not st.past_blocks:
            st.notes = st.scratch
            st.past_blocks = True
        done = None
        for j, m in self.steps:
            so_far = st.reduction
            ragged = so_far is not None and so_far.valid is not None
            ask = self._ask_ragged if ragged else self._ask
            features, reduction = ask(st, j, m, features)
            if reduction is not None:
                done = reduction if done is None else done.then(reduction)
        st.projections = {}
        return features, done

    def _ask(
        self, st: VisionState, j: int, m: Method, features: Tensor
    ) -> tuple[Tensor, Reduction | None]:
        """One method where images have equally many tokens: one view."""
        index = torch.arange(features.shape[1], device=features.device)
        so_far = st.reduction
        view = FeaturesView(
            features=features,
            size=st.size,
            index=index.expand(len(features), -1) if so_far is None else so_far.keep,
            total=st.grid[0] * st.grid[1],
            grid=st.grid,
            scratch=st.notes[j],
            **self.view_arguments(st),
        )
        reduction, tokens = split_answer(self.finite.ask(m.on_features, view, m.name, "features"))
        if reduction is None or is_identity(reduction):
            return features, None
        features, size = apply_method(m, reduction, features, st.size, tokens)
        self._advance(st, reduction, size)
        return features, reduction

    def _ask_ragged(
        self, st: VisionState, j: int, m: Method, features: Tensor
    ) -> tuple[Tensor, Reduction | None]:
        """One method where images have different numbers of tokens: a view for each number."""
        so_far: Any = st.reduction
        valid: Tensor = so_far.valid
        batch, n = valid.shape
        image, slot = valid.nonzero().unbind(1)
        total = st.grid[0] * st.grid[1]
        every = torch.arange(total)
        flat = FlatTokens(
            features=features[valid],
            size=st.size[valid],
            notes=[{name: x[valid] for name, x in st.notes[j].items()}],
            lift=lambda x, how: x[valid],
            regions=[Region(i, st.grid, every) for i in range(batch)],
            region=image,
            place=so_far.keep[valid],
            image=image,
            order=slot,
            totals=[total] * batch,
            common=self.view_arguments(st),
            finite=self.finite,
        )
        flat.ask(0, m)
        reduction, mask = None, valid
        if flat.reduction is not None:
            group = flat.reduction.group[0]
            into = slot[flat.keep[group.clamp(min=0)]].where(group >= 0, -1)
            target = into.new_full((batch, n), -1)
            target[valid] = into
            reduction = Reduction.from_merge(target)
            scores = flat.outcome([], st.history).scores()
            if scores is not None:
                known = scores.new_full((batch, n), torch.nan)
                known[valid] = scores
                reduction = reduction.ranked(known)
            left = reduction.valid
            mask = torch.ones_like(reduction.keep, dtype=torch.bool) if left is None else left

        def rows(x: Tensor) -> Tensor:
            out = x.new_zeros(*mask.shape, *x.shape[1:])
            out[mask] = x
            return out

        if reduction is not None:
            self._advance(st, reduction, rows(flat.size))
            features = rows(flat.features)
        st.notes[j] = {name: rows(x) for name, x in flat.notes[0].items()}
        return features, reduction

    def _advance(self, st: VisionState, reduction: Reduction, size: Tensor) -> None:
        """Record a reduction of the patches, and the patches (B, K) behind each that is left."""
        sizes = torch.cat([st.sizes[:, : st.prefix], size], 1)
        st.advance(behind_prefix(reduction, st.prefix), sizes, None)
