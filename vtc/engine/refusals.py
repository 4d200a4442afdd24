# SPDX-License-Identifier: Apache-2.0
"""Refusals: models and chains that vtc cannot act on, each with its reason."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..adapters.base import DecoderSites, Sites
from ..errors import UnsupportedError
from ..hooks import attention_rows
from ..method import Method

Acting = Sequence[tuple[int, Method, frozenset[int]]]
"""Methods, each with its place in the chain and the layers it acts on."""


def sliding_window(config: Any) -> int | None:
    """Tokens in the window of a language model with sliding layers, None without."""
    if not getattr(config, "use_sliding_window", True):
        return None
    types = getattr(config, "layer_types", None)
    slides = types is None or any("sliding" in t for t in types)
    return getattr(config, "sliding_window", None) if slides else None


def check_language_model(sites: DecoderSites, compact: bool) -> None:
    """Refuse a language model whose positions, masks or attention cannot follow dropped tokens.

    Args:
        compact: whether a method renumbers positions.
    """
    config = sites.decoder.config
    implementation = config._attn_implementation
    if compact and sites.mrope:
        raise UnsupportedError(
            f"{type(sites.base).__name__} gives image tokens positions of time, height "
            'and width, which cannot be renumbered; use positions="original"'
        )
    window = sliding_window(config)
    if window is not None and "flash" in implementation:
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
    if "flex" in implementation or "paged" in implementation:
        raise UnsupportedError(
            f'attention "{implementation}" builds masks that cannot be gathered; use "sdpa", '
            '"flash_attention_2" or "eager"'
        )


def check_layers(layers: Sequence[nn.Module], on_decoder: Acting, on_bypass: Acting) -> None:
    """Refuse methods that act behind the last layer, or read what a layer cannot show them."""
    depth = len(layers)
    for _, method, after in on_decoder:
        if after.isdisjoint(range(-1, depth - 1)):
            raise UnsupportedError(
                f"{method} acts after LLM layer {min(after)} and there are {depth}: nothing "
                "would be compressed; choose an earlier layer"
            )
    if len(on_bypass) > 1:
        names = " and ".join(m.name for _, m, _ in on_bypass)
        raise UnsupportedError(f"{names} both let tokens jump over layers; chain only one")
    for _, jumps, over in on_bypass:
        for _, method, after in on_decoder:
            idle = 1.0 in (jumps.keep_ratio, method.keep_ratio)
            if idle or not method.needs & {"ran", "sublayers"} or after.isdisjoint(over):
                continue
            raise UnsupportedError(
                f"{method.name} reads LLM layer {min(after & over)}, which {jumps.name} lets "
                "tokens jump over: it would see only some of them; choose layers for one that "
                "the other leaves alone, or chain a method that acts in front of the LLM or "
                "reads the next layer, such as pdrop"
            )
    for _, method, _ in (*on_decoder, *on_bypass):
        if "ahead" in method.needs and not all(map(attention_rows.Ahead.fits, layers)):
            raise UnsupportedError(
                f"{method.name} ranks by the attention of a layer that has not run yet, and "
                f"{type(layers[0]).__name__} does not have the parts of a Llama layer "
                "(input_layernorm, q_proj, k_proj, rotary embedding)"
            )


def check_packs(on_cache: Sequence[Method]) -> None:
    """Refuse methods that would evict slots of the KV cache which another one has packed.

    Args:
        on_cache: those of the cache stage, in the order they are applied.
    """
    order = [m for m in on_cache if m.keep_ratio != 1 or m.packs]
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


def check_recomputing(decoder: nn.Module, layers: Sequence[nn.Module], on_bypass: Acting) -> None:
    """Refuse activation checkpointing where hooks would run again in the backward pass."""
    if not (torch.is_grad_enabled() and decoder.training):
        return
    if not any(getattr(layer, "gradient_checkpointing", False) for layer in layers):
        return
    if type(layers[0]).__call__ is not nn.Module.__call__:  # pragma: no cover (older transformers)
        raise UnsupportedError(
            "gradient checkpointing of this transformers runs the hooks of LLM layers again in "
            "the backward pass, when dropped tokens are gone; disable it, or use a newer "
            "transformers (5.23 does not)"
        )
    around = [m for _, m, _ in on_bypass if m.bypass == "attention"]
    if around:
        raise UnsupportedError(
            f"gradient checkpointing runs LLM layers again in the backward pass, when what "
            f"{around[0].name} left out of their attention is gone; disable it, or use a "
            "method that drops tokens between layers, such as fastv"
        )


Edge = tuple[nn.Module, str, nn.Module]
"""(parent, name, child) of a module tree."""


def edges(model: nn.Module, sites: Sites) -> list[Edge]:
    """The module tree above all that gets hooks."""
    hooked = [sites.vision.tower]
    for block in sites.vision.blocks:
        hooked += [block.module, block.attn, block.norm2, block.mlp]
    if sites.decoder is not None:
        llm = sites.decoder
        hooked += [llm.base, llm.decoder, llm.projector, *llm.decoder.layers]
    wanted, known = set(map(id, hooked)), {}
    for path in [name for name, module in model.named_modules() if id(module) in wanted]:
        parent = model
        for name in path.split(".") if path else ():
            child = parent.get_submodule(name)
            known[id(parent), name] = parent, name, child
            parent = child
    return list(known.values())


def check_parts(model: nn.Module, edges: list[Edge]) -> None:
    """Refuse a model of which a part with hooks has been taken out since.

    Raises:
        UnsupportedError: it is neither in its place nor inside a wrapper there.
    """
    for parent, name, child in edges:
        if parent._modules.get(name) is child or any(child is m for m in model.modules()):
            continue
        raise UnsupportedError(
            f"{type(child).__name__} ({name}) of the wrapped model is gone or has been replaced, "
            "and compression acted on it; call vtc.unwrap(model), then vtc.wrap(...) the new model"
        )


def check_shared(model: nn.Module, owners: tuple[type, ...]) -> None:
    """Refuse a model a part of which is compressed already.

    Args:
        owners: classes whose methods are hooks of vtc.

    Raises:
        ValueError: it is, by itself or as a part of another model.
    """
    for name, module in model.named_modules():
        for hook in (*module._forward_pre_hooks.values(), *module._forward_hooks.values()):
            if isinstance(getattr(getattr(hook, "func", hook), "__self__", None), owners):
                raise ValueError(
                    f"{type(module).__name__} ({name}) is compressed already, by itself or as a "
                    "part of another model that shares it: call vtc.unwrap on what was wrapped "
                    "first, or give each model its own (copy.deepcopy)"
                )


def refuse_graph(methods: Iterable[Method]) -> None:
    """Under `torch.compile`, leave the graph or, with ``fullgraph=True``, fail with the reason.

    Raises:
        UnsupportedError: a method is adaptive.
    """
    if not torch.compiler.is_compiling():
        return
    for m in methods:  # pragma: no cover (traced)
        if not m.compiles:
            raise UnsupportedError(
                f"{m.name} lets the data decide how many tokens stay, so torch.compile has no one "
                "graph for it; compile without fullgraph=True, which runs it outside the graph, or "
                "use a method with a fixed budget, such as visionzip, divprune or fastv"
            )
