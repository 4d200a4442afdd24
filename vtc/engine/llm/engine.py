# SPDX-License-Identifier: Apache-2.0
"""The engine of everything inside the LLM: one pre-hook on every decoder layer.

Layer 0 is the projector boundary: rows of image features that the vision side marked with NaN are
dropped there; methods of the "decoder" stage drop more between layers. Hugging Face computes mask,
positions and rotary tables once at full size; the hooks gather their rows and columns for the
tokens that are left. State of one forward sits on one `Forward` object, state that outlives it
only on the cache layers (vtc.cache).
"""

from __future__ import annotations

from functools import partial
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
from ...reduction import gather_tokens
from ...transformers_contract import (
    CACHE,
    DEEPSTACK,
    DEEPSTACK_MASK,
    EMBEDS,
    HIDDEN,
    IDS,
    LAST,
    MASK,
    ModelOutput,
    cache_given,
    cache_left,
    check_call,
    check_filled,
    encoded_images,
    features_of,
)
from ..finite import Finite
from ..handoff import Handoff
from ..record import Choice, Recording, Records
from ..refusals import (
    check_language_model,
    check_layers,
    check_packs,
    check_recomputing,
    refuse_graph,
)
from .bypass import BypassStage, note_sublayer
from .cache_stage import CacheStage
from .carry import features_left, take_notes
from .forward import Forward
from .layer_arguments import Arguments
from .observer import Observer
from .placeholders import Placeholders
from .prompt import Layout
from .view_factory import ViewFactory

_Pending = tuple[dict[str, Tensor], Tensor | None, Layout | None]
"""Of a prompt: by modality (B, L) where its placeholders stand; its mask; its layout."""


