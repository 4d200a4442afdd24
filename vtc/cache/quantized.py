# SPDX-License-Identifier: Apache-2.0
"""KV cache layers whose older tokens are held as packed bits.

A layer is [packed slots | window]: tokens leave the window in whole groups of consecutive tokens of
a row, are quantised once, and come back only for the moment of an attention call. Every statistic
belongs to one row, one head and one group, so no row depends on its batch mates: rows are packed
from their own first token, padding is left out, and a row that has fewer groups than another has
empty slots behind them.

Cost per element, with groups of 32 and fp16 statistics: `Affine(b)` b + 1 bits, `Ternary`
2.1, `MixedKeys` 2.3 (half of the channels at 2 bits). The literature quotes b, 1.58 and 1.5 alone.
"""

from __future__ import annotations

from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..reduction import Reduction
from .codecs import Codec, Packed, Packing
from .pruned import PrunedMixin

# ---- storage -------------------------------------------------------------------------------------


class Store:
    """Coded groups (B, H, G, ...) of one codec; row r has ``counts[r]`` of them."""

    def __init__(self, codec: Codec, group: int) -> None:
        self.codec, self.group = codec, group
        self.data: Packed = {}
        self.counts: Any = None

    def append(self, x: Tensor, new: Tensor) -> None:
        """Code the first ``new[r]`` groups of row r of x (B, H, G', group, d)."""
        old: Any = torch.zeros_like(new) if self.counts is None else self.counts
        self.dim = x.shape[-1]
        self.counts = old + new
        total = int(self.counts.max())
        step = torch.arange(x.shape[2], device=x.device)
        # Slot ``total`` takes the groups that a row does not have.
        place = (old[:, None] + step).where(step < new[:, None], total)
        for name, code in self.codec.encode(x.float()).items():
            shape = (*code.shape[:2], total + 1, *code.shape[3:])
            out = code.new_zeros(shape)
            if name in self.data:
                before = self.data[name]
                out[:, :, : before.shape[2]] = before
            index = place.reshape(place.shape[0], 1, -1, *[1] * (code.dim() - 3))
            out.scatter_(2, index.expand_as(code), code)
            self.data[name] = out[:, :, :total].clone()  # not a view of one group more

    def decode(self) -> Tensor:
        """(B, H, G * group, d) in fp32; what a row does not have is arbitrary."""
        return self.codec.decode(self.data, self.group, self.dim).flatten(2, 3)

    def change(self, f: Any) -> None:
        """Apply f to every tensor, all of which have the batch in front."""
        self.data = {name: f(x) for name, x in self.data.items()}
        self.counts = f(self.counts)

    @property
    def nbytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.data.values())


