# SPDX-License-Identifier: Apache-2.0
"""The engine of the encoder side: hooks in front of an encoder and in its blocks.

A block is ``x = x + f(attn(norm1(x)))`` and then ``x = x + g(mlp(norm2(x)))``, with the residual of
the second half taken before norm2, so no single hook can shorten it. Three can: the pre-hook of
norm2 hands the shortened tokens to the MLP, the hook of the MLP puts its rows back to the places of
the survivors, and the hook of the block takes the survivors out of the sum and corrects them by
what merging changed: ``x[keep] + g(y) + (merged - x[keep]) = merged + g(y)``, the exact block on
merged tokens. Behind the encoder the survivors return to the grid position of their representative,
all other rows hold NaN, and the LLM engine drops those; so nothing between the two must know.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import BlockSites, Call, GridSites, VisionSites
from ...hooks.per_thread import Threaded
from ...method import Method, split_answer
from ...reduction import Reduction
from ...views.projections import Projections
from ...views.vision import VisionView
from ..encoding import VisionState
from ..finite import Finite
from ..record import Recording, Records
from ..refusals import (
    behind_encoder,
    check_encoder,
    check_encoder_recomputing,
    check_ragged,
    no_mask,
    refuse_graph,
)
from .cross_attention_mask import Readers
from .features import FeaturesStage, Step
from .pixels import image_of, resized, wanted_grid, with_image
from .reductions import apply_method, is_identity, resample, scatter_tokens


class _Keys:
    """Keys of one block: captured from its projection if a hook put them here, else recomputed."""

    def __init__(self, site: BlockSites, call: Call) -> None:
        self.site, self.call = site, call
        self.output: Tensor | None = None
        self.keys: Tensor | None = None

    def __call__(self) -> Tensor:
        if self.keys is None:
            if self.output is not None and self.site.split is not None:
                self.keys = self.site.split(self.output, self.call)
            else:
                self.keys = self.site.key(self.call, slice(None))
        return self.keys

    def mean(self) -> Tensor:
        """(B, T, d) average over heads."""
        if self.keys is None and self.output is None and self.site.key_mean is not None:
            return self.site.key_mean(self.call)
        return self().mean(1)


class VisionEngine(Recording, Threaded):
    """Compression inside a vision encoder and behind it.

    An encoder alone (no projector) returns what is left: pruned tokens are gone from its output,
    prefix tokens stay in front. Heads that average the tokens or attend to them (``sites.pool``
    "mean" or "map") would give a merged token the weight of one patch; so where every method
    merges, each patch gets the token it was merged into behind the last block, which makes the mean
    one weighted by size. The blocks themselves run on few tokens all the same.

    Args:
        sites: the encoder.
        methods: applied in this order at every stage.
        feature_block: the last block whose output matters to the model; no method acts behind it.
        projector: what maps features (B, N, C) to the LLM, (B, N, D); None for an encoder alone.
        packs: the model packs crops behind the projector; the features stage runs there
            (vtc.engine.vision.crops).
        grids: how the model joins patches to LLM tokens; the features stage runs behind that
            (vtc.engine.vision.grids), and no token leaves inside the encoder.
        records: take the state of each forward, and the time of choosing and moving tokens.

    Raises:
        UnsupportedError: a method needs what this encoder does not have.
    """

    def __init__(
        self,
        sites: VisionSites,
        methods: tuple[Method, ...],
        feature_block: int,
        projector: nn.Module | None,
        records: Records | None = None,
        packs: bool = False,
        grids: GridSites | None = None,
    ) -> None:
        self.sites = sites
        self.grids = grids
        self.methods = methods
        self.feature_block = feature_block
        self.projector = projector
        self.records = records or Records()
        self.finite = Finite("image or crop" if packs else "image")
        self.handles: list[Any] = []
        self.features = FeaturesStage(
            sites, methods, projector, packs, grids, self.records, self.finite
        )
        self.behind = self.features.steps
        steps = list(enumerate(methods))
        self.resizing = [s for s in steps if "pixels" in s[1].stages]
        self.inside = inside = [s for s in steps if "vision" in s[1].stages]
        self.middle = [s for s in inside if s[1].vision_site == "middle"]
        self.output = [s for s in inside if s[1].vision_site == "output"]
        self.proportional = any(m.proportional_attention for _, m in inside)
        depth = len(sites.blocks)
        self.captured = {layer % depth for _, m in self.behind for layer in m.captures(depth)}
        if grids is not None and grids.whole is not None:
            self.captured |= set(map(grids.whole, self.captured))
        self.last_read = max([feature_block, *self.captured])
        acting = [m for _, m in inside + self.behind]
        self.refill = (
            projector is None and sites.pool in ("mean", "map") and all(m.merges for m in acting)
        )
        check_encoder(sites, methods, feature_block, grids, packs, projector is None)

    @property
    def state(self) -> VisionState | None:
        """Of the last forward in this thread."""
        return self.record.vision

    @state.setter
    def state(self, state: VisionState | None) -> None:
        self.record.vision = state

    @property
    def running(self) -> VisionState | None:
        """Of the forward that is inside the blocks; None where one is called on its own."""
        st = self.state
        return None if st is None or st.encoded else st

    @property
    def behind_encoder(self) -> str:
        """Names of the methods that leave the tokens inside this encoder alone."""
        return behind_encoder(self.sites, self.projector is None)

    def view_arguments(self, st: VisionState) -> dict[str, Any]:
        """What all views of the features stage have in common."""
        return self.features.view_arguments(st)

    def taking(self, grids: GridSites | None) -> AbstractContextManager[None]:
        """As in `FeaturesStage`."""
        return self.features.taking(grids)

    # ---- hooks in and out ----------------------------------------------------------------------

    def install(self) -> None:
        """Register the hooks that the methods' stages need."""
        sites, add = self.sites, self.handles.append
        if sites.install is not None:
            add(sites.install())
        if sites.readers:
            add(Readers(self, sites.tower, sites.readers))
        entry = sites.tower if sites.entry is None else sites.entry
        add(entry.register_forward_pre_hook(self._begin, with_kwargs=True))
        last = self.feature_block
        for i, site in enumerate(sites.blocks):
            inside = bool(self.inside) and i <= last
            # Blocks behind the last, whose attention is read, must not see padding slots either.
            if inside or i in self.captured or (self.inside and i < self.last_read):
                hook = partial(self._attention, i)
                add(site.attn.register_forward_pre_hook(hook, with_kwargs=True))
                if site.key_source is not None:
                    add(site.key_source.register_forward_hook(partial(self._keys, i)))
            if site.gather is not None and self.inside and i > 0:
                hook = partial(self._shorten_call, i)
                add(site.module.register_forward_pre_hook(hook, with_kwargs=True))
            if inside and self.middle:
                add(site.norm2.register_forward_pre_hook(partial(self._middle, i)))
                add(site.mlp.register_forward_hook(self._put_back))
            if inside or (i == last and self.projector is None and self.behind):
                # Before Hugging Face's own hooks, which record the hidden states.
                hook = partial(self._end_block, i)
                add(site.module.register_forward_hook(hook, prepend=True))
        for site in sites.blocks[-1:]:
            add(site.module.register_forward_hook(self._leave))
        self.handles += self.features.install()

    def remove(self) -> None:
        """Take all hooks out again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    # ---- before the first block ----------------------------------------------------------------

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        """Start a fresh state, whatever the last forward left; resize the image if asked to."""
        refuse_graph(self.methods)
        self.state = None
        self.finite.flags.clear()
        if self.grids is not None:  # only `vtc.engine.vision.grids` knows how many tokens there are
            images = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            if images:
                self.state = self._fresh(0, (0, 0), torch.ones(1, 0, device=images[0].device))
            return None
        if self.inside and torch.is_grad_enabled():
            check_encoder_recomputing(self.sites.tower, [m for _, m in self.inside])
        found = image_of((args, kwargs))
        if found is None:
            return None
        place, pixels = found
        patch, batch = self.sites.patch, len(pixels)
        grid = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        small = wanted_grid([m for _, m in self.resizing], grid)
        entered = self.sites.prefix + small[0] * small[1]
        sizes = torch.ones(batch, entered, device=pixels.device)
        self.state = state = self._fresh(batch, grid, sizes)
        if small == grid:
            return None
        state.pixels = resample(grid, small, batch, pixels.device)
        with self.record.clock.measure("method"):
            pixels = resized(pixels, (small[0] * patch, small[1] * patch))
        assert self.sites.resize is not None  # checked at construction
        return self.sites.resize(with_image((args, kwargs), place, pixels))

    def _fresh(self, images: int, grid: tuple[int, int], sizes: Tensor) -> VisionState:
        """The state in front of the first block."""
        return VisionState(
            images=images,
            grid=grid,
            entered=sizes.shape[1],
            prefix=self.sites.prefix,
            blocks=len(self.sites.blocks),
            sizes=sizes,
            notes=[{} for _ in self.methods],
        )

    # ---- inside a block, in order of execution -------------------------------------------------

    def _shorten_call(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        """Per-token arguments of the block, such as rotary tables, for the tokens that are left."""
        st, gather = self.running, self.sites.blocks[i].gather
        if st is None or st.tokens is None or gather is None:
            return None
        return gather((args, kwargs), st.tokens.keep)

    def _attention(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        """Remember what queries and keys come from; add the key bias."""
        st, site = self.running, self.sites.blocks[i]
        if st is None:
            return None
        call = (args, kwargs)
        bias = self._key_bias(st) if i <= self.last_read else None
        keys = _Keys(site, call)
        hidden = None if site.masked is None else site.masked(call)
        seen = bias if hidden is None else hidden if bias is None else bias + hidden
        st.projections[i] = Projections(
            partial(site.query, call), keys, site.scale, seen, mean=keys.mean
        )
        if bias is None:
            return None
        if site.bias is None:
            raise no_mask(self.sites.tower)
        return site.bias(call, bias)

    def _key_bias(self, st: VisionState) -> Tensor | None:
        """(B, T): log size of merged tokens (proportional attention), -inf on padding slots."""
        bias = st.sizes.log() if self.proportional and st.merged else None
        valid = None if st.tokens is None else st.tokens.valid
        if valid is None:
            return bias
        bias = torch.zeros_like(st.sizes) if bias is None else bias
        return bias.masked_fill(~valid.to(bias.device), -torch.inf)

    def _keys(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Keep a reference to the keys that attention has projected."""
        st = self.running
        if all(module is not child for child in self.sites.blocks[i].attn.children()):
            return  # an adapter (PEFT) has been put around it since: its output is not all
        if st is not None and i in st.projections and isinstance(st.projections[i].key, _Keys):
            st.projections[i].key.output = output  # type: ignore[attr-defined]

    def _middle(self, i: int, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Between attention and MLP: shorten what the second norm and the MLP see."""
        st = self.running
        if st is None:
            return None
        with self.record.clock.measure("method"):
            x, reduction, merged = self._act(st, i, self.middle, args[0])
            if reduction is None:
                return None
            st.pending = reduction, x - reduction.select(args[0]) if merged else None
        return (x, *args[1:])

    def _put_back(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Give the MLP's output the length of the residual; only survivors' rows matter."""
        st = self.running
        if st is None or st.pending is None:
            return None
        with self.record.clock.measure("method"):
            reduction = st.pending[0]
            return scatter_tokens(output, reduction.keep, reduction.source_count)

    def _end_block(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the survivors out of the block's output; then methods that act on the output."""
        st = self.running
        if st is None:
            return None
        stock = x = output[0] if isinstance(output, tuple) else output
        with self.record.clock.measure("method"):
            if st.pending is not None:
                reduction, correction = st.pending
                st.pending = None
                x = reduction.select(x)
                x = x if correction is None else x + correction
            x, _, _ = self._act(st, i, self.output, x)
            st.left[i] = x.shape[1]
            if i not in self.captured:
                st.projections.pop(i, None)  # frees keys and norms of this block
            if self.projector is None and i == self.feature_block:
                x = self.features.finish(st, x)
                if self.refill and st.tokens is not None:
                    x = st.tokens.expand(x)
                self.finite.check()
        if x is stock:
            return None
        return (x, *output[1:]) if isinstance(output, tuple) else x

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Behind the last block."""
        if self.state is not None:
            self.state.encoded = True

    def _act(
        self, st: VisionState, i: int, steps: list[Step], x: Tensor
    ) -> tuple[Tensor, Reduction | None, bool]:
        """Ask the methods, in order, and reduce x (B, T, C): (x, what was done to it, merged)."""
        refuse_graph(self.methods)
        done, merged = None, False
        for j, m in steps:
            view = VisionView(
                x=x,
                layer=i,
                depth=self.feature_block + 1,
                prefix=st.prefix,
                has_cls=self.sites.has_cls,
                size=st.sizes,
                total=st.grid[0] * st.grid[1],
                grid=st.grid,
                projections=st.projections[i],
                scratch=st.notes[j],
                places=None if st.reduction is None else st.reduction.keep.to(x.device),
                valid=None if st.tokens is None else st.tokens.valid,
            )
            reduction, tokens = split_answer(
                self.finite.ask(m.on_vision_layer, view, m.name, "vision", i)
            )
            if reduction is None or is_identity(reduction):
                continue
            if view.valid is not None:
                check_ragged(m, [m for _, m in self.inside], i)
            st.follow(x.device)
            x, sizes = apply_method(m, reduction, x, st.sizes, tokens)
            st.advance(reduction, sizes, i)
            st.merged |= m.merges and m.track_size
            merged |= m.merges or tokens is not None
            done = reduction if done is None else done.then(reduction)
        return x, done, merged
