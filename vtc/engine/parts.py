# SPDX-License-Identifier: Apache-2.0
"""The parts of a wrapped model: looked for before every forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..adapters.base import Sites
from .refusals import check_parts, edges


class Parts:
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
