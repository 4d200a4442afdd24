# SPDX-License-Identifier: Apache-2.0
"""The modules of a model that hooks go to: still there, and no one else's."""

from __future__ import annotations

from torch import nn

from .adapters.base import Sites
from .errors import UnsupportedError

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
