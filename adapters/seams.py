# SPDX-License-Identifier: Apache-2.0
"""Checks that in an unknown language model dropping a token equals masking it."""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from ..transformers_contract import CACHE, LAYER_ARGUMENTS

DECODER_ARGUMENTS = {
    *("input_ids", "attention_mask", "position_ids", *CACHE.names, "inputs_embeds"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "kwargs"),
}
ATTENTION_PARTS = re.compile(r"(q|k|v|o|out|qkv)_proj|dense|rotary_emb|(q|k)_(layer)?norm")
"""Parts of attention as in Llama, with norms. Low-rank projections (MLA) are not among them: their
keys are rotated in part, and methods that compare keys (DART) would depend on padding."""


def refusal(model: Any, reason: str) -> UnsupportedError:
    """The refusal of a model, with what is supported."""
    from .locate import SUPPORTED

    return UnsupportedError(f"{type(model).__name__}: {reason}; supported: {SUPPORTED}")


def unknown_arguments(forward: Any, known: set[str]) -> list[str]:
    """Arguments of a forward that the engine would not shorten with the tokens."""
    return sorted(set(inspect.signature(forward).parameters) - known)


def check(model: Any, tower: Any, decoder: Any) -> None:
    """Refuse language models in which a dropped token is not the same as a masked one."""
    text = model.config.get_text_config()
    if model.config.is_encoder_decoder or text.is_encoder_decoder:
        raise refusal(model, "an encoder-decoder, whose decoder reads the image by cross-attention")
    if decoder is None:
        raise refusal(model, "its language model has no list of layers that could be found")
    if tower is None or any(m is decoder for m in tower.modules()):
        raise refusal(model, "it has no image encoder in front of its language model")
    crossing = {n for m in decoder.modules() if "CrossAtt" in (n := type(m).__name__)}
    if crossing:
        raise refusal(
            model,
            "its language model reads the image by cross-attention "
            f"({', '.join(sorted(crossing))}), so no image tokens stand in the prompt",
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise refusal(
            model,
            f"layers of type {', '.join(sorted(kinds))} count or mix the tokens that are left, so "
            "dropping one would change the others",
        )
    layers = {type(layer): layer for layer in decoder.layers}
    for layer in decoder.layers:
        others = [type(m).__name__ for m in layer.modules() if isinstance(m, nn.Conv1d)]
        if getattr(layer, "self_attn", None) is None or others:
            raise refusal(
                model,
                f"{type(layer).__name__} mixes tokens otherwise than by self-attention "
                "(convolution or recurrence), so dropping one would change the others",
            )
    for layer in layers.values():
        parts = [n for n, _ in layer.self_attn.named_children() if not ATTENTION_PARTS.fullmatch(n)]
        if parts:
            raise refusal(
                model,
                f"{type(layer.self_attn).__name__} has other parts than attention in Llama "
                f"({', '.join(parts)})",
            )
        others = unknown_arguments(layer.forward, LAYER_ARGUMENTS | {"kwargs"})
        if others or "position_embeddings" not in inspect.signature(layer.forward).parameters:
            what = f"get {', '.join(others)}" if others else "get no rotary tables"
            raise refusal(
                model, f"its layers ({type(layer).__name__}) {what}, unlike those of Llama"
            )
    more = unknown_arguments(decoder.forward, DECODER_ARGUMENTS)
    if more:
        raise refusal(
            model,
            f"its language model ({type(decoder).__name__}) also gets {', '.join(more)}, which "
            "would not be shortened with the tokens",
        )
    if not _real_tables(decoder):
        raise refusal(
            model, "its rotary tables are not the pair (cos, sin) that every layer gets in Llama"
        )


def _real_tables(decoder: Any) -> bool:
    """Whether the rotary module gives (cos, sin), seen from one position."""
    rotary: Any = getattr(decoder, "rotary_emb", None)
    table = getattr(rotary, "inv_freq", None)
    if table is None:
        return False
    x = torch.zeros(1, 1, 1, device=table.device)
    at = torch.zeros(1, 1, dtype=torch.long, device=table.device)
    for positions in (at, at.expand(3, 1, 1)):  # M-RoPE wants three axes
        try:
            tables = rotary(x, positions)
        except (RuntimeError, IndexError, ValueError):
            continue
        if isinstance(tables, tuple) and len(tables) == 2:
            return all(isinstance(t, torch.Tensor) and not t.is_complex() for t in tables)
    return False
