# SPDX-License-Identifier: Apache-2.0
"""The boundary of the encoder: where its run begins and ends, for the record and the handoff."""

from __future__ import annotations

from typing import Any

from torch import nn

from ...adapters.base import Sites
from ...errors import UnsupportedError
from ...transformers_contract import PIXELS
from ..handoff import Handoff
from ..parts import OfModel
from ..record import Recording, Records
from .engine import VisionEngine


class EncoderBoundary(Recording, OfModel):
    """Hooks around those of the vision engine: the clock, the grid, and what is handed over.

    Args:
        model: what was wrapped; sites: where things are in it.
        vision: the engine of the encoder side, None where no method acts there.
        hands_over: whether what the projector makes is what goes to the LLM.
        handoff: takes it.
        records: what the report reads.
    """

    def __init__(
        self,
        model: nn.Module,
        sites: Sites,
        vision: VisionEngine | None,
        hands_over: bool,
        handoff: Handoff,
        records: Records,
    ) -> None:
        self.model = model
        self.sites, self.vision, self.hands_over = sites, vision, hands_over
        self.handoff, self.records = handoff, records
        self.handles: list[Any] = []

    def install(self) -> None:
        """Register the hooks, those of the vision engine between them."""
        sites, tower = self.sites, self.sites.vision.tower
        entry = tower if sites.vision.entry is None else sites.vision.entry
        self.handles.append(entry.register_forward_pre_hook(self._begin, with_kwargs=True))
        self.handles.append(tower.register_forward_hook(self._failed, always_call=True))
        if self.vision is not None:
            self.vision.install()
        if sites.decoder is None:  # all that timm's forward_features runs of the tower
            last = sites.vision.blocks[-1].module
            self.handles.append(last.register_forward_hook(self._through_blocks))
        end = tower if sites.decoder is None else sites.decoder.projector
        self.handles.append(end.register_forward_hook(self._end))
        self.handles.append(end.register_forward_hook(self._failed, always_call=True))

    def remove(self) -> None:
        """Remove all of them."""
        if self.vision is not None:
            self.vision.remove()
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedError(
                "torch.nn.DataParallel runs copies of the model, and compression would read the "
                "weights of the original; use one process for each device "
                '(DistributedDataParallel), or spread the layers (device_map="auto")'
            )
        pixels: Any = args[0] if args else PIXELS.of(kwargs)
        pixels = kwargs.get("x") if pixels is None else pixels
        sites, patch = self.sites, self.sites.vision.patch
        if sites.decoder is None or sites.decoder.grids is None:
            known = patch and pixels is not None and pixels.dim() > 3
            edges = pixels.shape[-2:] if known else (0, 0)  # of encoders that no adapter knows
            self.record.grid = (edges[0] // max(patch, 1), edges[1] // max(patch, 1))
        self.records.last = self.record
        self.record.encoded = False
        self.record.clock.reset("vision", "method")
        self.record.clock.start("vision")

    def _failed(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Let go of the tensors of an encoder that did not get through."""
        if output is None and self.vision is not None:
            self.vision.state = None

    def _through_blocks(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record.encoded = True

    def _end(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.record.clock.stop("vision")
        self.record.encoded = True
        if not self.hands_over:  # an encoder alone, or the features stage is still to come
            return
        state = None if self.vision is None else self.vision.state
        if not state:
            self.handoff.encoded, self.handoff.left = len(output), None
            return
        left = None if state.reduction is None else state.reduction.count
        self.handoff.images(output, left, state.scratch)