class DecoderEngine(Recording, Threaded):
    """Installs the hooks on a language model and runs the methods' decoder and cache stages."""

    pending: PerThread[_Pending | None] = PerThread(lambda: None)
    forward: PerThread[Forward | None] = PerThread(lambda: None)
    # (B, logical length) of this forward, False on padding.
    mask: PerThread[Tensor | None] = PerThread(lambda: None)
    filling: PerThread[Any] = PerThread(lambda: None)  # the cache that this forward fills

    def __init__(
        self,
        sites: DecoderSites,
        methods: tuple[Method, ...],
        sentinel: bool,
        handoff: Handoff,
        records: Records,
    ) -> None:
        """
        Args:
            sites: where things are.
            methods: in the order they are applied.
            sentinel: whether dropped feature rows may arrive as NaN at layer 0.
            handoff: what the encoder side tells.
            records: what the report reads; a new forward replaces its contents.

        Attributes:
            observers: are told what the engine does.
        """
        self.sites, self.methods, self.sentinel = sites, methods, sentinel
        self.handoff, self.records = handoff, records
        self.observers: list[Observer] = []
        self.layers: list[Any] = list(sites.decoder.layers)
        depth = len(self.layers)
        self.on_decoder = [
            (i, m, frozenset(m.decoder_layers(depth)))
            for i, m in enumerate(methods)
            if "decoder" in m.stages
        ]
        self.renumbers = any(m.positions == "compact" for m in methods)
        self.placeholders = Placeholders(sites, handoff)
        self.finite = Finite("prompt")
        self.cache_stage = CacheStage(methods, depth, records, self.finite)
        self.arguments = Arguments(sites.decoder, self.renumbers)
        self.views = ViewFactory(self.layers, self.arguments)
        self.bypass_stage = BypassStage(methods, depth, records, self.finite, self.views)
        self.handles: list[Any] = []
        self.taps: list[attention_rows.Tap] = []  # of each layer, where a method may read any
        self.around: Around | None = None
        check_language_model(sites, self.renumbers)
        check_layers(self.layers, self.on_decoder, self.bypass_stage.methods)
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
            if self.cache_stage.methods or self.bypass_stage.methods:
                after = partial(self._layer_post, i)
                handles.append(layer.register_forward_hook(after, with_kwargs=True, prepend=True))
            if self.bypass_stage.around_attention:
                attn = layer.self_attn
                handles.append(attn.register_forward_pre_hook(self._attn_pre, with_kwargs=True))
                handles.append(attn.register_forward_hook(self._attn_post, prepend=True))
        acting = self.on_decoder + self.bypass_stage.methods
        if acting or self.cache_stage.noting:
            attentions = [layer.self_attn for layer in self.layers]
            self.taps, self.around = attention_rows.install(attentions)
            self.views.taps = self.taps
        if any("sublayers" in m.needs for _, m, _ in acting):
            for layer, t in zip(self.layers, self.taps, strict=True):
                for name, module in (("attention", layer.self_attn), ("mlp", layer.mlp)):
                    hook = partial(note_sublayer, t, name)
                    handles.append(module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.around is not None:
            attention_rows.remove(self.around)
        self._forget()
        self.taps = self.views.taps = []
        self.around = None
        self.handoff.forget()

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
        self.placeholders.check_videos(module, encoded, kwargs)
        visual = self.placeholders.find(ids, kwargs)
        by_length = self.placeholders.by_length
        if by_length:
            self.placeholders.take_lengths(module, encoded, self.record.grids)
        mask = MASK.of(kwargs)
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.handoff.encoded, layout = None, None
        if torch.compiler.is_compiling():
            given = encoded.get("image")
            self.handoff.encoded = None if given is None else len(features_of(given, module))
        elif not by_length and len(visual) == 1 and _has_images(visual["image"]):
            layout = self.placeholders.runs(visual["image"])
        self.pending = (visual, self.mask, layout)

    def _base_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self._forget()

    # ---- the language model: phase, checks, aligned output -------------------------------------

    def _lm_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._refuse_graph()
        embeds, cache = EMBEDS.of(kwargs), cache_given(module, args, kwargs)
        masks, mask, layout = self.pending or ({}, MASK.of(kwargs), None)
        self.pending = self.forward = self.arguments.last_mask = None
        self.record.clock.started.clear()  # of a forward that failed
        if self.placeholders.by_length:  # not placeholders without features
            masks = {kind: m for kind, m in masks.items() if kind in self.handoff.lengths}
        visual = torch.stack(list(masks.values())).any(0) if masks else None
        if visual is not None and layout is None and torch.compiler.is_compiling():
            layout = self.placeholders.even(visual)  # the base model is compiled, too
            visual = None if layout is None else visual
        if visual is not None and embeds.shape[1] > 1 and (layout or bool(visual.any())):
            if self.methods:
                kv.check_cache(cache, evicts=bool(self.cache_stage.methods))
                check_recomputing(self.sites.decoder, self.layers, self.bypass_stage.methods)
            real = torch.ones_like(visual)
            if mask is not None and mask.dim() == 2:
                real = mask[:, -embeds.shape[1] :].bool().to(visual.device)
            self.placeholders.check_ends(visual)
            if layout is None:
                images, image, position, kinds, separator = self.placeholders.split(masks, embeds)
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

    def _lm_post(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        st = self.forward
        named = isinstance(output, ModelOutput)
        cache = cache_left(output) if named else CACHE.of(kwargs)
        if self.methods and not torch.compiler.is_compiling():
            check_filled(module, cache, self.filling)
            cache = self.filling if cache is None else cache  # an output need not tell it
        if cache is not None and self.cache_stage.acts(st):
            with self.record.clock.measure("method"):
                self.cache_stage.run(st, cache, self.mask)
            for observer in self.observers:
                observer.evicted(cache)
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
            LAST.replace(output, full)
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
            if i == 0 and not torch.compiler.is_compiling():
                check_call(module, kwargs, st.length)
            with self.record.clock.measure("method"):
                given, local = hidden, st.local
                hidden = self._reduce(i, st, hidden, cache, kwargs)
                for observer in self.observers:
                    observer.entering(i, st, given, local, hidden)
                every = hidden
                active, hidden = self.bypass_stage.enter(i, st, hidden, cache, kwargs)
                for observer in self.observers:
                    observer.taking_part(i, st, every)
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
        if st is not None and st.bypass is not None and st.bypass.around == "attention":
            hidden = st.bypass.hidden  # the MLP acts on all tokens; `_attn_pre` takes the part
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

    def _attn_pre(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.bypass_stage.into_attention(self.forward, args, kwargs)

    def _attn_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return self.bypass_stage.out_of_attention(self.forward, output)

    def _reduce(
        self, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Drop sentinel rows before layer 0, then what the methods ask for after layer i - 1."""
        st.ran = st.local
        if i == 0 and self.sentinel:
            left = features_left(st, view := self.views.plain(st, hidden), self.handoff.left)
            if left is not None:
                hidden = st.drop(hidden, view, left)
        if i == 0:
            self.record.entered = st.tokens
            present = {kind for row in st.kinds for kind in row}
            notes = {kind: x for kind, x in self.handoff.notes.items() if kind in present}
            if notes:
                take_notes(st, self.views.plain(st, hidden), notes)
        for index, method, layers in self.on_decoder:
            if i - 1 not in layers:
                continue
            view = self.views.of_method(index, i, st, hidden, cache, kwargs)
            reduction, tokens = split_answer(
                self.finite.ask(method.on_decoder_layer, view, method.name, "decoder", i - 1)
            )
            if reduction is not None:
                choice = Choice(i, view.image, view.position, view.valid, reduction)
                self.record.choices.append(choice)
                if tokens is None and method.merges:
                    tokens = reduction.merge(view.tokens)[0]
                hidden = st.drop(hidden, view, reduction, tokens)
        return hidden

    # ---- behind a layer, and the KV cache stage ------------------------------------------------

    def _layer_post(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        st, cache = self.forward, CACHE.of(kwargs)
        if cache is not None and self.cache_stage.acts(st):
            with self.record.clock.measure("method"):
                t = self.taps[i] if self.taps else None
                self.cache_stage.note(i, st, cache, self.mask, t)
        return self.bypass_stage.leave(st, output)


def _has_images(visual: Tensor) -> bool:
    """Whether a prompt, not a decoded token, holds placeholders."""
    return visual.shape[1] > 1 and bool(visual.any())
