# SPDX-License-Identifier: Apache-2.0
"""Models that no other adapter knows, by their seams: an image encoder, a projector, an LLM.

What the LLM must be like for dropping to equal masking is checked here (`_check`), and so
is what makes encoder patches and LLM tokens one to one (`_why_joined`); where they are not, only
the stages inside the LLM are offered. `Sites.notes` says what was found.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError
from . import blip
from .base import DecoderSites, Sites, VisionSites, is_a

PROJECTORS = (
    *("multi_modal_projector", "mm_projector", "connector", "projector", "aligner"),
    *("visual_projection", "vision_projection", "embed_vision", "merger"),
)
LAYER_ARGUMENTS = {
    *("hidden_states", "attention_mask", "position_ids", "past_key_values", "use_cache"),
    *("position_embeddings", "output_attentions", "output_router_logits", "kwargs"),
}
DECODER_ARGUMENTS = {
    *("input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds"),
    *("use_cache", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "kwargs"),
}
FEATURE_ARGUMENTS = {
    *("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "kwargs"),
}
ATTENTION_PARTS = re.compile(r"(q|k|v|o|out|qkv)_proj|dense|rotary_emb|(q|k)_(layer)?norm")
"""Parts of attention as in Llama, with norms. Low-rank projections (MLA) are not among them: their
keys are rotated in part, and methods that compare keys (DART) would depend on padding."""

TOKEN_COUNTS = ("image_seq_length", "num_image_tokens", "mm_tokens_per_image", "image_token_len")
MIXING = re.compile("Conv|Pool|Shuffle|Fold|Attention|Embedding|Resampl|Upsample")


def _why_not(model: Any, reason: str) -> UnsupportedError:
    from .locate import SUPPORTED

    return UnsupportedError(f"{type(model).__name__}: {reason}; supported: {SUPPORTED}")


def _has_images(model: Any) -> bool:
    """Whether this is a generating model that takes images and text."""
    if not is_a(model, "transformers.modeling_utils.PreTrainedModel") or not model.can_generate():
        return False
    modalities = getattr(model, "input_modalities", None) or ()
    modalities = (modalities,) if isinstance(modalities, str) else modalities
    return getattr(model.config, "vision_config", None) is not None or "image" in modalities


def _decoder(model: Any) -> Any:
    """The module with the ``layers``, below a language model with a head if need be."""
    decoder = model.get_decoder()
    for _ in range(2):
        if decoder is None or isinstance(getattr(decoder, "layers", None), nn.ModuleList):
            break
        decoder = getattr(decoder, "model", None)
    return decoder if isinstance(getattr(decoder, "layers", None), nn.ModuleList) else None


def _unknown(forward: Any, known: set[str]) -> list[str]:
    """Arguments of a forward that the engine would not shorten with the tokens."""
    return sorted(set(inspect.signature(forward).parameters) - known)


def _check(model: Any, tower: Any, decoder: Any) -> None:
    """Refuse language models in which a dropped token is not the same as a masked one."""
    text = model.config.get_text_config()
    if model.config.is_encoder_decoder or text.is_encoder_decoder:
        raise _why_not(
            model, "an encoder-decoder, whose decoder reads the image by cross-attention"
        )
    if decoder is None:
        raise _why_not(model, "its language model has no list of layers that could be found")
    if tower is None or any(m is decoder for m in tower.modules()):
        raise _why_not(model, "it has no image encoder in front of its language model")
    crossing = {n for m in decoder.modules() if "CrossAtt" in (n := type(m).__name__)}
    if crossing:
        raise _why_not(
            model,
            "its language model reads the image by cross-attention "
            f"({', '.join(sorted(crossing))}), so no image tokens stand in the prompt",
        )
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if kinds:
        raise _why_not(
            model,
            f"layers of type {', '.join(sorted(kinds))} count or mix the tokens that are left, so "
            "dropping one would change the others",
        )
    layers = {type(layer): layer for layer in decoder.layers}
    for layer in decoder.layers:
        others = [type(m).__name__ for m in layer.modules() if isinstance(m, nn.Conv1d)]
        if getattr(layer, "self_attn", None) is None or others:
            raise _why_not(
                model,
                f"{type(layer).__name__} mixes tokens otherwise than by self-attention "
                "(convolution or recurrence), so dropping one would change the others",
            )
    for layer in layers.values():
        parts = [n for n, _ in layer.self_attn.named_children() if not ATTENTION_PARTS.fullmatch(n)]
        if parts:
            raise _why_not(
                model,
                f"{type(layer.self_attn).__name__} has other parts than attention in Llama "
                f"({', '.join(parts)})",
            )
        unknown = _unknown(layer.forward, LAYER_ARGUMENTS)
        if unknown or "position_embeddings" not in inspect.signature(layer.forward).parameters:
            what = f"get {', '.join(unknown)}" if unknown else "get no rotary tables"
            raise _why_not(
                model, f"its layers ({type(layer).__name__}) {what}, unlike those of Llama"
            )
    unknown = _unknown(decoder.forward, DECODER_ARGUMENTS)
    if unknown:
        raise _why_not(
            model,
            f"its language model ({type(decoder).__name__}) also gets {', '.join(unknown)}, which "
            "would not be shortened with the tokens",
        )
    if not _real_tables(decoder):
        raise _why_not(
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


def _projector(base: Any, tower: nn.Module, decoder: nn.Module) -> Any:
    """The module between encoder and language model, or None."""
    for name in PROJECTORS:
        if isinstance(getattr(base, name, None), nn.Module):
            return getattr(base, name)
    ends = (tower, decoder)
    left = [c for c in base.children() if not any(m is end for m in c.modules() for end in ends)]
    return left[0] if len(left) == 1 else None


def _why_joined(model: Any, base: Any, vision: VisionSites | None, projector: Any) -> str | None:
    """Why encoder patches and LLM tokens are not, or may not be, one to one; None if they are."""
    if vision is None:
        return "its image encoder has no adapter"
    if projector is None:
        return "no projector between encoder and LLM was found"
    extra = _unknown(base.get_image_features, FEATURE_ARGUMENTS)
    if extra:
        return f"its images are cut up or of any size (get_image_features takes {', '.join(extra)})"
    linear = next((m for m in projector.modules() if isinstance(m, nn.Linear)), None)
    mixing = [n for m in projector.modules() if MIXING.search(n := type(m).__name__)]
    if linear is None or mixing or linear.in_features != vision.width:
        width = "no linear layer" if linear is None else f"{linear.in_features} channels"
        return (
            f"{type(projector).__name__} joins patches ({', '.join(mixing) or width} for "
            f"{vision.width} of the encoder)"
        )
    config = model.config
    layer = getattr(config, "vision_feature_layer", -1)
    if not isinstance(layer, int):
        return f"the projector reads several encoder layers ({layer})"
    removed = getattr(config, "vision_feature_select_strategy", "full") == "default"
    if int(removed) != vision.prefix:
        return f"the encoder puts {vision.prefix} tokens in front and {int(removed)} are removed"
    edge, patch = getattr(config.vision_config, "image_size", None), vision.patch
    if not isinstance(edge, int):
        return "the size of its images is not fixed"
    for name in TOKEN_COUNTS:
        count = getattr(config, name, None)
        if isinstance(count, int) and count != (edge // patch) ** 2:
            return f"{(edge // patch) ** 2} patches become {count} tokens ({name})"
    return None


def _feature_block(config: Any, blocks: int) -> int:
    """hidden_states[0] are the embeddings, hidden_states[i] the output of block i - 1."""
    layer = getattr(config, "vision_feature_layer", -1)
    return layer + blocks if layer < 0 else layer - 1


def locate(model: Any) -> Sites | None:
    """Sites of an unknown multimodal LLM, None for models that are none.

    Raises:
        UnsupportedError: it is a multimodal LLM whose image tokens cannot be dropped.
    """
    if not _has_images(model) or blip.locate(model) is not None:
        return None
    config = model.config
    base = model.base_model
    try:
        tower = model.get_encoder(modality="image")
    except (AttributeError, TypeError, ValueError):
        tower = None
    tower = next((m for m in (tower,) if isinstance(m, nn.Module) and m not in (model, base)), None)
    decoder = _decoder(model)
    _check(model, tower, decoder)
    token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    if not isinstance(token, int) or not hasattr(base, "get_image_features") or base is model:
        raise _why_not(
            model,
            "where image tokens stand in the prompt is not told by image_token_id and "
            "get_image_features, as in other models of transformers",
        )
    return _sites(model, base, tower, decoder, token)


def _sites(model: Any, base: Any, tower: Any, decoder: Any, token: int) -> Sites:
    from .locate import locate_vision

    config, text = model.config, model.config.get_text_config()
    vision: VisionSites | None
    try:
        vision = locate_vision(tower)
    except UnsupportedError:
        vision = None
    projector = _projector(base, tower, decoder)
    why = _why_joined(model, base, vision, projector)
    heads = text.num_attention_heads
    notes = [
        f"{type(model).__name__} was recognised by its seams (adapters/generic.py): image encoder "
        f"{type(tower).__name__}, projector {type(projector or tower).__name__}, language model "
        f"{type(decoder).__name__}"
    ]
    missing: dict[str, str] = {}
    if why is not None:
        reason = f"encoder patches and LLM tokens are not one to one: {why}"
        missing = dict.fromkeys(("pixels", "vision", "features"), reason)
        notes.append(f"methods act inside the language model only; {reason}")
        notes.append("every run of image tokens in a prompt is taken for one image")
    if vision is None:
        notes.append("the encoder's FLOPs are not counted")
        vision = VisionSites(tower, [], 0, False, 0, "none", 0, 0)
    edge = 0 if why is not None else config.vision_config.image_size // vision.patch
    sites = DecoderSites(
        base=base,
        decoder=decoder,
        projector=tower if projector is None else projector,
        token_ids=(token,),
        tokens_per_image=edge**2 or None,
        feature_block=0 if why is not None else _feature_block(config, len(vision.blocks)),
        hidden=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        video=getattr(config, "video_token_id", None) is not None,
        mrope=hasattr(base, "get_rope_index"),
    )
    return Sites(type(model).__name__, vision, sites, notes, missing)
