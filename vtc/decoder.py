# SPDX-License-Identifier: Apache-2.0
"""The engine of everything inside the LLM: one pre-hook on every decoder layer.

Layer 0 is the projector boundary: rows of image features that the vision side marked with NaN are
dropped there; methods of the "decoder" stage drop more between layers. Hugging Face computes mask,
positions and rotary tables once at full size; the hooks gather their rows and columns for the
tokens that are left. State of one forward sits on one `_Forward` object, state that outlives it
only on the cache layers (vtc.cache).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from . import cache as kv
from . import tap
from .adapters.base import DecoderSites
from .attention import Around
from .errors import NotFiniteError, UnsupportedError
from .finite import Finite
from .kernels.compact_tokens import compact
from .method import Method, refuse_graph, split_answer
from .quantized import Packing, pack_layer
from .records import Recording, Records
from .reduction import Reduction, gather_tokens
from .stages import Choice, Eviction, Tokens
from .threads import PerThread, Threaded
from .views import CacheView, DecoderView


@dataclass
class _Aside:
    """Tokens that jump over one layer, or its attention, and come back behind it.

    Attributes:
        hidden: (B, T, D) of all tokens; index: (B, T') those that take part.
        filler: (B, T') bool, rows that take part only to keep the batch rectangular, or None.
        over: what is jumped over.
    """

    hidden: Tensor
    index: Tensor
    filler: Tensor | None
    over: str

    def back(self, part: Tensor, full: Tensor) -> Tensor:
        """Rows of the part (B, T', D) at their places in the full sequence (B, T, D)."""
        if self.filler is not None:
            part = part.where(~self.filler.unsqueeze(-1), gather_tokens(full, self.index))
        return full.scatter(1, self.index.unsqueeze(-1).expand_as(part), part)


@dataclass
class _Forward:
    """One forward through the LLM. L logical tokens came in, T of them are still there."""

    base: int  # logical tokens in the cache before this forward
    length: int  # L
    real: Tensor  # (B, T) not padding
    visual: Tensor  # (B, T)
    image: Tensor  # (B, T) ordinal of the image in its row
    position: Tensor  # (B, T) patch index inside that image
    images: list[list[int]]  # visual tokens of each image of each row
    kinds: list[list[str]]  # of each of them, "image" or "video"
    count: int | None  # visual tokens there now where all rows have as many
    separator: Tensor | None = None  # (B, T) newlines between rows of patches, which always stay
    # (B, L) bool and for each of the first layers the rows (M, D) that DeepStack adds behind it
    deepstack: tuple[Tensor, Sequence[Tensor]] | None = None
    local: Tensor | None = (
        None  # (B, T) logical index in this forward; None until something is dropped
    )
    filler: Tensor | None = None  # (B, T) dropped tokens that only keep the batch rectangular
    shift: Tensor | None = None  # (B, T) positions lost before each token ("compact")
    lost: Tensor | None = None  # (B,) positions lost in all, behind the last token left, too
    scratch: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # (B, N, ...) by method
    memos: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # (B, ...) by method
    places: tuple[Tensor, Tensor | None] | None = None  # (B, N) columns of visual tokens, valid
    aside: _Aside | None = None  # what jumps over the layer that runs now
    ran: Tensor | None = None  # `local` of the tokens that the last layer has run on
    partial: set[int] = field(default_factory=set)  # layers whose attention saw part of the tokens
    memo: dict[str, tuple[Any, ...]] = field(default_factory=dict)

    def once(self, name: str, source: Any, device: torch.device, compute: Any) -> Any:
        """What Hugging Face hands to all layers alike is gathered once between reductions."""
        if torch.compiler.is_compiling():
            return compute()
        known = self.memo.get(name)
        if (
            known is None
            or known[0] is not source
            or known[1] is not self.local
            or known[2] != device
        ):
            self.memo[name] = known = (source, self.local, device, compute())
        return known[3]

    @property
    def tokens(self) -> Tokens:
        """What is there now, for the record."""
        return Tokens(self.visual, self.image, self.position)

    def columns(self, hidden: Tensor) -> Tensor:
        """(B, T) logical column of each token of hidden (B, T, D)."""
        rows = _arange(hidden) if self.local is None else self.local.to(hidden.device)
        return self.once("columns", None, hidden.device, lambda: self.base + rows)


def split_images(
    visual: Tensor, tokens_per_image: int | None
) -> tuple[list[list[int]], Tensor, Tensor]:
    """Image by image, the placeholder runs of a batch of prompts.

    Args:
        visual: (B, L) bool.
        tokens_per_image: placeholders of one image where that is fixed, to split adjacent images.

    Returns:
        For each row the visual tokens of each image; (B, L) image ordinal; (B, L) index in it.

    Raises:
        UnsupportedError: a run holds only part of an image (chunked prefill).
    """
    starts = visual & ~torch.nn.functional.pad(visual, (1, 0))[:, :-1]
    ends = visual & ~torch.nn.functional.pad(visual, (0, 1))[:, 1:]
    run = starts.long().cumsum(1) - 1
    columns = torch.arange(visual.shape[1], device=visual.device).expand_as(visual)
    first = columns.where(starts, -1).cummax(1).values
    index = columns - first
    images: list[list[int]] = [[] for _ in visual]
    for r, n in torch.stack([ends.nonzero()[:, 0], index[ends] + 1], 1).tolist():
        if tokens_per_image is None:
            images[r].append(n)
        elif n % tokens_per_image:
            raise UnsupportedError(
                f"found a run of {n} image tokens, not a multiple of {tokens_per_image}: part "
                "of an image in one forward (chunked prefill) cannot be compressed; prefill in "
                "one piece, or use vtc.compress_inputs"
            )
        else:
            images[r] += [tokens_per_image] * (n // tokens_per_image)
    if tokens_per_image is None:
        return images, run.where(visual, -1), index
    order = (visual.long().cumsum(1) - 1).where(visual, -1)
    return images, order.div(tokens_per_image, rounding_mode="floor"), index % tokens_per_image


Layout = tuple[list[list[int]], Tensor, Tensor]
"""What `split_images` says of a batch of prompts."""


def even_images(visual: Tensor, images: int, tokens_per_image: int) -> Layout:
    """`split_images` where every row has as many images, known without reading a tensor.

    Args:
        images: in the whole batch.

    Raises:
        UnsupportedError: they cannot be shared evenly.
    """
    batch = visual.shape[0]
    if images % batch:
        raise UnsupportedError(
            f"{images} images for {batch} prompts: torch.compile needs as many in each, so that "
            "lengths are known beforehand; run prompts with different numbers of images one by "
            "one, or compile without fullgraph=True"
        )
    each = images // batch
    torch._assert_async(
        (visual.sum(1) == each * tokens_per_image).all(),
        "torch.compile: prompts with different numbers of images; run them one by one",
    )
    order = (visual.long().cumsum(1) - 1).where(visual, -1)
    image = order.div(tokens_per_image, rounding_mode="floor")
    return [[tokens_per_image] * each] * batch, image, order % tokens_per_image


def split_packed(
    visual: Tensor, separator: Tensor, lengths: list[int], thumbnail: int
) -> tuple[list[list[int]], Tensor, Tensor]:
    """`split_images` for packed images: patches of a thumbnail, then lines that end in a separator.

    Args:
        visual: (B, L) bool, placeholders of patches and separators; separator: (B, L) bool.
        lengths: placeholders of each image, in the order of rows and columns.
        thumbnail: patches in front of the lines.

    Returns:
        As `split_images`, of patches alone: separators are not counted.

    Raises:
        UnsupportedError: what one image left here is not a whole image (chunked prefill).
    """
    images: list[list[int]] = []
    image, position = torch.full_like(visual, -1, dtype=torch.long), torch.zeros_like(visual).long()
    rest = iter(lengths)
    for r, columns in enumerate(visual.cpu()):
        at = columns.nonzero()[:, 0].to(visual.device)
        ends, start = separator[r, at].cpu(), 0
        counts: list[int] = []
        while start < len(at):
            n = next(rest, 0)
            lines = ends[start : start + n].nonzero()[:, 0].tolist()
            width = lines[0] - thumbnail if lines else 0
            last = lines[-1] if lines else thumbnail - 1
            expected = list(range(thumbnail + width, n, width + 1)) if lines else []
            if start + n > len(at) or lines != expected or last != n - 1:
                raise UnsupportedError(
                    f"found {len(at)} image tokens in row {r} that are not whole packed images: "
                    "part of an image in one forward (chunked prefill), and features that were "
                    "compressed before, cannot be compressed; prefill in one piece, or use "
                    "vtc.compress_inputs"
                )
            patches = at[start : start + n][~ends[start : start + n].to(at.device)]
            image[r, patches] = len(counts)
            position[r, patches] = torch.arange(len(patches), device=at.device)
            counts.append(len(patches))
            start += n
        images.append(counts)
    return images, image, position


def split_lengths(visual: Tensor, lengths: list[int]) -> tuple[list[list[int]], Tensor, Tensor]:
    """`split_images` for images of known lengths, whatever text stands between their tokens.

    Args:
        visual: (B, L) bool; lengths: placeholders of each image, in the order of rows and columns.

    Raises:
        UnsupportedError: a row does not hold whole images (chunked prefill).
    """
    images: list[list[int]] = []
    rest = iter(lengths)
    for n in visual.sum(1).tolist():
        row, missing = [], n
        while missing > 0:
            row.append(next(rest, n + 1))
            missing -= row[-1]
        if missing:
            raise UnsupportedError(
                f"found {n} image tokens in row {len(images)} that are not whole images: part of "
                "an image in one forward (chunked prefill), and features that were compressed "
                "before, cannot be compressed; prefill in one piece, or use vtc.compress_inputs"
            )
        images.append(row)
    image, position = torch.full_like(visual, -1, dtype=torch.long), torch.zeros_like(visual).long()
    flat = torch.tensor([n for row in images for n in row], device=visual.device)
    ordinal = torch.tensor([j for row in images for j in range(len(row))], device=visual.device)
    first = flat.cumsum(0) - flat
    image[visual] = ordinal.long().repeat_interleave(flat)
    every = torch.arange(int(visual.sum()), device=visual.device)
    position[visual] = every - first.repeat_interleave(flat)
    return images, image, position


def in_prompt_order(
    parts: dict[str, tuple[list[list[int]], Tensor, Tensor]],
) -> tuple[list[list[int]], Tensor, Tensor, list[list[str]]]:
    """Images and videos as they follow each other in each row.

    Args:
        parts: by modality what `split_images` gives for its placeholders.

    Returns:
        The same for all of them, and for each row the modality of each.
    """
    if len(parts) == 1:
        kind, (images, image, position) = next(iter(parts.items()))
        return images, image, position, [[kind] * len(row) for row in images]
    first = next(iter(parts.values()))
    image, position = torch.full_like(first[1], -1), torch.zeros_like(first[2])
    images, kinds = [], []
    for r in range(len(first[0])):
        units = []
        for kind, (own, numbers, _) in parts.items():
            here = numbers[r].cpu()
            units += [(int((here == j).nonzero()[0, 0]), kind, j, n) for j, n in enumerate(own[r])]
        units.sort()
        for new, (_, kind, j, _) in enumerate(units):
            mine = parts[kind][1][r] == j
            image[r, mine] = new
            position[r, mine] = parts[kind][2][r, mine]
        images.append([n for *_, n in units])
        kinds.append([kind for _, kind, _, _ in units])
    return images, image, position, kinds


_Pending = tuple[dict[str, Tensor], Tensor | None, Layout | None]
"""Of a prompt: by modality (B, L) where its placeholders stand; its mask; its layout."""


class DecoderEngine(Recording, Threaded):
    """Installs the hooks on a language model and runs the methods' decoder and cache stages."""

    pending: PerThread[_Pending | None] = PerThread(lambda: None)
    # By modality, for each image its projected features (N, D) and each method's notes on them
    # (K, ...).
    carried: PerThread[dict[str, tuple[Sequence[Tensor], list[dict[str, Any]]]]] = PerThread(dict)
    # Images of this forward where the projector ran in it; features left of each, None: all.
    encoded: PerThread[int | None] = PerThread(lambda: None)
    left: PerThread[int | None] = PerThread(lambda: None)
    # By modality, rows of each packed image of this forward in the order of its placeholders.
    lengths: PerThread[dict[str, list[int]]] = PerThread(dict)
    encoding: PerThread[str] = PerThread(str)  # the modality whose features are being made
    made: PerThread[set[tuple[str, int]]] = PerThread(set)  # by modality, rows of whole images
    forward: PerThread[_Forward | None] = PerThread(lambda: None)
    # (B, logical length) of this forward, False on padding; what it was last made from, and it.
    mask: PerThread[Tensor | None] = PerThread(lambda: None)
    last_mask: PerThread[tuple[tuple[Any, ...], Tensor | None] | None] = PerThread(lambda: None)
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
        self.on_cache = [(i, m) for i, m in enumerate(methods) if "cache" in m.stages]
        self.noting = [s for s in self.on_cache if type(s[1]).note_cache is not Method.note_cache]
        self.steadily = any(m.while_decoding for _, m in self.on_cache)
        self.compact = any(m.positions == "compact" for m in methods)
        # Whether only those lengths tell which placeholders are one image.
        self.by_length = sites.crops is not None or (
            sites.grids is not None and sites.tokens_per_image is None
        )
        self.finite = Finite("prompt")
        self.handles: list[Any] = []
        self.taps: list[tap.Tap] = []
        self.around: Around | None = None
        self._check_model()

    def _check_model(self) -> None:
        config = self.sites.decoder.config
        depth = len(self.layers)
        if self.compact and self.sites.mrope:
            raise UnsupportedError(
                f"{type(self.sites.base).__name__} gives image tokens positions of time, height "
                'and width, which cannot be renumbered; use positions="original"'
            )
        for _, method, layers in self.on_decoder:
            if layers.isdisjoint(range(-1, depth - 1)):
                raise UnsupportedError(
                    f"{method} acts after LLM layer {min(layers)} and there are {depth}: nothing "
                    "would be compressed; choose an earlier layer"
                )
        if len(self.on_bypass) > 1:
            names = " and ".join(m.name for _, m, _ in self.on_bypass)
            raise UnsupportedError(f"{names} both let tokens jump over layers; chain only one")
        self._check_reads()
        self._check_packs()
        for _, method, _ in self.on_decoder + self.on_bypass:
            if "ahead" in method.needs and not all(map(tap.Ahead.fits, self.layers)):
                raise UnsupportedError(
                    f"{method.name} ranks by the attention of a layer that has not run yet, and "
                    f"{type(self.layers[0]).__name__} does not have the parts of a Llama layer "
                    "(input_layernorm, q_proj, k_proj, rotary embedding)"
                )
        window = sliding_window(config)
        if window is not None and "flash" in config._attn_implementation:
            raise UnsupportedError(
                f"the language model uses a sliding window of {window} tokens, and FlashAttention "
                "would count kept tokens instead of positions; load the model with "
                'attn_implementation="sdpa", whose masks count positions'
            )
        if any("chunked" in t for t in getattr(config, "layer_types", None) or ()):
            raise UnsupportedError(
                "the language model attends in chunks, which would count kept tokens instead of "
                "positions; models with full attention or sliding windows work"
            )
        implementation = config._attn_implementation
        if "flex" in implementation or "paged" in implementation:
            raise UnsupportedError(
                f'attention "{implementation}" builds masks that cannot be gathered; use "sdpa", '
                '"flash_attention_2" or "eager"'
            )

    def _check_reads(self) -> None:
        """Refuse methods that read a layer which another one lets tokens jump over."""
        for _, jumps, over in self.on_bypass:
            for _, method, layers in self.on_decoder:
                idle = 1.0 in (jumps.keep_ratio, method.keep_ratio)
                if idle or not method.needs & {"ran", "sublayers"} or layers.isdisjoint(over):
                    continue
                raise UnsupportedError(
                    f"{method.name} reads LLM layer {min(layers & over)}, which {jumps.name} lets "
                    "tokens jump over: it would see only some of them; choose layers for one that "
                    "the other leaves alone, or chain a method that acts in front of the LLM or "
                    "reads the next layer, such as pdrop"
                )

    def _check_packs(self) -> None:
        """Refuse methods that would evict slots of the KV cache which another one has packed."""
        order = [m for _, m in self.on_cache if m.keep_ratio != 1 or m.packs]
        for i, packing in enumerate(order):
            for j, method in enumerate(order):
                if not packing.packs or i == j:
                    continue
                pair = f"{method.name} and {packing.name}"
                if method.packs:
                    raise UnsupportedError(f"{pair} both pack the KV cache; chain only one")
                if method.while_decoding:
                    raise UnsupportedError(
                        f"{method} evicts from the KV cache while decoding, where {packing.name} "
                        "has packed the slots; let it evict once, after the prompt (prefixkv: "
                        'scope="visual"), in front'
                    )
                if j > i:
                    raise UnsupportedError(
                        f"{method.name} cannot evict from a KV cache that {packing.name} has "
                        f"packed; chain {method.name} in front of {packing.name}"
                    )

    def _check_recomputing(self) -> None:
        """Refuse activation checkpointing where hooks would run again in the backward pass."""
        if not (torch.is_grad_enabled() and self.sites.decoder.training):
            return
        if not any(getattr(layer, "gradient_checkpointing", False) for layer in self.layers):
            return
        if type(self.layers[0]).__call__ is not nn.Module.__call__:
            raise UnsupportedError(
                "gradient checkpointing of this transformers runs the hooks of LLM layers again in "
                "the backward pass, when dropped tokens are gone; disable it, or use a newer "
                "transformers (5.23 does not)"
            )
        around = [m for _, m, _ in self.on_bypass if m.bypass == "attention"]
        if around:
            raise UnsupportedError(
                f"gradient checkpointing runs LLM layers again in the backward pass, when what "
                f"{around[0].name} left out of their attention is gone; disable it, or use a "
                "method that drops tokens between layers, such as fastv"
            )

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
            if self.on_cache or self.on_bypass:
                after = partial(self._layer_post, i)
                handles.append(layer.register_forward_hook(after, with_kwargs=True, prepend=True))
            if any(m.bypass == "attention" for _, m, _ in self.on_bypass):
                attn = layer.self_attn
                handles.append(attn.register_forward_pre_hook(self._attn_pre, with_kwargs=True))
                handles.append(attn.register_forward_hook(self._attn_post, prepend=True))
        if self.on_decoder or self.on_bypass or self.noting:
            attentions = [layer.self_attn for layer in self.layers]
            self.taps, self.around = tap.install(attentions)
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
            tap.remove(self.around)
        self._forget()
        self.taps, self.around = [], None
        self.carried = {}

    def _forget(self) -> None:
        """Let go of the forward that has ended, or that an interrupt has ended before."""
        self.pending = self.forward = self.mask = self.last_mask = self.filling = None
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
        ids = args[0] if args else kwargs.get("input_ids")
        encoded = kwargs.get("mm_encoder_outputs") or {}
        if (
            self.sites.video
            and self.sites.videos is None
            and (encoded.get("video") is not None or kwargs.get("pixel_values_videos") is not None)
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
                kind: [prod(f.shape[:-1]) for f in output.pooler_output]
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
        mask = kwargs.get("attention_mask")
        self.mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        self.encoded, layout = None, None
        if torch.compiler.is_compiling():
            given = (kwargs.get("mm_encoder_outputs") or {}).get("image")
            self.encoded = None if given is None else len(given.pooler_output)
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
        embeds = kwargs["inputs_embeds"]
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
        embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        masks, mask, layout = self.pending or ({}, kwargs.get("attention_mask"), None)
        self.pending = self.forward = self.last_mask = None
        self.record.clock.started.clear()  # of a forward that failed
        if self.by_length:  # not placeholders without features
            masks = {kind: m for kind, m in masks.items() if kind in self.lengths}
        visual = torch.stack(list(masks.values())).any(0) if masks else None
        if visual is not None and layout is None and torch.compiler.is_compiling():
            layout = self._even_layout(visual)  # the base model is compiled, too
            visual = None if layout is None else visual
        if visual is not None and embeds.shape[1] > 1 and (layout or bool(visual.any())):
            if self.methods:
                kv.check_cache(cache, evicts=bool(self.on_cache))
                self._check_recomputing()
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
            self.forward = _Forward(
                base,
                embeds.shape[1],
                real,
                visual,
                image,
                position,
                images,
                kinds,
                count,
                separator,
            )
            self.record.begin(self.forward.tokens, real, images, kinds, separator, base)
            self.record.clock.start("prefill")
            if self.methods and kwargs.get("deepstack_visual_embeds") is not None:
                # The model would add them by a mask at full size; `_layer_pre` does it instead.
                self.forward.deepstack = (
                    kwargs["visual_pos_masks"],
                    kwargs["deepstack_visual_embeds"],
                )
                taken = {"visual_pos_masks": None, "deepstack_visual_embeds": None}
                return args, {**kwargs, **taken}
        elif embeds.shape[1] == 1:
            self.record.clock.start("decode")
        return None

    def _layout(self, visual: Tensor) -> Layout:
        return split_images(visual, self.sites.tokens_per_image)

    def _even_layout(self, visual: Tensor) -> Layout | None:
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
        cache = output.get("past_key_values") if named else kwargs.get("past_key_values")
        if self.on_cache and cache is not None and (st is not None or self.steadily):
            with self.record.clock.measure("method"):
                self._cache_stage(st, cache)
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
            output.last_hidden_state = full
            return output
        return (full, *output[1:])

    # ---- decoder layers ------------------------------------------------------------------------

    def _layer_pre(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        self._refuse_graph()
        st, cache = self.forward, kwargs.get("past_key_values")
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
        if plain and kwargs.get("attention_mask") is None:  # decoding: every key is seen
            return None
        hidden, rest = (args[0], args[1:]) if args else (kwargs.pop("hidden_states"), ())
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
            kwargs = self._gathered(i, active, hidden, layer, kwargs)
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
    def _deepstack(i: int, st: _Forward, hidden: Tensor) -> Tensor:
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
        self, i: int, st: _Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[_Forward, Tensor]:
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
            short = self._apply(part, hidden, view, reduction)
            here: Any = part.local
            if st.local is not None:
                rows = st.local.to(hidden.device).contiguous()
                here = torch.searchsorted(rows, part.local.contiguous())  # type: ignore[union-attr]
            part.shift = None if st.shift is None else gather_tokens(st.shift, here)
            part.lost = st.lost
            st.aside = _Aside(hidden, here, part.filler, method.bypass)
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
        hidden = gather_tokens(kwargs["hidden_states"], st.aside.index)
        return args, {**kwargs, "hidden_states": hidden}

    def _attn_post(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The others get nothing from it: the residual carries them to the MLP."""
        st = self.forward
        if st is None or st.aside is None:
            return None
        part = output[0] if isinstance(output, tuple) else output
        full = st.aside.back(part, torch.zeros_like(st.aside.hidden))
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _reduce(
        self, i: int, st: _Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> Tensor:
        """Drop sentinel rows before layer 0, then what the methods ask for after layer i - 1."""
        st.ran = st.local
        if i == 0 and self.sentinel:
            dropped = hidden[..., 0].isnan() & st.visual.to(hidden.device)
            view = self._view(-1, st, hidden, {}, {})
            alive = ~gather_tokens(dropped, view.visual_index)
            if view.valid is not None:
                alive &= view.valid
            if torch.compiler.is_compiling() and st.count is not None:
                left = self._even_features(st, view, alive)
            else:
                self._check_features(st, view, alive)
                left = Reduction.from_mask(alive)
            if left.valid is not None or view.valid is not None or left.count < view.count:
                hidden = self._apply(st, hidden, view, left)
        if i == 0:
            self.record.entered = st.tokens
            present = {kind for row in st.kinds for kind in row}
            carried = {kind: x for kind, x in self.carried.items() if kind in present}
            if carried:
                self._carry(st, hidden, carried)
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
                hidden = self._apply(st, hidden, view, reduction, tokens)
        return hidden

    def _even_features(self, st: _Forward, view: DecoderView, alive: Tensor) -> Reduction:
        """Under torch.compile, the features left: as many of every image as its encoder said."""
        k = view.count if self.left is None else self.left * len(st.images[0])
        torch._assert_async(
            (alive.sum(1) == k).all(),
            "torch.compile: images kept different numbers of tokens, or their features are not a "
            "number",
        )
        keep = alive.long().argsort(dim=1, descending=True, stable=True)[:, :k]
        return Reduction.from_keep(keep, view.count)

    def _carry(
        self,
        st: _Forward,
        hidden: Tensor,
        carried: dict[str, tuple[Sequence[Tensor], list[dict[str, Any]]]],
    ) -> None:
        """Bring what methods noted on image features to the rows those features went to.

        Images are recognised by their first surviving feature, which arrives here unchanged, so the
        order of encoding, beams and features encoded long before need no bookkeeping.
        """
        if torch.compiler.is_compiling() and st.count is not None:  # encoded in placeholder order
            batch = hidden.shape[0]
            for index, note in enumerate(carried["image"][1]):
                st.scratch[index] = {n: x.reshape(batch, -1, *x.shape[2:]) for n, x in note.items()}
            return
        view = self._view(-1, st, hidden, {}, {})
        firsts: dict[str, Tensor] = {}
        for kind, (projected, notes) in carried.items():
            alive = [~features[:, 0].isnan() for features in projected]
            rows = [f[a.long().argmax()] for f, a in zip(projected, alive, strict=True)]
            firsts[kind] = torch.stack(rows).to(hidden)
            for index, note in enumerate(notes):
                known = st.scratch.setdefault(index, {})
                for name, x in note.items():
                    if name not in known:
                        shape = *view.visual_index.shape, *x[0].shape[1:]
                        known[name] = x[0].new_zeros(shape).to(hidden.device)
        for r, images in enumerate(st.images):
            for j in range(len(images)):
                kind = st.kinds[r][j]
                if kind not in carried:
                    continue
                notes = carried[kind][1]
                here = view.image[r] == j
                if view.valid is not None:
                    here &= view.valid[r]
                slots = here.nonzero()[:, 0]
                match = (firsts[kind] == view.tokens[r, slots[0]]).all(1).nonzero()[:, 0]
                if not len(match):
                    raise UnsupportedError(
                        "image features of an earlier encoder call reached the language model, and "
                        "the method needs notes it took while encoding them; encode and prefill in "
                        "one call"
                    )
                for index, note in enumerate(notes):
                    for name, x in note.items():
                        source = x[int(match[0])][: len(slots)]
                        st.scratch[index][name][r, slots] = source.to(hidden.device)

    @staticmethod
    def _check_features(st: _Forward, view: DecoderView, alive: Tensor) -> None:
        """Every image must have tokens left: all NaN is no sentinel but a broken image."""
        images = max(map(len, st.images))
        left = torch.zeros(alive.shape[0], images, device=alive.device)
        left.scatter_add_(1, view.image.clamp(min=0), alive.float())
        for r, row in enumerate(st.images):
            if not bool(left[r, : len(row)].all()):
                raise NotFiniteError(
                    f"the features of an image in row {r} are not a number: corrupt pixels, or an "
                    "overflow in the encoder (try bfloat16 or float32)",
                    *("", "features", None, (r,)),
                )

    def _method_view(
        self, index: int, i: int, st: _Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
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
        self, i: int, st: _Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tap.Ahead:
        """Attention of layer i, which has not run yet, on the tokens that are left now."""
        layer, stored, past = self.layers[i], kv.existing_pruned(cache, i), None
        if stored is not None or st.local is not None:
            kwargs = self._gathered(i, st, hidden, stored, kwargs, commit=False)
        if cache is not None and i < len(cache.layers) and cache.layers[i].get_seq_length():
            past = cache.layers[i].keys if stored is None else stored.unpacked()[0]
        tables, mask = kwargs["position_embeddings"], kwargs.get("attention_mask")
        return tap.Ahead(layer.self_attn, layer.input_layernorm(hidden), tables, mask, past)

    def _view(
        self,
        layer: int,
        st: _Forward,
        hidden: Tensor,
        scratch: dict[str, Tensor],
        memo: dict[str, Tensor],
        ahead: Any = None,
    ) -> DecoderView:
        visual = st.visual.to(hidden.device)
        if st.places is None:  # the same until something is dropped again
            order = visual.long().argsort(dim=1, descending=True, stable=True)
            if st.count is not None:
                st.places = order[:, : st.count], None
            else:
                counts = visual.sum(1)
                n = int(counts.max())
                valid = torch.arange(n, device=hidden.device) < counts[:, None]
                st.places = order[:, :n], None if bool(valid.all()) else valid
        separator = None if st.separator is None else st.separator.to(hidden.device)
        other = visual if separator is None else visual | separator
        index = st.places[0].to(hidden.device)
        short = None if st.places[1] is None else st.places[1].to(hidden.device)
        return DecoderView(
            hidden=hidden,
            layer=layer,
            depth=len(self.layers),
            visual=visual,
            text=st.real.to(hidden.device) & ~other,
            separator=separator,
            visual_index=index,
            valid=short,
            image=st.image.to(hidden.device).gather(1, index),
            position=st.position.to(hidden.device).gather(1, index),
            images=st.images,
            tap=_no_tap if layer in st.partial or layer < 0 or not self.taps else self.taps[layer],
            ahead=ahead,
            memo=memo,
            scratch=scratch,
        )

    def _apply(
        self,
        st: _Forward,
        hidden: Tensor,
        view: DecoderView,
        reduction: Reduction,
        merged: Tensor | None = None,
    ) -> Tensor:
        """Carry out a reduction of the N visual tokens on the sequence and all that is aligned.

        Args:
            merged: (B, K, D) new hidden states of the survivors; None to keep theirs.
        """
        if merged is not None:
            merged = merged.to(hidden.dtype)
            target = view.visual_index.gather(1, reduction.keep)
            length = hidden.shape[1]
            if reduction.valid is not None:  # padding slots, which may repeat a real one, go behind
                target = target.where(reduction.valid, length)
                hidden = torch.nn.functional.pad(hidden, (0, 0, 0, 1))
            hidden = hidden.scatter(1, target.unsqueeze(-1).expand_as(merged), merged)[:, :length]
        for named in st.scratch.values():
            for name, x in named.items():
                named[name] = reduction.select(x)
        n, keep = reduction.source_count, reduction.keep
        if reduction.valid is not None:
            keep = keep.where(reduction.valid, n)  # column n takes the padding slots
        alive = torch.zeros(keep.shape[0], n + 1, dtype=torch.bool, device=keep.device)
        alive = alive.scatter(1, keep, True)[:, :n]
        real, visual = st.real.to(hidden.device), view.visual
        # Where a row is short, visual_index points at other tokens behind the visual ones.
        kept = torch.zeros_like(visual).scatter(1, view.visual_index, alive) & visual
        if view.valid is None and reduction.valid is None:
            keep = ~visual | kept
            length = hidden.shape[1] - reduction.source_count + reduction.count
            order = keep.long().argsort(dim=1, descending=True, stable=True)
            index, filler = order[:, :length], None
            st.count = reduction.count
        else:
            st.count = None
            # Rows differ: as long as the longest row without its padding, padding first to fill.
            needed = real & (~visual | kept)
            needed[:, -1] |= ~visual[:, -1]  # generate() goes on from here, padding or not
            length = int(needed.sum(1).max())
            rank = (~needed).long() + (~needed & visual).long()
            index = rank.argsort(dim=1, stable=True)[:, :length].sort(dim=1).values
            filler = gather_tokens(visual & ~kept, index)
        aligned: dict[str, Tensor] = {
            "local": _arange(hidden) if st.local is None else st.local,
            "visual": visual & kept,
            "real": real & (~visual | kept),
            "image": st.image,
            "position": st.position,
        }
        for name in ("separator", "filler"):
            if getattr(st, name) is not None:
                aligned[name] = getattr(st, name)
        if self.compact:
            lost = (visual & ~kept).long()
            gone = lost.sum(1)
            st.lost = gone if st.lost is None else gone + st.lost.to(gone.device)
            shift = lost.cumsum(1) - lost
            aligned["shift"] = shift if st.shift is None else shift + st.shift.to(hidden.device)
        hidden, *rest = compact([hidden, *(x.to(hidden.device) for x in aligned.values())], index)
        for name, x in zip(aligned, rest, strict=True):
            setattr(st, name, x)
        st.places = None
        if st.filler is not None:
            filler = st.filler if filler is None else filler | st.filler
        if filler is not None and not bool(filler.any()):
            filler = None
        st.filler = filler
        return hidden if filler is None else hidden.masked_fill(filler.unsqueeze(-1), 0)

    # ---- what Hugging Face hands to every layer, for the tokens that are left ------------------

    def _gathered(
        self,
        i: int,
        st: Any,
        hidden: Tensor,
        layer: Any,
        kwargs: dict[str, Any],
        commit: bool = True,
    ) -> dict[str, Any]:
        kwargs = dict(kwargs)
        device = hidden.device
        local = None if st is None or st.local is None else st.local.to(device)
        if local is not None:
            tables = kwargs["position_embeddings"]
            kwargs["position_embeddings"] = st.once(
                "tables", tables, device, lambda: tuple(kv.take_rows(t, local) for t in tables)
            )
        positions = kwargs.get("position_ids")
        if positions is not None and local is not None:
            kwargs["position_ids"] = st.once(
                "positions", positions, device, lambda: _take_positions(positions, local)
            )
        shift = self._shift(st, layer, device, commit)
        if shift is not None:
            kwargs["position_ids"] = positions = kwargs["position_ids"] - shift
            rotary, kind = self.sites.decoder.rotary_emb, {}
            if "layer_type" in inspect.signature(rotary.forward).parameters:  # Gemma 3
                kind = {"layer_type": self.sites.decoder.config.layer_types[i]}
            kwargs["position_embeddings"] = rotary(hidden, positions, **kind)
        flash = "flash" in self.sites.decoder.config._attn_implementation
        if flash:  # gaps would be read as packed sequences
            kwargs["position_ids"] = None

        # Logical columns of all keys this layer will attend to: its slots, then the new tokens.
        base = st.base if st is not None else (int(layer.get_seq_length()) if layer else 0)
        rows = _arange(hidden) if local is None else local
        mask = kwargs.get("attention_mask")

        def gathered() -> Tensor | None:
            columns = base + rows if st is None else st.columns(hidden)
            filler = None if st is None or st.filler is None else st.filler.to(device)
            if layer is not None and layer.physical_length():
                past = layer.columns(device)
                if filler is not None or layer.filler is not None:
                    new = torch.zeros_like(rows, dtype=torch.bool) if filler is None else filler
                    filler = torch.cat([layer.padded("filler", device), new], 1)
                columns = torch.cat([past, columns], 1)
            return _gather_mask(mask, rows, local is not None, base, columns, filler, flash)

        fresh = st is not None and (layer is None or not layer.physical_length())
        if fresh:
            kwargs["attention_mask"] = st.once("mask", mask, device, gathered)
        elif st is None:
            kwargs["attention_mask"] = self._as_before(mask, layer, hidden, gathered)
        else:
            kwargs["attention_mask"] = gathered()
        return kwargs

    def _as_before(self, mask: Any, layer: Any, hidden: Tensor, compute: Any) -> Tensor | None:
        """While decoding: the mask of the last layer, where this one holds the same tokens."""
        if torch.compiler.is_compiling():
            return compute()
        lengths = layer.physical_length(), layer.dropped, hidden.shape[1], hidden.device
        source = (mask, layer.kept, layer.filler, *lengths)
        known = self.last_mask
        if known is None or not all(
            a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
            for a, b in zip(known[0], source, strict=True)
        ):
            self.last_mask = known = source, compute()
        return known[1]

    def _shift(
        self, st: _Forward | None, layer: Any, device: torch.device, commit: bool
    ) -> Tensor | None:
        """(B, T) positions to subtract under "compact", or None.

        Args:
            commit: remember on the cache layer what this forward lost.
        """
        if not self.compact:
            return None
        past = None if layer is None else layer.shift
        now = None if st is None else st.shift
        if commit and layer is not None and st is not None and now is not None:
            total = st.lost.to(device)  # type: ignore[union-attr]
            layer.shift = total if past is None else total + past.to(device)
        if now is None and past is None:
            return None
        shift = torch.zeros((), dtype=torch.long, device=device)
        if past is not None:
            shift = shift + past.to(device)[:, None]
        return shift if now is None else shift + now.to(device)

    # ---- behind a layer, and the KV cache stage ------------------------------------------------

    def _layer_post(
        self, i: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        st, cache = self.forward, kwargs.get("past_key_values")
        if cache is not None and self.on_cache and (st is not None or self.steadily):
            with self.record.clock.measure("method"):
                self._note(i, st, cache)
        if st is None or st.aside is None or st.aside.over == "attention":
            return None
        part = output[0] if isinstance(output, tuple) else output
        full = st.aside.back(part, st.aside.hidden)
        return (full, *output[1:]) if isinstance(output, tuple) else full

    def _note(self, i: int, st: _Forward | None, cache: Any) -> None:
        """Let methods note what they will need of the attention of layer i."""
        layer: Any = kv.existing_pruned(cache, i)
        if layer is None:
            if st is None:
                return
            stock = cache.layers[i]
            batch, n = stock.keys.shape[0], stock.keys.shape[2]
            layer = kv.pruned_layer(cache, i, batch, stock.keys.device)
            layer.visual[:, n - st.visual.shape[1] :] = st.visual.to(stock.keys.device)
        if st is not None:
            layer.prefilled = st.base + st.length
            for index, method in self.on_cache:
                asked = [sum(method.budget(n) for n in row) for row in st.images]
                layer.budgets[index] = layer.budgets.get(index, 0) + torch.tensor(
                    asked, device=layer.keys.device
                )
        for index, method in self.noting:
            if st is None and not method.while_decoding:
                continue
            method.note_cache(self._cache_view(index, i, layer, self.taps[i]))

    def _cache_view(self, index: int, i: int, layer: Any, t: tap.Tap | None) -> CacheView:
        device = layer.keys.device
        valid = None if layer.filler is None else ~layer.padded("filler", device)
        if self.mask is not None:
            real = self.mask.to(device).bool().gather(1, layer.columns(device))
            valid = real if valid is None else valid & real
        scratch = layer.scratch.setdefault(index, {})
        n = layer.physical_length()
        for name, x in scratch.items():
            scratch[name] = torch.cat([x, x.new_zeros(x.shape[0], n - x.shape[1], *x.shape[2:])], 1)
        return CacheView(
            keys=layer.keys,
            values=layer.values,
            visual=layer.padded("visual", device),
            valid=valid,
            layer=i,
            depth=len(self.layers),
            step=layer.get_seq_length() - layer.prefilled,
            budget=layer.budgets[index],
            tap=_no_tap if t is None else t,
            scratch=scratch,
        )

    def _cache_stage(self, st: _Forward | None, cache: Any) -> None:
        """Once a forward is complete: let methods evict, layer by layer."""
        layers: list[Any] = [kv.existing_pruned(cache, i) for i in range(len(self.layers))]
        if any(layer is None for layer in layers):
            return
        alive = None if st is None else self._reached_end(st)
        for index, method in self.on_cache:
            if st is None and not method.while_decoding:
                continue
            if st is not None:
                for layer in layers:
                    self._carry_on(st, st.scratch.get(index, {}), index, layer)
            views = [self._cache_view(index, i, layer, None) for i, layer in enumerate(layers)]
            peers = [view.scratch for view in views]
            for i, (layer, view) in enumerate(zip(layers, views, strict=True)):
                view.peers = peers
                if alive is not None:
                    columns = layer.columns(view.keys.device)
                    view.reaches_end = alive.to(view.keys.device).gather(1, columns)
                if st is None:  # every slot again for each token that is decoded
                    answer = method.on_cache(view)
                else:
                    answer = self.finite.ask(method.on_cache, view, method.name, "cache", i)
                if isinstance(answer, Packing):
                    layers[i] = pack_layer(cache, i, answer, view.valid)
                elif answer is not None:
                    if st is not None and answer.scores is not None:
                        self.record.evictions.append(Eviction(i, layer.kept, answer.scores))
                    layer.evict(answer)

    @staticmethod
    def _carry_on(st: _Forward, notes: dict[str, Tensor], index: int, layer: Any) -> None:
        """Bring a method's notes on visual tokens (B, N, ...) to their slots in a cache layer.

        Tokens that left before the last LLM layer have lost theirs: zeros.
        """
        if not notes:
            return
        device = layer.keys.device
        columns, base = layer.columns(device), st.base
        visual = st.visual.to(device)
        place = visual.long().argsort(dim=1, descending=True, stable=True)
        for name, x in notes.items():
            ones = [1] * (x.dim() - 2)
            here = place[:, : x.shape[1]]
            real = visual.gather(1, here).reshape(*here.shape, *ones)  # short rows are padded
            there = x.to(device).masked_fill(~real, 0)
            if st.local is not None:
                here = st.local.to(device).gather(1, here)
            known = there.new_zeros(here.shape[0], st.length, *x.shape[2:])
            known.scatter_(1, here.reshape(*here.shape, *ones).expand_as(there), there)
            known = gather_tokens(known, (columns - base).clamp(min=0))
            old = layer.scratch.setdefault(index, {}).get(name)
            if old is None:
                old = known.new_zeros(known.shape[0], 0, *known.shape[2:])
            short = known.shape[1] - old.shape[1]
            old = torch.cat([old, old.new_zeros(old.shape[0], short, *old.shape[2:])], 1)
            new = (columns >= base).reshape(*columns.shape, *ones)
            layer.scratch[index][name] = known.where(new, old)

    def _reached_end(self, st: _Forward) -> Tensor:
        """(B, logical length) bool, tokens of this forward that entered the last layer, and all
        earlier ones."""
        batch = st.real.shape[0]
        device = st.real.device
        if st.local is None:
            return torch.ones(batch, st.base + st.length, dtype=torch.bool, device=device)
        new = torch.zeros(batch, st.length, dtype=torch.bool, device=device)
        there = torch.ones_like(st.local, dtype=torch.bool) if st.filler is None else ~st.filler
        new = new.scatter(1, st.local.to(device), there.to(device))
        return torch.cat([new.new_ones(batch, st.base), new], 1)

    def _sublayer_post(
        self,
        t: tap.Tap,
        name: str,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
    ) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        t.sublayers[name] = (given, output[0] if isinstance(output, tuple) else output)


class _NoTap:
    """Stands where no attention can be read."""

    def __getattr__(self, name: str) -> Any:
        raise UnsupportedError(
            "the attention of this layer cannot be read here: before the first layer there is "
            "none, behind a layer that some tokens jumped over (a bypass method in the chain) it "
            "saw part of them, and on_cache comes after it is gone (use note_cache)"
        )


_no_tap: Any = _NoTap()


def sliding_window(config: Any) -> int | None:
    """Tokens in the window of a language model with sliding layers, None without."""
    if not getattr(config, "use_sliding_window", True):
        return None
    types = getattr(config, "layer_types", None)
    slides = types is None or any("sliding" in t for t in types)
    return getattr(config, "sliding_window", None) if slides else None


def _has_images(visual: Tensor) -> bool:
    """Whether a prompt, not a decoded token, holds placeholders."""
    return visual.shape[1] > 1 and bool(visual.any())


def _arange(hidden: Tensor) -> Tensor:
    return torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[0], -1)


def _take_positions(positions: Tensor, local: Tensor) -> Tensor:
    """Positions (..., B or 1, L) of the tokens at local (B, T): (..., B, T)."""
    positions = positions.expand(*positions.shape[:-2], local.shape[0], -1)
    index = local.expand(*positions.shape[:-1], -1) if positions.dim() > 2 else local
    return positions.to(local.device).gather(-1, index)


def _gather_mask(
    mask: Any,
    rows: Tensor,
    shorter: bool,
    base: int,
    columns: Tensor,
    filler: Tensor | None,
    flash: bool,
) -> Tensor | None:
    """The mask Hugging Face built at logical size, for the rows and columns that are left.

    Args:
        mask: None, (B, kv) for flash attention, or (B, 1, q, kv), bool or additive.
        rows: (B, q) logical index in this forward of the query rows.
        shorter: whether rows of the mask must be gathered too.
        base: logical tokens before this forward.
        columns: (B, kv) logical column of each key.
        filler: (B, kv) keys that must not be seen, or None.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedError(
            f"masks of type {type(mask).__name__} cannot be compressed; use sdpa"
        )
    if mask is None:
        if filler is None:
            return None  # causal by order, or one query row that sees every key
        if flash:
            return ~filler
        seen = columns[:, None, :] <= (base + rows)[:, :, None]
        return (seen & ~filler[:, None, :])[:, None]
    mask = mask.to(columns.device)
    if mask.dim() == 2:
        mask = mask.gather(1, columns)
        return mask if filler is None else mask & ~filler
    mask = mask.expand(columns.shape[0], -1, -1, -1)
    if shorter:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(*mask.shape[:3], -1))
    if filler is None:
        return mask
    hide = filler[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~hide
    return mask.masked_fill(hide, torch.finfo(mask.dtype).min)
