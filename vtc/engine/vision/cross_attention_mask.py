# SPDX-License-Identifier: Apache-2.0
"""Padding of a ragged batch stays hidden from whatever reads an encoder by cross-attention.

Where images keep different numbers of tokens, the encoder's output is as long as the longest, and
models around it (BLIP, BLIP-2) make a mask of ones for all of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...hooks.per_thread import PerThread, Threaded


class Readers(Threaded):
    """Hooks between an encoder and the modules that read its tokens; a handle with ``remove()``.

    Args:
        engine: the `VisionEngine`, whose state knows the padding.
        tower: gives the tokens (B, T, C), first of its output.
        readers: `VisionSites.readers`.
    """

    tokens: PerThread[Tensor | None] = PerThread(lambda: None)
    valid: PerThread[Tensor | None] = PerThread(lambda: None)  # (B, T) of a ragged batch

    def __init__(
        self, engine: Any, tower: nn.Module, readers: list[tuple[nn.Module, tuple[str, ...]]]
    ) -> None:
        self.engine = engine
        self.handles = [tower.register_forward_hook(self._written)]
        for module, names in readers:
            hook = partial(self._read, names)
            self.handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.tokens = self.valid = None

    def _written(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        state = self.engine.state
        reduction = None if state is None else state.tokens
        self.valid = None if reduction is None else reduction.valid
        self.tokens = None if self.valid is None else output[0]

    def _read(
        self,
        names: tuple[str, ...],
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        tokens, given = self.tokens, kwargs.get("encoder_hidden_states")
        if tokens is None or self.valid is None or given is None:
            return None
        copies = len(given) // len(tokens)  # beams of an image lie side by side
        repeated = tokens.repeat_interleave(copies, 0)
        if repeated.shape != given.shape or not torch.equal(repeated.to(given), given):
            raise UnsupportedError(
                "images keep different numbers of tokens, and the text side reads image tokens "
                "of another encoder call, whose padding is not known any more: encode and read in "
                "one call, one image at a time, or use a method that treats all images alike"
            )
        valid = self.valid.repeat_interleave(copies, 0).to(given.device)
        # Ready for the scores of the queries, which alone read the image: a mask of (B, T) would be
        # expanded to the length of queries and text.
        kind = next(module.parameters()).dtype
        hide = torch.zeros(valid.shape, dtype=kind, device=valid.device)
        hide = hide.masked_fill(~valid, torch.finfo(kind).min)[:, None, None, :]
        return args, {**kwargs, **{name: _both(kwargs.get(name), hide) for name in names}}


def _both(mask: Tensor | None, hide: Tensor) -> Tensor:
    """A mask, (B, T) of ones and zeros or (B, 1, q, T) bool or additive, and another, additive."""
    if mask is None:
        return hide
    mask = mask.to(hide.device)
    if mask.dim() == 2:
        return hide.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(hide.dtype).min)
    return mask & (hide == 0) if mask.dtype == torch.bool else torch.minimum(mask.to(hide), hide)
