# SPDX-License-Identifier: Apache-2.0
"""Every seam of transformers that vtc relies on, against the release that is installed.

A new release that moves one fails here, with a message that says what moved and who reads it; look
here first when many other tests fail at once.
"""

from __future__ import annotations

import inspect
from typing import Any

import mini_llava as mini
import pytest
import torch
import transformers
from mini_anyres import build as build_anyres
from torch import nn

import vtc.tap
from vtc.attention import Around

RELEASE = transformers.__version__
FAMILIES = {
    "llava": mini.build,
    "llava-next": lambda: build_anyres("next"),
    "llava-onevision": lambda: build_anyres("onevision"),
}


def need(there: object, what: str, reader: str) -> None:
    """Fail with the name of the seam."""
    assert there, f"transformers {RELEASE} moved a seam: {what} (read by {reader})"


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> Any:
    return FAMILIES[request.param]()


def test_model_structure(model: Any) -> None:
    base = model.model
    for part in ("language_model", "vision_tower", "multi_modal_projector", "get_image_features"):
        need(hasattr(base, part), f"{type(base).__name__}.{part}", "adapters/llava*.py")
    need(hasattr(base.language_model, "layers"), "the decoder's .layers", "vtc/decoder.py")
    need(hasattr(base.language_model, "rotary_emb"), "the decoder's .rotary_emb", "vtc/decoder.py")
    for name in ("image_token_id", "vision_feature_layer", "vision_feature_select_strategy"):
        need(hasattr(model.config, name), f"config.{name}", "adapters/llava.py")
    names = inspect.signature(base.get_image_features).parameters
    need("pixel_values" in names, "get_image_features(pixel_values)", "vtc/crops.py, vtc/inputs.py")
    layer = base.language_model.layers[0]
    for part in ("self_attn", "mlp", "input_layernorm"):
        need(hasattr(layer, part), f"decoder layer .{part}", "vtc/decoder.py, vtc/tap.py")
    for part in ("q_proj", "k_proj", "head_dim", "scaling"):
        need(hasattr(layer.self_attn, part), f"attention .{part}", "vtc/tap.py (Ahead)")
    need(vtc.tap.Ahead.fits(layer), "apply_rotary_pos_emb beside the attention", "vtc/tap.py")


@torch.no_grad()
def test_calls_of_layers() -> None:
    """What a decoder layer is handed: the one place where tokens leave."""
    model, inputs, seen = mini.build(), mini.prompt([1, 2], pad="left"), {}

    def layer_pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["args"], seen["kwargs"] = args, kwargs

    def lm_pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["lm"] = kwargs

    def base_pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen["base"] = [*args, *kwargs]

    decoder = model.model.language_model
    decoder.layers[1].register_forward_pre_hook(layer_pre, with_kwargs=True)
    decoder.register_forward_pre_hook(lm_pre, with_kwargs=True)
    model.model.register_forward_pre_hook(base_pre, with_kwargs=True)
    out = model(**inputs, use_cache=True)
    hidden = seen["args"][0] if seen["args"] else seen["kwargs"].get("hidden_states")
    length = inputs["input_ids"].shape[1]
    need(isinstance(hidden, torch.Tensor), "hidden_states of a decoder layer", "vtc/decoder.py")
    for name in ("attention_mask", "position_ids", "position_embeddings", "past_key_values"):
        need(name in seen["kwargs"], f"decoder layer keyword {name}", "vtc/decoder.py")
    mask, tables = seen["kwargs"]["attention_mask"], seen["kwargs"]["position_embeddings"]
    need(
        tuple(mask.shape) == (2, 1, length, length), f"mask {tuple(mask.shape)}", "vtc/arguments.py"
    )
    need(len(tables) == 2 and tables[0].shape[-2] == length, "cos and sin (.., L, d)", "take_rows")
    need(seen["lm"].get("inputs_embeds") is not None, "inputs_embeds of the LM", "_lm_pre")
    need("past_key_values" in seen["lm"], "past_key_values of the LM", "vtc/decoder.py")
    need("input_ids" in seen["base"], "input_ids as a keyword of the base model", "_base_pre")
    need(hasattr(out, "past_key_values") and out.logits is not None, "the output", "_lm_post")


