# SPDX-License-Identifier: Apache-2.0
"""The engine of everything on the encoder side: pixels, encoder blocks and image features.

A block is ``x = x + f(attn(norm1(x)))`` and then ``x = x + g(mlp(norm2(x)))``, with the residual of
the second half taken before norm2, so no single hook can shorten it. Three can: the pre-hook of
norm2 hands the shortened tokens to the MLP, the hook of the MLP puts its rows back to the places of
the survivors, and the hook of the block takes the survivors out of the sum and corrects them by
what merging changed: ``x[keep] + g(y) + (merged - x[keep]) = merged + g(y)``, the exact block on
merged tokens. Behind the encoder the survivors return to the grid position of their representative,
all other rows hold NaN, and the LLM engine drops those; so nothing between the two must know.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...adapters.base import BlockSites, Call, GridSites, VisionSites
from ...errors import UnsupportedError
from ...hooks.per_thread import PerThread, Threaded
from ...method import Method, split_answer
from ...reduction import Reduction
from ...registry import known_methods
from ...views.features import FeaturesView
from ...views.projections import Projections
from ...views.vision import VisionView
from ..encoding import VisionState
from ..finite import Finite
from ..record import Recording, Records
from ..refusals import refuse_graph
from .cross_attention_mask import Readers
from .reductions import apply_method, behind_prefix, resample, scatter_tokens

Step = tuple[int, Method]
"""A method and its place in the chain."""


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

    taken: PerThread[GridSites | None] = PerThread(lambda: None)  # of the video encoded now

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
        self.packs = packs
        self.methods = methods
        self.feature_block = feature_block
        self.projector = projector
        self.records = records or Records()
        self.finite = Finite("image or crop" if packs else "image")
        self.handles: list[Any] = []
        steps = list(enumerate(methods))
        self.resizing = [s for s in steps if "pixels" in s[1].stages]
        inside = [s for s in steps if "vision" in s[1].stages]
        self.middle = [s for s in inside if s[1].vision_site == "middle"]
        self.output = [s for s in inside if s[1].vision_site == "output"]
        self.inside = inside
        self.behind = [s for s in steps if "features" in s[1].stages]
        self.proportional = any(getattr(m, "proportional_attention", False) for _, m in inside)
        depth = len(sites.blocks)
        self.captured = {layer % depth for _, m in self.behind for layer in m.captures(depth)}
        if grids is not None and grids.whole is not None:
            self.captured |= set(map(grids.whole, self.captured))
        self.last_read = max([feature_block, *self.captured])
        acting = [m for _, m in inside + self.behind]
        self.refill = (
            projector is None and sites.pool in ("mean", "map") and all(m.merges for m in acting)
        )
        self._check()

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
    def joining(self) -> GridSites | None:
        """How the tokens that are being encoded are joined."""
        return self.taken or self.grids

    # ---- checks --------------------------------------------------------------------------------

    def _check(self) -> None:
        here = {"pixels", "vision", "features"}
        self._check_inside()
        inside = set() if self._closed else {"pixels", "vision"}
        if not self.sites.has_cls:
            for m in self.methods:
                if "cls" in m.needs and m.stages & here:
                    usable = _names(
                        lambda c: "cls" not in c.needs and c().stages <= inside | {"features"}
                    )
                    own = ", ".join(f"{k}={v!r}" for k, v in m.without_cls.items())
                    raise UnsupportedError(
                        f"{m.name} needs a [CLS] token and {self._tower} has none; "
                        + (f"give it {own}, its substitute, or use " if own else "")
                        + f"methods that do without: {usable}"
                    )
        if self.resizing and self.sites.resize is None:
            usable = _names(lambda c: c().stages <= here - {"pixels"})
            raise UnsupportedError(
                f"{self.resizing[0][1].name} resizes the image and {self._tower} takes one size "
                f"only (timm: create the model with dynamic_img_size=True); others: {usable}"
            )
        for m in self.methods:
            if self.packs and m.stages <= {"pixels", "vision"} and m.keep_tokens is not None:
                raise UnsupportedError(
                    f"{m.name} chooses tokens inside the encoder, in every crop alike, and images "
                    "have different numbers of crops here; give keep_ratio instead of keep_tokens"
                )
        blocks = self.sites.blocks[: self.feature_block + 1]
        if self.proportional and any(site.bias is None for site in blocks):
            raise UnsupportedError(
                "proportional attention adds the log of token sizes to scores, the attention of "
                f"{self._tower} takes no mask; give proportional_attention=False, or load the "
                'model with attn_implementation="sdpa" (DINOv2 and ViT: transformers 5.18 or newer)'
            )

    def _check_recomputing(self) -> None:
        """Refuse activation checkpointing of blocks in which tokens leave."""
        for module in self.sites.tower.modules():
            on = getattr(module, "gradient_checkpointing", False) and module.training
            if on or getattr(module, "grad_checkpointing", False):
                names = " and ".join(m.name for _, m in self.inside)
                raise UnsupportedError(
                    f"gradient checkpointing runs a block of {self._tower} again in the backward "
                    f"pass, and {names} has removed tokens inside it by then; enable it on the "
                    "language model alone (model.get_decoder().gradient_checkpointing_enable()), "
                    "or use a method that acts behind the encoder"
                )

    @property
    def _closed(self) -> str:
        """Why no token may leave before or inside the encoder; empty where they may."""
        fold = 1 if self.grids is None else self.grids.fold
        if fold > 1:
            return (
                f"the model joins {fold} x {fold} patches behind the encoder to one LLM token, "
                "which needs all of them"
            )
        return self.sites.whole

    def _check_inside(self) -> None:
        """Refuse methods inside an encoder that must keep all of its tokens."""
        acting, why = self.resizing + self.inside, self._closed
        if not acting or not why:
            return
        m = acting[0][1]
        own = ", ".join(f"{k}={v!r}" for k, v in m.outside_encoder.items())
        own = own and f"give it {own}, with which it does not, or "
        if self.resizing and self.grids is not None and self.grids.packed:
            own = "give the processor a smaller max_pixels, or "
        raise UnsupportedError(
            f"{m.name} takes tokens away before or inside the encoder, and {why}; {own}use "
            + f"methods that act behind the encoder: {self.behind_encoder}"
        )

    @property
    def behind_encoder(self) -> str:
        """Names of the methods that leave the tokens inside this encoder alone."""
        stages = {"features", "decoder", "bypass", "cache"}
        stages = stages if self.projector is not None else {"features"}
        cls = self.sites.has_cls
        return _names(
            lambda c: c().stages <= stages and (cls or c.without_cls or "cls" not in c.needs)
        )

    @contextmanager
    def taking(self, grids: GridSites | None) -> Iterator[None]:
        """While the frames of a video are encoded, which the model joins as ``grids`` says; or
        images, None."""
        self.taken = grids
        try:
            yield
        finally:
            self.taken = None

    @property
    def _tower(self) -> str:
        return type(self.sites.tower).__name__

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
        if self.projector is not None:
            source = self.projector if self.grids is None else self.grids.source
            if self.behind or self.packs:
                add(source.register_forward_pre_hook(self._features))
            if self.grids is None:
                add(self.projector.register_forward_hook(self._spread, prepend=True))

    def remove(self) -> None:
        """Take all hooks out again."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _measured(self) -> AbstractContextManager[Any]:
        return self.record.clock.measure("method")

    # ---- before the first block ----------------------------------------------------------------

    def _begin(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Call | None:
        """Start a fresh state, whatever the last forward left; resize the image if asked to."""
        refuse_graph(self.methods)
        self.state = None
        self.finite.flags.clear()
        if self.grids is not None:
            images = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
            self.state = self._joined_state(images[0]) if images else None
            return None
        if self.inside and torch.is_grad_enabled():
            self._check_recomputing()
        place = next((i for i, x in enumerate(args) if _is_image(x)), None)
        name = next((k for k, x in kwargs.items() if _is_image(x)), None)
        if place is None and name is None:
            return None
        pixels: Tensor = args[place] if place is not None else kwargs[str(name)]
        patch, batch = self.sites.patch, len(pixels)
        grid = small = (pixels.shape[2] // patch, pixels.shape[3] // patch)
        for _, m in self.resizing:
            wanted = m.on_pixels(small)
            if wanted is not None and (wanted[0] > small[0] or wanted[1] > small[1]):
                raise ValueError(f"{m.name} asks for a grid of {wanted}, larger than {small}")
            small = small if wanted is None else wanted
        entered = self.sites.prefix + small[0] * small[1]
        state = self.state = VisionState(
            images=batch,
            grid=grid,
            entered=entered,
            prefix=self.sites.prefix,
            blocks=len(self.sites.blocks),
            sizes=torch.ones(batch, entered, device=pixels.device),
            notes=[{} for _ in self.methods],
        )
        if small == grid:
            return None
        state.pixels = resample(grid, small, batch, pixels.device)
        edge = (small[0] * patch, small[1] * patch)
        with self._measured():
            resized = F.interpolate(pixels.float(), edge, mode="bicubic", antialias=True)
        resized = resized.to(pixels.dtype)
        if place is None:
            call = args, {**kwargs, str(name): resized}
        else:
            call = (*args[:place], resized, *args[place + 1 :]), kwargs
        assert self.sites.resize is not None  # checked at construction
        return self.sites.resize(call)

    def _joined_state(self, pixels: Tensor) -> VisionState:
        """State of an encoder that keeps all its tokens; `vtc.engine.vision.grids` knows how many
        there are."""
        return VisionState(
            images=0,
            grid=(0, 0),
            entered=0,
            prefix=self.sites.prefix,
            blocks=len(self.sites.blocks),
            sizes=torch.ones(1, 0, device=pixels.device),
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
            raise UnsupportedError(
                "images keep different numbers of tokens and the attention of "
                f'{self._tower} takes no mask; load the model with attn_implementation="sdpa"'
            )
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
        with self._measured():
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
        with self._measured():
            reduction = st.pending[0]
            return scatter_tokens(output, reduction.keep, reduction.source_count)

    def _end_block(self, i: int, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Take the survivors out of the block's output; then methods that act on the output."""
        st = self.running
        if st is None:
            return None
        stock = x = output[0] if isinstance(output, tuple) else output
        with self._measured():
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
                x = self._finish(st, x)
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
            if reduction is None or _is_identity(reduction):
                continue
            if view.valid is not None and not m.ragged:
                raise UnsupportedError(
                    f"{m.name} takes as many patches of every image, and an earlier method of the "
                    f"chain has left different numbers in front of encoder block {i}; let "
                    f"{m.name} finish in front of that one, have that one treat all images alike "
                    "(mustdrop: batch_coupled=True), or run one image at a time"
                )
            _follow(st, x.device)
            x, sizes = apply_method(m, reduction, x, st.sizes, tokens)
            st.advance(reduction, sizes, i)
            st.merged |= m.merges and getattr(m, "track_size", True)
            merged |= m.merges or tokens is not None
            done = reduction if done is None else done.then(reduction)
        return x, done, merged

    # ---- behind the encoder --------------------------------------------------------------------

    def _choose(self, st: VisionState, features: Tensor) -> tuple[Tensor, Reduction | None]:
        """The features stage on patch features (B, N, C): what is left, and what was done."""
        refuse_graph(self.methods)
        _follow(st, features.device)
        if not st.past_blocks:
            st.notes = st.scratch
            st.past_blocks = True
        done = None
        for j, m in self.behind:
            index = torch.arange(features.shape[1], device=features.device)
            so_far = st.reduction
            if so_far is not None and so_far.valid is not None:
                features, reduction = self._choose_ragged(st, j, m, features, so_far)
                if reduction is not None:
                    done = reduction if done is None else done.then(reduction)
                continue
            view = FeaturesView(
                features=features,
                size=st.size,
                index=index.expand(len(features), -1) if so_far is None else so_far.keep,
                total=st.grid[0] * st.grid[1],
                grid=st.grid,
                scratch=st.notes[j],
                **self.view_arguments(st),
            )
            reduction, tokens = split_answer(
                self.finite.ask(m.on_features, view, m.name, "features")
            )
            if reduction is None or _is_identity(reduction):
                continue
            features, size = apply_method(m, reduction, features, st.size, tokens)
            st.advance(
                behind_prefix(reduction, st.prefix),
                torch.cat([st.sizes[:, : st.prefix], size], 1),
                None,
            )
            done = reduction if done is None else done.then(reduction)
        st.projections = {}
        return features, done

    def _project(self, features: Tensor) -> Tensor:
        """Features (..., C) in the space of the LLM, past all hooks."""
        if self.grids is not None:
            return self.grids.project(features)
        return features if self.projector is None else self.projector.forward(features)

    def view_arguments(self, st: VisionState) -> dict[str, Any]:
        """What all views of the features stage have in common."""
        return {
            "prefix": st.prefix,
            "has_cls": self.sites.has_cls,
            "projector": self._project,
            "layers": st.projections,
            "depth": st.blocks,
        }

    def _choose_ragged(
        self, st: VisionState, j: int, m: Method, features: Tensor, so_far: Reduction
    ) -> tuple[Tensor, Reduction | None]:
        """One method where images have different numbers of tokens: a view for each number."""
        from ...layouts import Region
        from .flat import FlatTokens

        valid: Any = so_far.valid
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
            mask = reduction.valid
            if mask is None:
                mask = torch.ones_like(reduction.keep, dtype=torch.bool)

        def rows(x: Tensor) -> Tensor:
            out = x.new_zeros(*mask.shape, *x.shape[1:])
            out[mask] = x
            return out

        if reduction is not None:
            sizes = torch.cat([st.sizes[:, : st.prefix], rows(flat.size)], 1)
            st.advance(behind_prefix(reduction, st.prefix), sizes, None)
            features = rows(flat.features)
        st.notes[j] = {name: rows(x) for name, x in flat.notes[0].items()}
        return features, reduction

    def _finish(self, st: VisionState, x: Tensor) -> Tensor:
        """The end of an encoder alone, on (B, T, C) with the prefix."""
        if self.behind:
            features, done = self._choose(st, x[:, st.prefix :])
            if done is not None:
                x = torch.cat([x[:, : st.prefix], features], 1)
        if self.refill and st.tokens is not None:
            x = st.tokens.expand(x)
        return x

    def _features(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        """Choose among the patch features before they are projected, unless they are packed."""
        st = self.state
        if st is None or st.projected:
            return None
        if self.joining is not None:
            st.unpacked = args[0]
            return None
        left = st.sizes.shape[1] - st.prefix
        if tuple(args[0].shape[:2]) != (st.images, left):
            raise UnsupportedError(
                f"the projector got features of shape {tuple(args[0].shape)} where {self._tower} "
                f"left {left} patch tokens of {st.images} images; features with prefix tokens "
                '(vision_feature_select_strategy="full") or of several layers are not supported'
            )
        if self.packs:
            st.unpacked = args[0]
            return None
        with self._measured():
            features, done = self._choose(st, args[0])
        return None if done is None else (features, *args[1:])

    def _spread(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Projected survivors (B, K, D) at their places in the grid (B, N, D), NaN elsewhere."""
        st = self.state
        if st is None or st.projected:
            return None
        st.projected = True
        reduction = st.reduction
        valid = None if reduction is None else reduction.valid
        if not (self.packs and self.behind):  # else when they are packed
            self.finite.look_at_projected(output, valid)
        if reduction is None:
            return None
        with self._measured():
            n, keep = reduction.source_count, reduction.keep
            if valid is not None:
                keep = keep.where(valid, n)  # one row more takes the padding slots
            return scatter_tokens(output, keep, n + (valid is not None), torch.nan)[:, :n]


def _follow(st: VisionState, device: torch.device) -> None:
    """Move the state to the device of the tokens."""
    if st.sizes.device != device:  # pragma: no cover (a model over several devices)
        st.sizes = st.sizes.to(device)
        st.tokens = None if st.tokens is None else st.tokens.to(device)
        st.pixels = None if st.pixels is None else st.pixels.to(device)
        st.notes = [{name: x.to(device) for name, x in note.items()} for note in st.notes]


def _is_identity(reduction: Reduction) -> bool:
    """Nothing leaves: as many slots as tokens, all of them valid."""
    return reduction.valid is None and reduction.count == reduction.source_count


def _is_image(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dim() == 4


def _names(wanted: Any) -> str:
    """Methods to use instead; not those that need a text, a video or trained routers."""
    usable = (
        n for n, c in known_methods().items() if not c.needs & {"text", "frames"} and n != "mod"
    )
    return ", ".join(name for name in usable if wanted(known_methods()[name])) or "none"
