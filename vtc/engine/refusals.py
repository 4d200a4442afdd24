# SPDX-License-Identifier: Apache-2.0
"""Refusals: models and chains that vtc cannot act on, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence, Set
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.base import DecoderSites, GridSites, Sites, VisionSites
from ..errors import UnsupportedError
from ..hooks import attention_rows
from ..method import Method
from ..registry import known_methods
from ..transformers_contract import ENGINE, moved, way_out

Acting = Sequence[tuple[int, Method, frozenset[int]]]
"""Methods, each with its place in the chain and the layers it acts on."""

ENCODER_SIDE = frozenset({"pixels", "vision", "features"})
OF_THE_CALLER = frozenset({"text", "frames", "routers"})
"""What methods need that only a caller can give, of `Method.needs`."""
COMPLETE = frozenset({"ran", "sublayers"})
"""What methods need of an LLM layer that all tokens have entered."""


# ---- advice --------------------------------------------------------------------------------------


def fitting(wanted: Callable[[Method], bool]) -> list[str]:
    """Names of the registered methods, with their defaults, that a caller can use instead."""
    known = known_methods().items()
    ready = {name: method() for name, method in known if not method.needs & OF_THE_CALLER}
    return [name for name, method in ready.items() if wanted(method)]


def _listed(names: list[str]) -> str:
    return ", ".join(names) or "none"


def _a_few(names: list[str]) -> str:
    """The first of them, as examples: "a, b or c"."""
    *front, last = names[:3]
    return f"{', '.join(front)} or {last}" if front else last


def settings(parameters: dict[str, Any]) -> str:
    """Parameters of a method as a call has them: ``scope='visual'``."""
    return ", ".join(f"{name}={value!r}" for name, value in parameters.items())


def behind_encoder(sites: VisionSites, alone: bool) -> str:
    """Names of the methods that leave the tokens inside an encoder alone.

    Args:
        alone: whether nothing comes behind the encoder.
    """
    stages = {"features"} if alone else {"features", "decoder", "bypass", "cache"}
    return _listed(
        fitting(
            lambda m: (
                m.stages <= stages
                and (sites.has_cls or bool(m.without_cls) or "cls" not in m.needs)
            )
        )
    )


# ---- encoders ------------------------------------------------------------------------------------


def check_stages(model: nn.Module, sites: Sites, methods: Iterable[Method]) -> None:
    """Refuse methods that act where this model has nothing to act on."""
    available = set(ENCODER_SIDE)
    if sites.decoder is not None:
        available |= {"decoder", "bypass", "cache"}
    available -= set(sites.missing)
    usable = _listed([name for name, m in known_methods().items() if m().stages <= available])
    kind = type(model).__name__
    for method in methods:
        method.check(sites)
        absent = sorted(method.stages & set(sites.missing))
        if absent:
            raise UnsupportedError(
                f'"{method.name}" has a {" and a ".join(absent)} stage, and in {kind} '
                f"{sites.missing[absent[0]]}; methods that work here: {usable}"
            )
        missing = method.stages - available
        if missing:
            raise UnsupportedError(
                f'"{method.name}" acts in the language model ({", ".join(sorted(missing))} stage) '
                f"and {kind} is an encoder alone; methods for encoders: {usable}"
            )


def check_encoder(
    sites: VisionSites,
    methods: Sequence[Method],
    last: int,
    grids: GridSites | None,
    packs: bool,
    alone: bool,
) -> None:
    """Refuse methods that need what an encoder does not have.

    Args:
        last: the last block in which methods act.
        grids, packs: as in `VisionEngine`; alone: as in `behind_encoder`.
    """
    closed = _closed(sites, grids)
    if closed:
        _check_whole(sites, methods, grids, closed, alone)
    tower = type(sites.tower).__name__
    if not sites.has_cls:
        _check_cls(tower, methods, {"features"} if closed else ENCODER_SIDE)
    resizing = [m for m in methods if "pixels" in m.stages]
    if resizing and sites.resize is None:
        usable = _listed(fitting(lambda m: m.stages <= ENCODER_SIDE - {"pixels"}))
        raise UnsupportedError(
            f"{resizing[0].name} resizes the image and {tower} takes one size "
            f"only (timm: create the model with dynamic_img_size=True); others: {usable}"
        )
    for m in methods:
        if packs and m.stages <= {"pixels", "vision"} and m.keep_tokens is not None:
            raise UnsupportedError(
                f"{m.name} chooses tokens inside the encoder, in every crop alike, and images "
                "have different numbers of crops here; give keep_ratio instead of keep_tokens"
            )
    proportional = any(m.proportional_attention for m in methods if "vision" in m.stages)
    if proportional and any(block.bias is None for block in sites.blocks[: last + 1]):
        raise UnsupportedError(
            "proportional attention adds the log of token sizes to scores, the attention of "
            f"{tower} takes no mask; give proportional_attention=False, or load the "
            'model with attn_implementation="sdpa" (DINOv2 and ViT: transformers 5.18 or newer)'
        )


def _closed(sites: VisionSites, grids: GridSites | None) -> str:
    """Why no token may leave before or inside the encoder; empty where they may."""
    fold = 1 if grids is None else grids.fold
    if fold > 1:
        return (
            f"the model joins {fold} x {fold} patches behind the encoder to one LLM token, "
            "which needs all of them"
        )
    return sites.whole


def _check_whole(
    sites: VisionSites,
    methods: Sequence[Method],
    grids: GridSites | None,
    why: str,
    alone: bool,
) -> None:
    """Refuse methods in front of or inside an encoder that must keep all of its tokens."""
    resizing = [m for m in methods if "pixels" in m.stages]
    acting = resizing + [m for m in methods if "vision" in m.stages]
    if not acting:
        return
    own = settings(acting[0].outside_encoder)
    own = own and f"give it {own}, with which it does not, or "
    if resizing and grids is not None and grids.packed:
        own = "give the processor a smaller max_pixels, or "
    raise UnsupportedError(
        f"{acting[0].name} takes tokens away before or inside the encoder, and {why}; {own}use "
        f"methods that act behind the encoder: {behind_encoder(sites, alone)}"
    )


def _check_cls(tower: str, methods: Sequence[Method], stages: Set[str]) -> None:
    """Refuse methods that need a class token, where there is none.

    Args:
        stages: those of the encoder side in which methods may act.
    """
    for method in methods:
        if "cls" in method.needs and method.stages & ENCODER_SIDE:
            usable = _listed(fitting(lambda m: "cls" not in m.needs and m.stages <= stages))
            own = settings(method.without_cls)
            raise UnsupportedError(
                f"{method.name} needs a [CLS] token and {tower} has none; "
                + (f"give it {own}, its substitute, or use " if own else "")
                + f"methods that do without: {usable}"
            )


def check_encoder_recomputing(tower: nn.Module, inside: Iterable[Method]) -> None:
    """Refuse activation checkpointing of blocks in which tokens leave."""
    for module in tower.modules():
        on = getattr(module, "gradient_checkpointing", False) and module.training
        if on or getattr(module, "grad_checkpointing", False):
            names = " and ".join(m.name for m in inside)
            raise UnsupportedError(
                f"gradient checkpointing runs a block of {type(tower).__name__} again in the "
                f"backward pass, and {names} has removed tokens inside it by then; enable it on "
                "the language model alone (model.get_decoder().gradient_checkpointing_enable()), "
                "or use a method that acts behind the encoder"
            )


def no_mask(tower: nn.Module) -> UnsupportedError:
    """The refusal of a ragged batch where attention cannot leave padding out."""
    return UnsupportedError(
        "images keep different numbers of tokens and the attention of "
        f'{type(tower).__name__} takes no mask; load the model with attn_implementation="sdpa"'
    )


def check_ragged(method: Method, inside: Iterable[Method], block: int) -> None:
    """Refuse a method that cannot do with a ragged batch, which others have left to it."""
    if method.ragged:
        return
    own = ", ".join(f"{m.name}: {settings(m.alike)}" for m in inside if m.alike)
    raise UnsupportedError(
        f"{method.name} takes as many patches of every image, and an earlier method of the "
        f"chain has left different numbers in front of encoder block {block}; let "
        f"{method.name} finish in front of that one, have that one treat all images alike"
        + (f" ({own})" if own else "")
        + ", or run one image at a time"
    )


def check_patch_features(features: Tensor, images: int, left: int, tower: nn.Module) -> None:
    """Refuse features for the projector that are not the patch tokens which the encoder left."""
    if tuple(features.shape[:2]) != (images, left):
        raise UnsupportedError(
            f"the projector got features of shape {tuple(features.shape)} where "
            f"{type(tower).__name__} left {left} patch tokens of {images} images; features with "
            'prefix tokens (vision_feature_select_strategy="full") or of several layers are not '
            "supported"
        )


# ---- language models -----------------------------------------------------------------------------


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
            if idle or not method.needs & COMPLETE or after.isdisjoint(over):
                continue
            other = fitting(
                lambda m: m.stages == {"decoder"} and "ahead" in m.needs and not m.needs & COMPLETE
            )
            raise UnsupportedError(
                f"{method.name} reads LLM layer {min(after & over)}, which {jumps.name} lets "
                "tokens jump over: it would see only some of them; choose layers for one that "
                "the other leaves alone, or chain a method that acts in front of the LLM or "
                f"reads the next layer, such as {_a_few(other)}"
            )
    for _, method, _ in (*on_decoder, *on_bypass):
        if "sublayers" in method.needs and not all(hasattr(layer, "mlp") for layer in layers):
            raise moved(type(layers[0]).__name__, "no attribute mlp (its MLP)", ENGINE)
        if "ahead" in method.needs and not all(map(attention_rows.Ahead.fits, layers)):
            raise UnsupportedError(
                f"{method.name} ranks by the attention of a layer that has not run yet, and "
                f"{type(layers[0]).__name__} does not have the parts of a Llama layer "
                f"(input_layernorm, q_proj, k_proj, q_norm, rotary embedding); {way_out()}"
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
                own = f" ({method.name}: {settings(method.once)})" if method.once else ""
                raise UnsupportedError(
                    f"{method} evicts from the KV cache while decoding, where {packing.name} "
                    f"has packed the slots; let it evict once, after the prompt{own}, in front"
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
        other = _a_few(fitting(lambda m: m.stages == {"decoder"}))
        raise UnsupportedError(
            f"gradient checkpointing runs LLM layers again in the backward pass, when what "
            f"{around[0].name} left out of their attention is gone; disable it, or use a "
            f"method that drops tokens between layers, such as {other}"
        )


# ---- whole models, and graphs --------------------------------------------------------------------


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
                f"use a method with a fixed budget, such as {_fixed_budgets()}"
            )


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _fixed_budgets() -> str:
    """Methods that drop tokens once and compile; Dynamo need not follow the registry's imports."""
    one = ({"features"}, {"decoder"})
    return _a_few(fitting(lambda m: m.stages in one and m.compiles and m.has_budget))