class Levels:
    """Keys or values of the packed slots: one store, or two for tokens of different importance."""

    def __init__(self, low: Codec, high: Codec | None, group: int) -> None:
        self.low, self.high = Store(low, group), None if high is None else Store(high, group)

    def append(self, x: Tensor, new: Tensor, high: Tensor | None, group: int) -> None:
        """Add tokens x (B, H, n, d): the first ``new[r]`` of row r, ``high`` (B, n) among them."""
        here = torch.arange(x.shape[2], device=x.device) < new[:, None]
        if self.high is None or high is None:
            self._add(self.low, x, here, group)
        else:
            self._add(self.low, x, here & ~high, group)
            self._add(self.high, x, high, group)

    @staticmethod
    def _add(store: Store, x: Tensor, which: Tensor, group: int) -> None:
        counts = which.sum(1)
        n = int(counts.max())
        if n == 0 and store.counts is not None:
            return
        order = which.long().argsort(dim=1, descending=True, stable=True)[:, :n]
        x = x.gather(2, order[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
        store.append(x.unflatten(2, (n // group, group)), counts // group)

    def decode(self, important: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, H, Q, d) in the order of the slots.

        Args:
            important: (B, Q) bool, False on the empty slots.
        """
        low = self.low.decode()
        if self.high is None or important is None:
            return low.to(dtype)
        both = torch.cat([low, self.high.decode()], 2)
        after = low.shape[2] + important.long().cumsum(1) - 1
        index = ((~important).long().cumsum(1) - 1).where(~important, after)
        index = index.clamp(max=both.shape[2] - 1)[:, None, :, None]  # empty slots come last
        return both.gather(2, index.expand(-1, both.shape[1], -1, both.shape[3])).to(dtype)

    @property
    def stores(self) -> list[Store]:
        return [self.low] if self.high is None else [self.low, self.high]


class PackedMixin(PrunedMixin):
    """Mixed in front of a pruned layer: its first ``packed`` slots are held as bits.

    ``keys`` and ``values`` hold the other slots only.

    Attributes:
        packed: Q, slots held as bits, of the row that has most.
        counts: (B,) those of each row, a multiple of the group.
        levels: keys and values of these slots.
        important: (B, Q) bool, slots in the stores for important tokens, or None.
    """

    packed: int = 0
    counts: Any = None
    levels: tuple[Levels, Levels] | None = None
    important: Any = None

    def physical_length(self) -> int:
        return self.packed + super().physical_length()

    def packed_bytes(self) -> int:
        """Bytes of the packed slots: codes, scales and zero points, importance."""
        stores = [s for level in self.levels or () for s in level.stores]
        flags = 0 if self.important is None else self.important.numel()
        return sum(s.nbytes for s in stores) + flags

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H, P, d) of all slots."""
        if self.levels is None:
            return self.keys, self.values
        keys, values = (x.decode(self.important, self.keys.dtype) for x in self.levels)
        return torch.cat([keys, self.keys], 2), torch.cat([values, self.values], 2)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        super().update(key_states, value_states, *args, **kwargs)  # type: ignore[misc]
        return self.unpacked()

    def pack(self, ask: Packing, valid: Tensor | None) -> None:
        """Move whole groups of each row's oldest tokens from the window into the stores.

        Args:
            valid: (B, P) bool, slots that hold a token, or None when all do.
        """
        batch, width = self.keys.shape[0], self.keys.shape[2]
        if width < ask.window + ask.due:
            return
        device, old = self.keys.device, self.packed
        there = torch.ones(batch, width, dtype=torch.bool, device=device)
        if valid is not None:
            there = valid.to(device)[:, old:]
        ready = there.sum(1) - ask.window
        new = (ready // ask.group * ask.group).where(ready >= ask.due, 0).clamp(min=0)
        n = int(new.max())
        if n == 0:
            return
        if self.levels is None:
            self.levels = (
                Levels(ask.keys, ask.keys_high, ask.group),
                Levels(ask.values, ask.values_high, ask.group),
            )
            self.counts = torch.zeros_like(new)
        order = there.long().argsort(dim=1, descending=True, stable=True)  # tokens, then padding
        take = order[:, :n]
        high = self._important(ask, take, new) if ask.levels else None
        for level, name in zip(self.levels, ("keys", "values"), strict=True):
            x = getattr(self, name)
            index = take[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
            level.append(x.gather(2, index), new, high, ask.group)

        # The slots: what was packed before, what is packed now, what stays. -1 is an empty slot.
        before, counts = self.counts, self.counts + new
        packed = int(counts.max())
        place = torch.arange(packed, device=device).expand(batch, -1)
        now = old + take.gather(1, (place - before[:, None]).clamp(0, n - 1))
        slots = place.where(place < before[:, None], now).where(place < counts[:, None], -1)
        if high is not None:
            past = slots.clamp(min=0)
            flags = torch.zeros(batch, old + width, dtype=torch.bool, device=device)
            if self.important is not None:
                flags[:, :old] = self.important
            flags = flags.scatter(1, old + take, high)
            self.important = flags.gather(1, past) & (slots >= 0)
        left = there.sum(1) - new
        stay = int(left.max())
        behind = torch.arange(stay, device=device) - (stay - left)[:, None]
        index = order.gather(1, (new[:, None] + behind).clamp(0, width - 1))
        index, empty = index.where(behind >= 0, 0), behind < 0
        self.rearrange(
            torch.cat([slots.clamp(min=0), old + index], 1), torch.cat([slots < 0, empty], 1)
        )
        self.packed, self.counts = packed, counts
        index = index[:, None, :, None]
        for name in ("keys", "values"):
            x = getattr(self, name)
            setattr(self, name, x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])))

    def evict(self, reduction: Reduction) -> None:
        """
        Raises:
            UnsupportedError: always; packed groups cannot lose single tokens.
        """
        raise UnsupportedError(
            "slots cannot be evicted from a packed cache layer; chain a method that evicts once, "
            "after the prompt, in front of the one that packs"
        )

    def _important(self, ask: Packing, take: Tensor, new: Tensor) -> Tensor:
        """(B, n) bool, which of the slots to pack count as important, whole groups of each row."""
        if ask.important is None or ask.rank is None:
            return torch.zeros_like(take, dtype=torch.bool)
        here = torch.arange(take.shape[1], device=take.device) < new[:, None]
        wanted = ask.important.to(take.device)[:, self.packed :].gather(1, take) & here
        rank = ask.rank.to(take.device).float()[:, self.packed :].gather(1, take)
        count = (wanted.sum(1) + ask.group - 1) // ask.group * ask.group  # new is one, too
        order = rank.argsort(dim=1, descending=True, stable=True)
        # Wanted tokens first, then the rest by rank, then what is not there.
        kind = (wanted.long() + here.long()).gather(1, order)
        order = order.gather(1, kind.argsort(dim=1, descending=True, stable=True))
        first = torch.arange(take.shape[1], device=take.device) < count[:, None]
        return torch.zeros_like(wanted).scatter(1, order, first)

    # ---- operations of the stock layer -----------------------------------------------------------

    def _change(self, f: Any) -> None:
        for level in self.levels or ():
            for store in level.stores:
                store.change(f)
        if self.counts is not None:
            self.counts = f(self.counts)
        if self.important is not None:
            self.important = f(self.important)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self._change(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """As `PrunedMixin.crop`.

        Raises:
            UnsupportedError: the tokens reach back to packed ones.
        """
        n = abs(tokens_to_remove)
        if tokens_to_remove > 0:
            n = max(self.get_seq_length() - tokens_to_remove, 0)
        window = self.keys.shape[2]
        if self.packed and n > 0:
            empty = self.padded("filler", self.keys.device)[:, self.packed :]
            if n > window or bool(empty[:, window - n :].any()):
                raise UnsupportedError(
                    f"cannot crop {n} tokens: they reach back to tokens that are packed; crop "
                    "less, or ask for a larger window"
                )
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        super().reset()
        self.packed, self.levels, self.counts, self.important = 0, None, None, None


@cached
def _packed_class(base: Any) -> Any:
    return type("Packed" + base.__name__, (PackedMixin, base), {"__module__": __name__})


def pack_layer(cache: Any, i: int, ask: Packing, valid: Tensor | None) -> Any:
    """Pack layer i of the cache, a pruned one, converted in place at the first call; the layer."""
    layer = cache.layers[i]
    if not isinstance(layer, PackedMixin):
        if layer.keys.shape[2] < ask.window + max(ask.due, ask.group):
            return layer
        base: Any = type(layer)
        new: Any = object.__new__(_packed_class(base))
        new.__dict__.update(layer.__dict__)
        cache.layers[i] = layer = new
    layer.pack(ask, valid)
    return layer
