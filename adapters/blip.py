# SPDX-License-Identifier: Apache-2.0
"""Hugging Face BLIP, BLIP-2 and InstructBLIP: the vision tower in front of cross-attention.

The text encoder (BLIP) and the Q-Former (BLIP-2) read all tokens of the tower by cross-attention,
so whatever leaves the tower shortens them too; their masks follow the tower's output. The attention
of these towers takes no mask. A key bias reaches it all the same: BLIP's probabilities p pass a
dropout module, and softmax(s + b) = p e^b / sum(p e^b); BLIP-2 calls the attention interface.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..hooks.attention_patch import Around
from ..hooks.per_thread import PerThread, Threaded
from .base import BlockSites, Call, VisionSites, is_a, mlp_width

TOWERS = ("BlipVisionModel", "Blip2VisionModel", "InstructBlipVisionModel")
READERS = ("text_encoder", "qformer", "text_model", "text_decoder")
"""Where a model keeps the module that reads the image; the first it has (VQA's decoder reads the
question instead)."""

QUERY, KEY = 0, 1
IMPLEMENTATION = "vtc_key_bias_"
BIAS = "vtc_key_bias"


def _hidden(call: Call) -> Tensor:
    args, kwargs = call
    return args[0] if args else kwargs["hidden_states"]


def _project(attn: Any, part: int, call: Call, rows: slice) -> Tensor:
    """Queries or keys (B, H, R, d) from the joint projection."""
    bias = attn.qkv.bias
    bias = None if bias is None else bias.chunk(3)[part]
    y = F.linear(_hidden(call)[:, rows], attn.qkv.weight.chunk(3)[part], bias)
    return y.unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


def _split(attn: Any, joint: Tensor, call: Call) -> Tensor:
    """Keys (B, H, T, d) of the joint projection's output (B, T, 3 C)."""
    return joint.chunk(3, 2)[KEY].unflatten(2, (attn.num_heads, -1)).transpose(1, 2)


class _Handles:
    """Several handles as one."""

    def __init__(self, handles: list[Any]) -> None:
        self.handles = handles

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class _Weights(Threaded):
    """Key biases for one BLIP attention, whose probabilities pass ``attn.dropout``."""

    bias: PerThread[Tensor | None] = PerThread(lambda: None)

    def __init__(self, attn: Any) -> None:
        self.attn = attn

    def add(self, call: Call, bias: Tensor) -> Call:
        self.bias = bias
        return call

    def install(self) -> list[Any]:
        # Runs in front of the engine's hook, which calls `add`: a crashed forward leaves nothing.
        return [
            self.attn.register_forward_pre_hook(self._forget),
            self.attn.dropout.register_forward_pre_hook(self._reweigh),
        ]

    def _forget(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.bias = None

    def _reweigh(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.bias is None:
            return None
        p = args[0].float() * self.bias.to(args[0].device).exp()[:, None, None, :]
        p = p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
        self.bias = None
        return (p.to(args[0].dtype),)


def _install(weights: list[_Weights]) -> _Handles:
    return _Handles([handle for w in weights for handle in w.install()])


def _biased(
    stock: Any,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    **kwargs: Any,
) -> Any:
    """The stock attention function with a key bias (B, T) as one more argument."""
    bias = kwargs.pop(BIAS, None)
    if bias is not None:
        bias = bias[:, None, None, :].to(query)
        attention_mask = bias if attention_mask is None else attention_mask + bias
    return stock(module, query, key, value, attention_mask, **kwargs)


def _add_argument(call: Call, bias: Tensor) -> Call:
    args, kwargs = call
    return args, {**kwargs, BIAS: bias}


def _block(block: Any, bias: Any) -> BlockSites:
    attn = block.self_attn
    return BlockSites(
        module=block,
        attn=attn,
        norm2=block.layer_norm2,
        mlp=block.mlp,
        heads=attn.num_heads,
        scale=attn.scale,
        query=partial(_project, attn, QUERY),
        key=partial(_project, attn, KEY),
        bias=bias,
        key_source=attn.qkv,
        split=partial(_split, attn),
    )


def _takes_arguments(attn: Any) -> bool:
    """Whether the attention hands unknown arguments on to a kernel that adds masks."""
    kinds = [p.kind for p in inspect.signature(attn.forward).parameters.values()]
    kernel = str(attn.config._attn_implementation)
    return inspect.Parameter.VAR_KEYWORD in kinds and "flash" not in kernel and "flex" not in kernel


def _readers(model: Any) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """Each cross-attention: above it a mask that is ready for the scores is lost or taken for ones.

    Layers of BLIP lose it from 5.23 on, and a Q-Former of 5.5 takes no mask of four dimensions.
    """
    reader = next((r for name in READERS if (r := getattr(model, name, None)) is not None), None)
    if reader is None:
        return []
    blip = is_a(model, "BlipPreTrainedModel")
    end = ".crossattention.self" if blip else ".crossattention.attention"
    names = ("attention_mask", "encoder_attention_mask") if blip else ("encoder_attention_mask",)
    return [(attn, names) for name, attn in reader.named_modules() if name.endswith(end)]


def _interpolate(call: Call) -> Call:
    args, kwargs = call
    return args, {**kwargs, "interpolate_pos_encoding": True}


def locate(model: Any) -> VisionSites | None:
    """Sites of the vision tower of a BLIP model, None for any other model."""
    tower: Any = model if is_a(model, *TOWERS) else getattr(model, "vision_model", None)
    if not is_a(tower, *TOWERS):
        return None
    config: Any = tower.config
    layers = list(tower.encoder.layers)
    install: Any
    biases: list[Any]
    if hasattr(layers[0].self_attn, "dropout"):
        weights = [_Weights(layer.self_attn) for layer in layers]
        biases = [w.add for w in weights]

        install = partial(_install, weights)
    elif _takes_arguments(layers[0].self_attn):
        biases = [_add_argument] * len(layers)
        install = partial(Around, [layer.self_attn for layer in layers], IMPLEMENTATION, _biased)
    else:
        biases, install = [None] * len(layers), None
    return VisionSites(
        tower=tower,
        blocks=[_block(*pair) for pair in zip(layers, biases, strict=True)],
        prefix=1,
        has_cls=True,
        patch=config.patch_size,
        pool="cls",
        width=config.hidden_size,
        mlp_width=mlp_width(layers[0].mlp),
        resize=_interpolate,
        install=install,
        readers=_readers(model),
    )