@torch.no_grad()
def test_image_features() -> None:
    """Features in the LLM's space are `pooler_output`; generate() may encode before prefill."""
    model, inputs, seen = mini.build(), mini.prompt(1, batch=2), []
    out = model.get_image_features(inputs["pixel_values"])
    features = getattr(out, "pooler_output", None)
    need(features is not None, "get_image_features(...).pooler_output", "vtc/inputs.py")
    need(
        [tuple(f.shape) for f in features] == [(16, 48)] * 2, "one (N, D) an image", "vtc/crops.py"
    )

    def base_pre(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append(kwargs)

    model.model.register_forward_pre_hook(base_pre, with_kwargs=True)
    model.generate(**inputs, max_new_tokens=2, do_sample=False)
    given = seen[0].get("mm_encoder_outputs")
    pixels = seen[0].get("pixel_values")
    need(given or pixels is not None, "pixels or mm_encoder_outputs at prefill", "vtc/decoder.py")
    if "mm_encoder_outputs" in inspect.signature(model.forward).parameters:
        need(hasattr((given or {}).get("image"), "pooler_output"), "the encoded image", "_base_pre")
    need("pixel_values" not in seen[1] or seen[1]["pixel_values"] is None, "steps", "_base_pre")


def test_cache_layers() -> None:
    """`DynamicLayer`: lengths are read in one method only, tensors are .keys and .values."""
    from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

    x = torch.randn(2, 2, 5, 4)
    layer = DynamicLayer()
    layer.update(x, x)
    need(
        layer.keys.shape == x.shape and layer.values.shape == x.shape, ".keys, .values", "cache.py"
    )
    need(layer.get_seq_length() == 5, "get_seq_length()", "vtc/cache.py")
    for name in (
        "reorder_cache",
        "batch_repeat_interleave",
        "batch_select_indices",
        "crop",
        "reset",
    ):
        need(hasattr(DynamicLayer, name), f"DynamicLayer.{name}", "vtc/cache.py (PrunedMixin)")
    cache = DynamicCache()
    need(isinstance(cache, Cache) and hasattr(cache, "layers"), "Cache.layers", "vtc/cache.py")
    need(hasattr(cache, "layer_class_to_replicate"), "layer_class_to_replicate", "pruned_layer")
    # Masks must be sized by get_seq_length alone, which is what a pruned layer overrides.
    sizes = inspect.getsource(DynamicLayer.get_mask_sizes)
    need("get_seq_length()" in sizes, "get_mask_sizes by get_seq_length", "vtc/cache.py")


def test_attention_interface() -> None:
    from transformers import AttentionInterface
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    reader = "vtc/attention.py"
    need(hasattr(AttentionInterface, "register"), "AttentionInterface.register", reader)
    need("sdpa" in ALL_ATTENTION_FUNCTIONS, "the attention function of sdpa", reader)
    decoder = mini.build(attention="eager").model.language_model
    module = inspect.getmodule(type(decoder.layers[0].self_attn))
    need(hasattr(module, "eager_attention_forward"), "eager_attention_forward", reader)
    calls: list[tuple] = []

    def around(stock: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return stock(*args, **kwargs)

    handle = Around([layer.self_attn for layer in decoder.layers], "vtc_seam_", around)
    decoder(inputs_embeds=torch.zeros(1, 3, 48))
    need(len(calls) == len(decoder.layers), "attention named by the module's config", reader)
    need(len(calls[0]) == 5, "attention called with module, q, k, v, mask", reader)
    handle.remove()


@pytest.mark.parametrize("tower", mini.TOWERS)
def test_vision_blocks(tower: str) -> None:
    """Names that changed before: DINOv2's and ViT's attention (5.18), the CLIP wrapper (5.6)."""
    from vtc.adapters.locate import locate_vision

    sites = locate_vision(mini.build(tower).model.vision_tower)
    need(len(sites.blocks) == 4, "the blocks of the encoder", "adapters/hf_vision.py")
    need(all(b.key_source is not None for b in sites.blocks), "k_proj", "adapters/hf_vision.py")
    need(sites.patch == 8 and sites.width == 32, "the configuration", "adapters/hf_vision.py")


@torch.no_grad()
def test_checkpointing_wraps_forward() -> None:
    """Hooks of a checkpointed layer run once: `GradientCheckpointingLayer` calls them outside."""
    model, ran = mini.build().train(), []
    model.gradient_checkpointing_enable()
    layer = model.model.language_model.layers[0]
    need(hasattr(layer, "gradient_checkpointing"), "layer.gradient_checkpointing", "vtc/decoder.py")
    layer.register_forward_pre_hook(lambda *_: ran.append(1))
    with torch.enable_grad():
        model(**mini.prompt(1)).logits.sum().backward()
    if type(layer).__call__ is nn.Module.__call__:
        need(len(ran) == 1, "hooks outside the recomputed part of a layer", "vtc/decoder.py")
    else:  # vtc refuses it there
        need(len(ran) == 2, "GradientCheckpointingLayer.__call__", "_check_recomputing")
