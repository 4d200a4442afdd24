# SPDX-License-Identifier: Apache-2.0
"""Gather several aligned tensors by one keep list, padded or flat; differentiable."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..dispatch import implementation, unseen


def _run(
    tensors: Sequence[Tensor],
    keep: Tensor,
    destination: Tensor | None,
    rows: int,
    flat: bool,
) -> list[Tensor]:
    # Nothing to copy from without tokens: all slots are padding.
    if keep.numel() == 0 or any(x.shape[1] == 0 for x in tensors):
        return [x.new_zeros(rows, *x.shape[2:]) for x in tensors]
    return implementation("compact_tokens", keep).compact(tensors, keep, destination, rows, flat)


_compact = torch.library.custom_op("vtc::compact_tokens", _run, mutates_args=())


@_compact.register_fake
def _(tensors: list[Tensor], keep: Tensor, destination: Any, rows: int, flat: bool) -> list[Tensor]:
    return [x.new_empty(rows, *x.shape[2:]) for x in tensors]


def _save(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, keep, destination, _, _ = inputs
    ctx.save_for_backward(keep, destination)
    ctx.shapes = [x.shape for x in tensors]


def _backward(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    keep, destination = ctx.saved_tensors
    place = torch.arange(keep.numel(), device=keep.device).view(keep.shape)
    if destination is not None:
        place = destination
    rows = torch.arange(keep.shape[0], device=keep.device)[:, None]
    out: list[Tensor | None] = []
    for grad, shape in zip(grads, ctx.shapes):
        if grad is None or shape[1] == 0:
            out.append(None)
            continue
        # Survivors are distinct; padding slots go to an extra column.
        source = torch.where(place >= 0, keep, shape[1])
        values = (
            grad[place.clamp(min=0)] if grad.shape[0] else grad.new_zeros(*keep.shape, *shape[2:])
        )
        full = grad.new_zeros(shape[0], shape[1] + 1, *shape[2:])
        out.append(full.index_put((rows, source), values)[:, : shape[1]])
    return out, None, None, None, None


_compact.register_autograd(_backward, setup_context=_save)


def _destination(valid: Tensor) -> Tensor:
    """Place of every valid slot of valid (B, K) in the flat sequence; -1 on padding."""
    places = valid.flatten().cumsum(0).view(valid.shape) - 1
    return places.masked_fill(~valid, -1)


def compact(tensors: Sequence[Tensor], keep: Tensor, valid: Tensor | None = None) -> list[Tensor]:
    """Survivors of every tensor (B, N, ...) at keep (B, K): tensors (B, K, ...).

    Args:
        tensors: any dtypes, B and N in common.
        keep: (B, K) int64, each survivor once.
        valid: (B, K) bool, False on padding slots, which are filled with zeros.
    """
    places = None
    if valid is not None:
        own = torch.arange(keep.numel(), device=keep.device).view(keep.shape)
        places = own.masked_fill(~valid, -1)
    run = _run if unseen(*tensors) else _compact
    out = run(list(tensors), keep, places, keep.numel(), False)
    return [x.view(*keep.shape, *x.shape[1:]) for x in out]


def compact_flat(
    tensors: Sequence[Tensor],
    keep: Tensor,
    valid: Tensor | None = None,
    total: int | None = None,
) -> tuple[list[Tensor], Tensor]:
    """Survivors of every tensor (B, N, ...), one row after the other, and the row boundaries.

    Args:
        tensors, keep, valid: see `compact`.
        total: the number of valid slots; counted, which waits for the device, when None.

    Returns:
        Tensors (total, ...) and cu_lengths (B + 1,) int32: row b lies at cu_lengths[b : b + 2].
    """
    batch, k = keep.shape
    if valid is None:
        lengths = torch.full((batch,), k, dtype=torch.int32, device=keep.device)
        places, total = None, keep.numel()
    else:
        lengths = valid.sum(1, dtype=torch.int32)
        places = _destination(valid)
        total = int(lengths.sum()) if total is None else total
    boundaries = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    run = _run if unseen(*tensors) else _compact
    return run(list(tensors), keep, places, total, True), boundaries
