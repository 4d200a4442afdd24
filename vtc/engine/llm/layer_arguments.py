# SPDX-License-Identifier: Apache-2.0
"""Arguments of decoder layers, gathered for the tokens that are left."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import UnsupportedError
from ...hooks import attention_rows
from ...hooks.per_thread import PerThread, Threaded
from ...transformers_contract import MASK, POSITIONS, TABLES, TABLES_AND_MASKS, moved
from .forward import Forward, arange


class Arguments(Threaded):
    """Masks, positions and rotary tables of a language model, which it computes at full size."""

    # What the mask of this forward was last made from, and it.
    last_mask: PerThread[tuple[tuple[Any, ...], Tensor | None] | None] = PerThread(lambda: None)

    def __init__(self, decoder: nn.Module, renumbers: bool) -> None:
        """
        Args:
            renumbers: whether a method asks for "compact" positions.
        """
        self.decoder: Any = decoder
        self.renumbers = renumbers

    def gathered(
        self,
        i: int,
        st: Forward | None,
        hidden: Tensor,
        layer: Any,
        kwargs: dict[str, Any],
        commit: bool = True,
    ) -> dict[str, Any]:
        """Of layer i, for the tokens that are left.

        Args:
            st: None while decoding; hidden: (B, T, D), the input of the layer.
            layer: of the KV cache, None where nothing has been dropped from it.
            kwargs: those at full size.
            commit: remember on the cache layer what this forward lost.
        """
        kwargs = dict(kwargs)
        if st is not None and st.local is not None:
            _take_rows(st, st.local.to(hidden.device), kwargs)
        shift = self._shift(st, layer, hidden.device, commit)
        if shift is not None:
            positions = POSITIONS.of(kwargs)
            if positions is None:
                title = f"a layer of {type(self.decoder).__name__}"
                raise moved(title, POSITIONS.absent("argument"), TABLES_AND_MASKS)
            positions = positions - shift
            POSITIONS.put(kwargs, positions)
            rotary, kind = self.decoder.rotary_emb, {}
            if "layer_type" in inspect.signature(rotary.forward).parameters:  # Gemma 3
                kind = {"layer_type": self.decoder.config.layer_types[i]}
            TABLES.put(kwargs, rotary(hidden, positions, **kind))
        flash = "flash" in self.decoder.config._attn_implementation
        if flash:  # gaps would be read as packed sequences
            POSITIONS.put(kwargs, None)
        mask = MASK.of(kwargs)
        gathered = partial(_mask, mask, st, hidden, layer, flash)
        if st is None:
            MASK.put(kwargs, self._as_before(mask, layer, hidden, gathered))
        elif layer is None or not layer.physical_length():
            MASK.put(kwargs, st.once("mask", mask, hidden.device, gathered))
        else:
            MASK.put(kwargs, gathered())
        return kwargs

    def _as_before(self, mask: Any, layer: Any, hidden: Tensor, compute: Any) -> Tensor | None:
        """While decoding: the mask of the last layer, where this one holds the same tokens."""
        if torch.compiler.is_compiling():
            return compute()
        lengths = layer.physical_length(), layer.dropped, hidden.shape[1], hidden.device
        source = (mask, layer.kept, layer.filler, *lengths)
        known = self.last_mask
        if known is None or not all(
            a is b or (not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b)
            for a, b in zip(known[0], source, strict=True)
        ):
            self.last_mask = known = source, compute()
        return known[1]

    def _shift(
        self, st: Forward | None, layer: Any, device: torch.device, commit: bool
    ) -> Tensor | None:
        """(B, T) positions to subtract under "compact", or None.

        Args:
            commit: remember on the cache layer what this forward lost.
        """
        if not self.renumbers:
            return None
        past = None if layer is None else layer.shift
        now = None if st is None else st.shift
        if commit and layer is not None and st is not None and now is not None:
            total = st.lost.to(device)  # type: ignore[union-attr]
            layer.shift = total if past is None else total + past.to(device)
        if now is None and past is None:
            return None
        shift = torch.zeros((), dtype=torch.long, device=device)
        if past is not None:
            shift = shift + past.to(device)[:, None]
        return shift if now is None else shift + now.to(device)


def _take_rows(st: Forward, local: Tensor, kwargs: dict[str, Any]) -> None:
    """Rotary tables and positions of the tokens at local (B, T)."""
    tables, positions = TABLES.of(kwargs), POSITIONS.of(kwargs)
    taken = st.once(
        "tables",
        tables,
        local.device,
        lambda: tuple(attention_rows.take_rows(t, local) for t in tables),
    )
    TABLES.put(kwargs, taken)
    if positions is not None:
        taken = st.once(
            "positions", positions, local.device, lambda: _take_positions(positions, local)
        )
        POSITIONS.put(kwargs, taken)


def _mask(mask: Any, st: Forward | None, hidden: Tensor, layer: Any, flash: bool) -> Tensor | None:
    """The mask for the tokens of hidden (B, T, D) and all keys they attend to."""
    device, local, filler = hidden.device, None, None
    base = int(layer.get_seq_length()) if st is None else st.base
    if st is not None:
        local = None if st.local is None else st.local.to(device)
        filler = None if st.filler is None else st.filler.to(device)
    rows = arange(hidden) if local is None else local
    # Logical columns of all keys: the slots of the cache layer, then the new tokens.
    columns = base + rows if st is None else st.columns(hidden)
    if layer is not None and layer.physical_length():
        if filler is not None or layer.filler is not None:
            new = torch.zeros_like(rows, dtype=torch.bool) if filler is None else filler
            filler = torch.cat([layer.padded("filler", device), new], 1)
        columns = torch.cat([layer.columns(device), columns], 1)
    return _gather_mask(mask, rows, local is not None, base, columns, filler, flash)


def _take_positions(positions: Tensor, local: Tensor) -> Tensor:
    """Positions (..., B or 1, L) of the tokens at local (B, T): (..., B, T)."""
    positions = positions.expand(*positions.shape[:-2], local.shape[0], -1)
    index = local.expand(*positions.shape[:-1], -1) if positions.dim() > 2 else local
    return positions.to(local.device).gather(-1, index)


def _gather_mask(
    mask: Any,
    rows: Tensor,
    shorter: bool,
    base: int,
    columns: Tensor,
    filler: Tensor | None,
    flash: bool,
) -> Tensor | None:
    """The mask Hugging Face built at logical size, for the rows and columns that are left.

    Args:
        mask: None, (B, kv) for flash attention, or (B, 1, q, kv), bool or additive.
        rows: (B, q) logical index in this forward of the query rows.
        shorter: whether rows of the mask must be gathered too.
        base: logical tokens before this forward.
        columns: (B, kv) logical column of each key.
        filler: (B, kv) keys that must not be seen, or None.
    """
    if mask is not None and not isinstance(mask, Tensor):
        raise UnsupportedError(
            f"masks of type {type(mask).__name__} cannot be compressed; use sdpa"
        )
    if mask is None:
        if filler is None:
            return None  # causal by order, or one query row that sees every key
        if flash:
            return ~filler
        seen = columns[:, None, :] <= (base + rows)[:, :, None]
        return (seen & ~filler[:, None, :])[:, None]
    mask = mask.to(columns.device)
    if mask.dim() == 2:
        mask = mask.gather(1, columns)
        return mask if filler is None else mask & ~filler
    mask = mask.expand(columns.shape[0], -1, -1, -1)
    if shorter:
        mask = mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, columns[:, None, None, :].expand(*mask.shape[:3], -1))
    if filler is None:
        return mask
    hide = filler[:, None, None, :]
    if mask.dtype == torch.bool:
        return mask & ~hide
    return mask.masked_fill(hide, torch.finfo(mask.dtype).min)
