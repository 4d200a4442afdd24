# SPDX-License-Identifier: Apache-2.0
"""The parts of a wrapped model: looked for before every forward."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..adapters.base import Sites
from ..errors import UnsupportedError

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


class OfModel:
    """Base of what is copied with the whole model only: hooks on a part would work on a copy of
    everything."""

    model: nn.Module

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self.model) not in memo:
            raise UnsupportedError(
                "a part of a wrapped model was copied, and its hooks cannot be (PEFT's "
                "modules_to_save does this): change the model first and wrap the result, "
                "vtc.wrap(get_peft_model(model, ...), method)"
            )
        new = memo[id(self)] = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class Parts(OfModel):
    """Refuses to run a model of which a part with hooks has been replaced.

    Args:
        model: what was wrapped; sites: where things are in it.
    """

    def __init__(self, model: nn.Module, sites: Sites) -> None:
        self.model, self.sites = model, sites
        self.edges = edges(model, sites)
        self.handles: list[Any] = []

    def install(self) -> None:
        """Register the hook, in front of all others."""
        vision = self.sites.vision
        entry = vision.tower if vision.entry is None else vision.entry
        first = entry if self.sites.decoder is None else self.sites.decoder.base
        self.handles.append(first.register_forward_pre_hook(self._check))

    def remove(self) -> None:
        """Remove it."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _check(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            check_parts(self.model, self.edges)
