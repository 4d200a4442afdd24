# SPDX-License-Identifier: Apache-2.0
"""The engine of everything inside the LLM: one pre-hook on every decoder layer.

Layer 0 is the projector boundary: rows of image features that the vision side marked with NaN are
dropped there; methods of the "decoder" stage drop more between layers. Hugging Face computes mask,
positions and rotary tables once at full size; the hooks gather their rows and columns for the
tokens that are left. State of one forward sits on one `Forward` object, state that outlives it
only on the cache layers (vtc.cache).
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from ...adapters.base import DecoderSites
from ...cache import pruned as kv
from ...errors import UnsupportedError
from ...hooks import attention_rows
from ...hooks.attention_patch import Around
from ...hooks.per_thread import PerThread, Threaded
from ...method import Method, split_answer
from ...reduction import Reduction, gather_tokens
from ...transformers_contract import (
    CACHE,
    DEEPSTACK,
    DEEPSTACK_MASK,
    EMBEDS,
    HIDDEN,
    IDS,
    LAST,
    MASK,
    TABLES,
    VIDEOS,
    ModelOutput,
    cache_given,
    cache_left,
    check_filled,
    encoded_images,
    features_of,
)
from ...views.decoder import DecoderView
from ..finite import Finite
from ..record import Choice, Recording, Records
from ..refusals import (
    check_language_model,
    check_layers,
    check_packs,
    check_recomputing,
    refuse_graph,
)
from .bypass import Aside
from .cache_stage import CacheStage
from .carry import Carried, features_left, take_notes
from .forward import Forward
from .layer_arguments import Arguments
from .prompt import Layout, even_images, in_prompt_order, split_images, split_lengths, split_packed

_Pending = tuple[dict[str, Tensor], Tensor | None, Layout | None]
"""Of a prompt: by modality (B, L) where its placeholders stand; its mask; its layout."""


class DecoderEngine(Recording, Threaded):
    """Installs the hooks on a language model and runs the methods' decoder and cache stages."""

    pending: PerThread[_Pending | None] = PerThread(lambda: None)
    carried: PerThread[Carried] = PerThread(dict)
    # Images of this forward where the projector ran in it; features left of each, None: all.
    encoded: PerThread[int | None] = PerThread(lambda: None)
    left: PerThread[int | None] = PerThread(lambda: None)
    # By modality, rows of each packed image of this forward in the order of its placeholders.
    lengths: PerThread[dict[str, list[int]]] = PerThread(dict)
    # The pixels of the video that is being encoded.
    video: PerThread[weakref.ref[Tensor] | None] = PerThread(lambda: None)
    made: PerThread[set[tuple[str, int]]] = PerThread(set)  # by modality, rows of whole images
    forward: PerThread[Forward | None] = PerThread(lambda: None)
    # (B, logical length) of this forward, False on padding.
    mask: PerThread[Tensor | None] = PerThread(lambda: None)
    filling: PerThread[Any] = PerThread(lambda: None)  # the cache that this forward fills

    def __init__(
        self, sites: DecoderSites, methods: tuple[Method, ...], sentinel: bool, records: Records
    ) -> None:
        """
        Args:
            sites: where things are.
            methods: in the order they are applied.
            sentinel: whether dropped feature rows may arrive as NaN at layer 0.
            records: what the report reads; a new forward replaces its contents.
        """
        self.sites, self.methods, self.sentinel, self.records = sites, methods, sentinel, records
        self.layers: list[Any] = list(sites.decoder.layers)
        self.on_decoder = [
            (i, m, frozenset(m.decoder_layers(len(self.layers))))
            for i, m in enumerate(methods)
            if "decoder" in m.stages
        ]
        self.on_bypass = [
            (i, m, frozenset(m.bypass_layers(len(self.layers))))
            for i, m in enumerate(methods)
            if "bypass" in m.stages
        ]
        self.renumbers = any(m.positions == "compact" for m in methods)
        # Whether only those lengths tell which placeholders are one image.
        self.by_length = sites.crops is not None or (
            sites.grids is not None and sites.tokens_per_image is None
        )
        self.finite = Finite("prompt")
        self.cache_stage = CacheStage(methods, len(self.layers), records, self.finite)
        self.arguments = Arguments(sites.decoder, self.renumbers)
        self.handles: list[Any] = []
        self.taps: list[attention_rows.Tap] = []
        self.around: Around | None = None
        check_language_model(sites, self.renumbers)
        check_layers(self.layers, self.on_decoder, self.on_bypass)
        check_packs([m for _, m in self.cache_stage.methods])

    # ---- lifetime --------------------------------------------------------------------------------

    def install(self) -> None:
        sites, handles = self.sites, self.handles
        handles.append(sites.base.register_forward_pre_hook(self._base_pre, with_kwargs=True))
        handles.append(sites.base.register_forward_hook(self._base_post, always_call=True))
        handles.append(sites.decoder.register_forward_pre_hook(self._lm_pre, with_kwargs=True))
        handles.append(
            sites.decoder.register_forward_hook(self._lm_post, with_kwargs=True, prepend=True)
        )
        if not self.methods:
            return
        for i, layer in enumerate(self.layers):
            before = partial(self._layer_pre, i)
            handles.append(layer.register_forward_pre_hook(before, with_kwargs=True))
            if self.cache_stage.methods or self.on_bypass:
                after = partial(self._layer_post, i)
                handles.append(layer.register_forward_hook(after, with_kwargs=True, prepend=True))
            if any(m.bypass == "attention" for _, m, _ in self.on_bypass):
                attn = layer.self_attn
                handles.append(attn.register_forward_pre_hook(self._attn_pre, with_kwargs=True))
                handles.append(attn.register_forward_hook(self._attn_post, prepend=True))
        if self.on_decoder or self.on_bypass or self.cache_stage.noting:
            attentions = [layer.self_attn for layer in self.layers]
            self.taps, self.around = attention_rows.install(attentions)
            if any("sublayers" in m.needs for _, m, _ in self.on_decoder + self.on_bypass):
                for layer, t in zip(self.layers, self.taps, strict=True):
                    for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                        hook = partial(self._sublayer_post, t, name)
                        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.around is not None:
            attention_rows.remove(self.around)
        self._forget()
        self.taps, self.around = [], None
        self.carried = {}

    def _forget(self) -> None:
        """Let go of the forward that has ended, or that an interrupt has ended before."""
        self.pending = self.forward = self.mask = self.filling = None
        self.arguments.last_mask = None
        self.finite.flags.clear()
        for t in self.taps:
            t.clear()

    # ---- the base model: which tokens are visual -------------------------------------------------

    def _refuse_graph(self) -> None:
        refuse_graph(self.methods)
        packed = self.sites.crops is not None or self.sites.grids is not None
        if packed and torch.compiler.is_compiling() and self.methods:
            raise UnsupportedError(
                "images in crops, tiles or of any size differ in their number of tokens, so "
                "torch.compile has no one graph for a wrapped model; compile without "
                "fullgraph=True, or compile the stock model and call it on vtc.compress_inputs(...)"
            )

    def _base_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._refuse_graph()
        self._forget()
        ids = args[0] if args else IDS.of(kwargs)
        encoded = encoded_images(module, kwargs)
        if (
            self.sites.video
            and self.sites.videos is None
            and (encoded.get("video") is not None or VIDEOS.of(kwargs) is not None)
        ):
            raise UnsupportedError(
                f"{type(module).__name__}: videos of this model are not supported, only images; "
                "call vtc.unwrap(model) for this prompt"
            )
        visual = {"image": self._placeholders(ids, kwargs, self.sites.token_ids)}
        if self.sites.videos is not None:
            visual["video"] = self._placeholders(ids, kwargs, self.sites.video_ids)
        if self.by_length:
            # None until the features are made, within this forward.
            self.lengths = {
                kind: [prod(f.shape[:-1]) for f in features_of(output, module)]
                for kind, output in encoded.items()
                if kind in visual and output is not None
            }
            whole = {layout.length for layout in self.record.grids or ()}
            if whole and not whole.issuperset(self.lengths.get("image", ())):
                raise UnsupportedError(
                    f"got the features of {sum(self.lengths['image'])} image tokens that are not "
                    "whole images: part of an image in one forward (chunked prefill) cannot be "
                    "compressed; prefill in one piece, or use vtc.compress_inputs"
                )
        mask = MASK.of(kwargs)
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.encoded, layout = None, None
        if torch.compiler.is_compiling():
            given = encoded.get("image")
            self.encoded = None if given is None else len(features_of(given, module))
        elif not self.by_length and len(visual) == 1 and _has_images(visual["image"]):
            layout = self._layout(visual["image"])
        self.pending = (visual, self.mask, layout)

    def _placeholders(
        self, ids: Tensor | None, kwargs: dict[str, Any], tokens: tuple[int, ...]
    ) -> Tensor:
        """(B, L) bool, where these tokens stand in the prompt."""
        if ids is not None:
            visual = torch.zeros_like(ids, dtype=torch.bool)
            for token in tokens:
                visual |= ids == token
            return visual
        embeds = EMBEDS.of(kwargs)
        table = self.sites.base.get_input_embeddings()
        visual = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        for token in tokens:
            row = table(torch.tensor(token, device=embeds.device)).to(embeds.dtype)
            visual |= (embeds == row).all(-1)
        return visual

    def _split(
        self, masks: dict[str, Tensor], embeds: Tensor
    ) -> tuple[list[list[int]], Tensor, Tensor, list[list[str]], Tensor | None]:
        """Which placeholder is which token of which image, and (B, L) those that are newlines."""
        sites, parts = self.sites, {}
        separators: list[Tensor] = []
        for kind, mask in masks.items():
            lengths = self.lengths.get(kind, [])
            if not self.by_length:
                parts[kind] = split_images(mask, sites.tokens_per_image)
            elif kind == "video" or sites.crops is None:
                self._check_whole(kind, mask, lengths)
                parts[kind] = split_lengths(mask, lengths)
                grids: Any = sites.videos if kind == "video" else sites.grids
                if grids.newlines:
                    images, image, position = parts[kind]
                    table = torch.tensor([n for row in images for n in row], device=mask.device)
                    every = torch.zeros_like(position)
                    every[mask] = table.repeat_interleave(table)
                    ends = mask & (position >= every - grids.newlines)
                    images = [[n - grids.newlines for n in row] for row in images]
                    parts[kind] = images, image.where(~ends, -1), position.where(~ends, 0)
                    separators.append(ends)
            else:
                newline = sites.crops.newline().to(embeds)
                ends = mask & (embeds == newline).all(-1).to(mask.device)
                parts[kind] = split_packed(mask, ends, lengths, prod(sites.crops.side))
                separators.append(ends)
        separator = torch.stack(separators).any(0) if separators else None
        return *in_prompt_order(parts), separator

    def _check_whole(self, kind: str, mask: Tensor, lengths: list[int]) -> None:
        """Refuse features that a chunked prefill has cut up: at an end, and of no length made."""
        known = {n for made, n in self.made if made == kind}
        if known and not known.issuperset(lengths) and bool(mask[:, [0, -1]].any()):
            raise UnsupportedError(
                f"found features of {kind}s of {min(set(lengths) - known)} rows at an end of the "
                f"prompt, where whole ones have {sorted(known)}: part of one in one forward "
                "(chunked prefill) cannot be compressed; prefill in one piece"
            )

    def _base_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forget()

    # ---- the language model: phase, checks, aligned output -------------------------------------

    def _lm_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_graph()
        embeds, cache = EMBEDS.of(kwargs), cache_given(module, args, kwargs)
        masks, mask, layout = self.pending or ({}, MASK.of(kwargs), None)
        self.pending = self.forward = self.arguments.last_mask = None
        self.record.clock.started.clear()  # of a forward that failed
        if self.by_length:  # not placeholders without features
            masks = {kind: m for kind, m in masks.items() if kind in self.lengths}
        visual = torch.stack(list(masks.values())).any(0) if masks else None
        if visual is not None and layout is None and torch.compiler.is_compiling():
            layout = self._even_layout(visual)  # the base model is compiled, too
            visual = None if layout is None else visual
        if visual is not None and embeds.shape[1] > 1 and (layout or bool(visual.any())):
            if self.methods:
                kv.check_cache(cache, evicts=bool(self.cache_stage.methods))
                check_recomputing(self.sites.decoder, self.layers, self.on_bypass)
            real = torch.ones_like(visual)
            if mask is not None and mask.dim() == 2:
                real = mask[:, -embeds.shape[1] :].bool().to(visual.device)
            if self.sites.delimited and bool(visual[:, [0, -1]].any()):
                raise UnsupportedError(
                    "found image tokens at an end of the prompt, and this model has others in "
                    "front of and behind each image: part of an image in one forward (chunked "
                    "prefill) cannot be compressed; prefill in one piece, or use "
                    "vtc.compress_inputs"
                )
            if layout is None:
                images, image, position, kinds, separator = self._split(masks, embeds)
            else:
                (images, image, position), separator = layout, None
                kinds = [["image"] * len(row) for row in images]
            if separator is not None:
                visual = visual & ~separator
            base = int(cache.get_seq_length()) if cache is not None else 0
            totals = {sum(row) for row in images}
            count = totals.pop() if len(totals) == 1 else None
            if count is None and torch.compiler.is_compiling():
                raise UnsupportedError(
                    "torch.compile needs as many visual tokens in every prompt, so that lengths "
                    "are known beforehand; run these one by one, or without fullgraph=True"
                )
            self.forward = Forward(
                base,
                embeds.shape[1],
                real,
                visual,
                image,
                position,
                images,
                kinds,
                count,
                self.renumbers,
                separator,
            )
            self.record.begin(self.forward.tokens, real, images, kinds, separator, base)
            self.record.clock.start("prefill")
            if self.methods and DEEPSTACK.of(kwargs) is not None:
                # The model would add them by a mask at full size; `_layer_pre` does it instead.
                self.forward.deepstack = DEEPSTACK_MASK.of(kwargs), DEEPSTACK.of(kwargs)
                kwargs = dict(kwargs)
                DEEPSTACK_MASK.put(kwargs, None)
                DEEPSTACK.put(kwargs, None)
                return args, kwargs
        elif embeds.shape[1] == 1:
            self.record.clock.start("decode")
        return None

    def _layout(self, visual: Tensor) -> Layout:
        return split_images(visual, self.sites.tokens_per_image)

    def _even_layout(self, visual: Tensor) -> Layout | None:  # pragma: no cover (traced)
        """Under torch.compile, the layout that shapes tell; None without images."""
        if self.encoded is None or visual.shape[1] == 1:
            return None
        each = self.sites.tokens_per_image
        if each is None:
            raise UnsupportedError(
                "torch.compile of the whole model needs images of one size, whose number of tokens "
                "is known beforehand; compile the language model alone "
                "(model.get_decoder().compile()), or the stock model on vtc.compress_inputs"
            )
        return even_images(visual, self.encoded, each)

    def _lm_post(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        st = self.forward
        named = isinstance(output, ModelOutput)
        cache = cache_left(output) if named else CACHE.of(kwargs)
        if self.methods and not torch.compiler.is_compiling():
            check_filled(module, cache, self.filling)
        if cache is not None and self.cache_stage.acts(st):
            with self.record.clock.measure("method"):
                self.cache_stage.run(st, cache, self.mask)
        self.finite.check()
        self.record.clock.stop("decode")
        self.record.clock.stop("prefill")
        if st is not None:
            slots = [] if torch.compiler.is_compiling() else kv.slots_of(cache)  # not in a graph
            for layer in getattr(cache, "layers", []):
                if isinstance(layer, kv.PrunedMixin):
                    layer.trim()
            held = (0, 0) if torch.compiler.is_compiling() else kv.cache_bytes(cache)
            self.record.end(st.tokens, held, slots)
        kv.finish(self.filling)
        if st is None or st.local is None:
            return None
        # Callers index logits by the positions of the prompt they passed, so the output is laid out
        # like the input; rows of dropped tokens are zeros. Except the last: generate() goes on from
        # there, and behind a prompt that ends in a dropped image token that is the last token left.
        short = output[0]
        last = short[:, -1]
        if st.filler is not None:
            filler = st.filler.to(short.device)
            short = short.masked_fill(filler.unsqueeze(-1), 0)
            last = gather_tokens(short, (~filler).long().cumsum(1).argmax(1, keepdim=True))[:, 0]
        full = short.new_zeros(short.shape[0], st.length, short.shape[2])
        index = st.local.to(short.device).unsqueeze(-1).expand_as(short)
        full = full.scatter(1, index, short)
        full[:, -1] = last
        if named:
            output[LAST.among(output)] = full
            return output
        return (full, *output[1:])

    # ---- decoder layers ------------------------------------------------------------------------

    def _layer_pre(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._refuse_graph()
        st, cache = self.forward, cache_given(module, args, kwargs)
        if self.taps:
            self.taps[i].open = True
        if i == 0 and not torch.compiler.is_compiling():
            kv.begin(cache)
            self.filling = cache
        if i == 0 and st is not None and cache is not None:
            kv.widen(cache)
        layer: Any = kv.existing_pruned(cache, i)
        if st is None and layer is None:
            return None
        plain = st is None and layer.filler is None and layer.shift is None
        if plain and MASK.of(kwargs) is None:  # decoding: every key is seen
            return None
        hidden, rest = (args[0], args[1:]) if args else (HIDDEN.take(kwargs), ())
        active = st
        if st is not None:
            hidden = self._deepstack(i, st, hidden)
            with self.record.clock.measure("method"):
                hidden = self._reduce(i, st, hidden, cache, kwargs)
                active, hidden = self._step_aside(i, st, hidden, cache, kwargs)
                if i > 0 and self.taps:
                    self.taps[i - 1].clear()
            if cache is not None and (
                active.local is not None or kv.overflows(cache, i, st.base + st.length)
            ):
                layer = kv.pruned_layer(cache, i, hidden.shape[0], hidden.device)
        if layer is not None or (active is not None and active.local is not None):
            kwargs = self.arguments.gathered(i, active, hidden, layer, kwargs)
            if active is not None and layer is not None:
                layer.append(
                    active.columns(hidden),
                    active.visual.to(hidden.device),
                    None if active.filler is None else active.filler.to(hidden.device),
                    active.base + active.length,
                )
        if st is not None and st.aside is not None and st.aside.over == "attention":
            hidden = st.aside.hidden  # the MLP acts on all tokens; `_attn_pre` takes the part
        return (hidden, *rest), kwargs

    @staticmethod
    def _deepstack(i: int, st: Forward, hidden: Tensor) -> Tensor:
        """Add what belongs to layer i - 1 to the input of layer i, for the tokens that are left."""
        if st.deepstack is None or not 0 < i <= len(st.deepstack[1]):
            return hidden
        mask, rows = st.deepstack[0].to(hidden.device), st.deepstack[1][i - 1].to(hidden)
        full = hidden.new_zeros(*mask.shape, hidden.shape[2])
        full[mask] = rows
        if st.local is not None:
            full = gather_tokens(full, st.local.to(hidden.device))
        return hidden + full

    def _step_aside(
        self, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Forward, Tensor]:
        """The state and hidden states of the tokens that take part in layer i; usually all."""
        st.aside = None
        for index, method, layers in self.on_bypass:
            if i not in layers:
                continue
            view = self._method_view(index, i, st, hidden, cache, kwargs)
            reduction = self.finite.ask(method.on_bypass, view, method.name, "bypass", i - 1)
            if reduction is None:
                continue
            part = replace(st, scratch={}, memos={}, memo={})
            short = part.drop(hidden, view, reduction)
            here: Any = part.local
            if st.local is not None:
                rows = st.local.to(hidden.device).contiguous()
                here = torch.searchsorted(rows, part.local.contiguous())  # type: ignore[union-attr]
            part.shift = None if st.shift is None else gather_tokens(st.shift, here)
            part.lost = st.lost
            st.aside = Aside(hidden, here, part.filler, method.bypass)
            st.partial.add(i)
            processed = st.tokens if method.bypass == "attention" else part.tokens
            self.record.layer(i, processed, part.tokens)
            self._note_choice(i, view, reduction, bypass=True)
            return part, short
        self.record.layer(i, st.tokens, st.tokens)
        return st, hidden

    def _note_choice(
        self, i: int, view: DecoderView, reduction: Reduction, bypass: bool = False
    ) -> None:
        choice = Choice(i, view.image, view.position, view.valid, reduction, bypass)
        self.record.choices.append(choice)

    def _attn_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Only some tokens enter the attention of this layer."""
        st = self.forward
        if st is None or st.aside is None:
            return None
        if args:
            return (gather_tokens(args[0], st.aside.index), *args[1:]), kwargs
        kwargs = dict(kwargs)
        HIDDEN.put(kwargs, gather_tokens(HIDDEN.of(kwargs), st.aside.index))
        return args, kwargs

    def _attn_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The others get nothing from it: the residual carries them to the MLP."""
        st = self.forward
        if st is None or st.aside is None:
            return None
        part = output[0] if isinstance(output, tuple) else output
        full = st.aside.back(part, torch.zeros_like(st.aside.hidden))
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _reduce(
        self, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Drop sentinel rows before layer 0, then what the methods ask for after layer i - 1."""
        st.ran = st.local
        if i == 0 and self.sentinel:
            view = self._view(-1, st, hidden, {}, {})
            left = features_left(st, view, self.left)
            if left is not None:
                hidden = st.drop(hidden, view, left)
        if i == 0:
            self.record.entered = st.tokens
            present = {kind for row in st.kinds for kind in row}
            carried = {kind: x for kind, x in self.carried.items() if kind in present}
            if carried:
                take_notes(st, self._view(-1, st, hidden, {}, {}), carried)
        for index, method, layers in self.on_decoder:
            if i - 1 not in layers:
                continue
            view = self._method_view(index, i, st, hidden, cache, kwargs)
            reduction, tokens = split_answer(
                self.finite.ask(method.on_decoder_layer, view, method.name, "decoder", i - 1)
            )
            if reduction is not None:
                self._note_choice(i, view, reduction)
                if tokens is None and method.merges:
                    tokens = reduction.merge(view.tokens)[0]
                hidden = st.drop(hidden, view, reduction, tokens)
        return hidden

    def _method_view(
        self, index: int, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> DecoderView:
        """What method ``index`` sees in front of layer i."""
        view = self._view(
            i - 1,
            st,
            hidden,
            st.scratch.setdefault(index, {}),
            st.memos.setdefault(index, {}),
            lambda: self._ahead(i, st, hidden, cache, kwargs),
        )
        if st.local is not st.ran:
            left: Any = st.local
            view.ran = left if st.ran is None else torch.searchsorted(st.ran.contiguous(), left)
            view.ran = view.ran.to(hidden.device)
        return view

    def _ahead(
        self, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> attention_rows.Ahead:
        """Attention of layer i, which has not run yet, on the tokens that are left now."""
        layer, stored, past = self.layers[i], kv.existing_pruned(cache, i), None
        if stored is not None or st.local is not None:
            kwargs = self.arguments.gathered(i, st, hidden, stored, kwargs, commit=False)
        if cache is not None and i < len(cache.layers) and cache.layers[i].get_seq_length():
            past = cache.layers[i].keys if stored is None else stored.unpacked()[0]
        tables, mask = TABLES.of(kwargs), MASK.of(kwargs)
        return attention_rows.Ahead(
            layer.self_attn, layer.input_layernorm(hidden), tables, mask, past
        )

    def _view(
        self,
        layer: int,
        st: Forward,
        hidden: Tensor,
        scratch: dict[str, Tensor],
        memo: dict[str, Tensor],
        ahead: Any = None,
    ) -> DecoderView:
        visual = st.visual.to(hidden.device)
        separator = None if st.separator is None else st.separator.to(hidden.device)
        other = visual if separator is None else visual | separator
        index, valid = st.visual_places(hidden.device)
        readable = bool(self.taps) and layer >= 0 and layer not in st.partial
        return DecoderView(
            hidden=hidden,
            layer=layer,
            depth=len(self.layers),
            visual=visual,
            text=st.real.to(hidden.device) & ~other,
            separator=separator,
            visual_index=index,
            valid=valid,
            image=st.image.to(hidden.device).gather(1, index),
            position=st.position.to(hidden.device).gather(1, index),
            images=st.images,
            tap=self.taps[layer] if readable else attention_rows.no_tap,
            ahead=ahead,
            memo=memo,
            scratch=scratch,
            unnoted=st.unnoted,
        )

    # ---- behind a layer, and the KV cache stage ------------------------------------------------

    def _layer_post(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        st, cache = self.forward, CACHE.of(kwargs)
        if cache is not None and self.cache_stage.acts(st):
            with self.record.clock.measure("method"):
                t = self.taps[i] if self.taps else None
                self.cache_stage.note(i, st, cache, self.mask, t)
        if st is None or st.aside is None or st.aside.over == "attention":
            return None
        part = output[0] if isinstance(output, tuple) else output
        full = st.aside.back(part, st.aside.hidden)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _sublayer_post(
        self,
        t: attention_rows.Tap,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        given = args[0] if args else HIDDEN.of(kwargs)
        t.sublayers[name] = (given, output[0] if isinstance(output, tuple) else output)


def _has_images(visual: Tensor) -> bool:
    """Whether a prompt, not a decoded token, holds placeholders."""
    return visual.shape[1] > 1 and bool(visual.any())
