# SPDX-License-Identifier: Apache-2.0
"""KV cache layers that are physically short and logically full length.

Hugging Face sizes masks and positions by ``get_seq_length()``. A pruned layer reports the length
the sequence would have without pruning and remembers which logical column each physical slot holds,
so padding, beams, further turns and manual decoding loops need no special case.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..reduction import Reduction, gather_tokens
from ..transformers_contract import Cache, DynamicLayer, DynamicSlidingWindowLayer


class PrunedMixin:
    """Mixed in front of a dynamic cache layer class.

    Attributes:
        kept: (B, P) logical column of each slot that existed at the last reduction.
        visual: (B, P) bool, visual tokens among them.
        filler: (B, P) bool, slots that only make a ragged batch rectangular; None without.
        dropped: logical minus physical length.
        prefilled: logical length after the last prompt.
        shift: (B,) positions by which "compact" renumbering moved later tokens; None if "original".
        window: of a layer with sliding attention, the tokens it sees; None of others.
        trimmed: logical columns below this left with the window.
        scratch: per method, named tensors aligned with the slots.
        budgets: per method, (B,) visual slots it would keep.
    """

    kept: Any = None
    visual: Tensor
    keys: Any
    values: Any
    filler: Tensor | None = None
    dropped: int = 0
    prefilled: int = 0
    shift: Tensor | None = None
    window: int | None = None
    trimmed: int = 0
    scratch: dict[int, dict[str, Tensor]]
    budgets: dict[int, Tensor]

    def physical_length(self) -> int:
        return super().get_seq_length()  # type: ignore[misc]

    def get_seq_length(self) -> int:
        """Logical length: the tokens seen, dropped ones included."""
        n = self.physical_length()
        return n + self.dropped if n else 0

    def unpacked(self) -> tuple[Tensor, Tensor]:
        """Keys and values (B, H_kv, P, d) of all slots."""
        return self.keys, self.values

    def columns(self, device: torch.device) -> Tensor:
        """(B, P) logical column of every physical slot."""
        n, kept = self.physical_length(), self.kept.to(device)
        tail = torch.arange(kept.shape[1], n, device=device) + self.dropped
        return torch.cat([kept, tail.expand(kept.shape[0], -1)], 1)

    def padded(self, name: str, device: torch.device) -> Tensor:
        """(B, P) the named flag for every physical slot, False on slots decoded since."""
        flag, n = getattr(self, name), self.physical_length()
        flag = self.kept.new_zeros(self.kept.shape, dtype=torch.bool) if flag is None else flag
        return torch.nn.functional.pad(flag, (0, n - flag.shape[1])).to(device)

    def append(self, columns: Tensor, visual: Tensor, filler: Tensor | None, logical: int) -> None:
        """Announce tokens (B, T) that the next update brings, and the logical length after it."""
        device = columns.device
        if not self.physical_length():  # the first tokens: layers of a forward share their map
            self.kept, self.visual, self.filler = columns, visual, filler
            self.dropped = logical - columns.shape[1]
            return
        if filler is not None or self.filler is not None:
            new = torch.zeros_like(visual) if filler is None else filler
            self.filler = torch.cat([self.padded("filler", device), new], 1)
        self.visual = torch.cat([self.padded("visual", device), visual], 1)
        self.kept = torch.cat([self.columns(device), columns], 1)
        self.dropped = logical - self.kept.shape[1]

    def rearrange(self, order: Tensor, empty: Tensor | None) -> None:
        """In the map and all notes, slot s becomes what slot order[:, s] was.

        Args:
            order: (B, P') slots; empty: (B, P') bool, those that hold nothing, or None.
        """
        device, n = order.device, self.physical_length()
        logical, columns = self.get_seq_length(), self.columns(device)
        if self.filler is not None or empty is not None:
            filler = self.padded("filler", device).gather(1, order)
            self.filler = filler if empty is None else filler | empty
        self.visual = self.padded("visual", device).gather(1, order)
        self.kept = columns.gather(1, order)
        for named in self.scratch.values():
            for name, x in named.items():  # notes are older than what was decoded since
                x = torch.cat([x, x.new_zeros(x.shape[0], n - x.shape[1], *x.shape[2:])], 1)
                named[name] = gather_tokens(x, order)
        self.dropped = logical - order.shape[1]

    def evict(self, reduction: Reduction) -> None:
        """Remove the slots that do not survive, from keys, values and all notes."""
        device = self.keys.device
        keep, valid = reduction.keep.to(device), reduction.valid
        self.scratch = {method: dict(named) for method, named in self.scratch.items()}
        self.rearrange(keep, None if valid is None else ~valid.to(device))
        index = keep[:, None, :, None]
        for name in ("keys", "values"):
            x = getattr(self, name)
            setattr(self, name, x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])))

    @property
    def horizon(self) -> int:
        """The first logical column that later tokens will see."""
        packed = hasattr(self, "packed_bytes")
        full = packed or self.window is None
        return 0 if full else max(self.get_seq_length() - self.window + 1, 0)  # type: ignore[operator]

    def trim(self) -> None:
        """Remove the slots that have left the window: no later token will see them."""
        first = self.horizon
        if first <= self.trimmed:
            return
        self.trimmed = first
        columns = self.columns(self.keys.device)
        if bool((columns < first).any()):
            self.evict(Reduction.from_mask(columns >= first))

    # ---- operations of the stock layer that must move the map too ------------------------------

    def _map(self, change: Any) -> None:
        for name in ("kept", "visual", "filler", "shift"):
            value = getattr(self, name, None)
            if value is not None:
                setattr(self, name, change(value))
        self.scratch = {
            method: {name: change(x) for name, x in named.items()}
            for method, named in self.scratch.items()
        }
        self.budgets = {method: change(x) for method, x in self.budgets.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._map(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._map(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._map(lambda x: x[indices.to(x.device)])

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, as long as none was dropped among them.

        Args:
            tokens_to_remove: their number, negative; or, as in older transformers, the positive
                length to keep.

        Raises:
            UnsupportedError: the tokens reach back to where this layer was compressed, or the
                window would slide back over tokens that have left it.
        """
        n = abs(tokens_to_remove)
        if tokens_to_remove > 0:
            n = max(self.get_seq_length() - tokens_to_remove, 0)
        if self.window is not None and self.trimmed > self.get_seq_length() - n - self.window + 1:
            raise UnsupportedError(
                f"cannot crop {n} tokens: the sliding window of this layer would reach back over "
                "tokens that have left it"
            )
        mapped = self.kept.shape[1]
        inside = n - (self.physical_length() - mapped)  # slots of the map itself that go
        if inside > 0:
            end = mapped + self.dropped
            tail = torch.arange(end - inside, end, device=self.kept.device)
            if inside > mapped or not bool((self.kept[:, -inside:] == tail).all()):
                raise UnsupportedError(
                    f"cannot crop {n} tokens: this layer was compressed, and they reach back to "
                    "tokens that are gone"
                )
            for name in ("kept", "visual", "filler"):
                if getattr(self, name) is not None:
                    setattr(self, name, getattr(self, name)[:, :-inside])
        if n > 0:
            self.keys, self.values = self.keys[..., :-n, :], self.values[..., :-n, :]

    def reset(self) -> None:
        # Dropped here: older transformers zero the slots, which leaves them in the sequence.
        self.keys = self.values = None
        self.is_initialized = False
        super().reset()  # type: ignore[misc]
        self.kept = self.filler = self.shift = None
        self.dropped, self.prefilled, self.scratch, self.budgets = 0, 0, {}, {}
        self.trimmed = 0


class PrunedDynamicLayer(PrunedMixin, DynamicLayer):
    """The usual case, which torch.compile must find by name."""


@cache
def _pruned_class(base: Any) -> Any:
    return type("Pruned" + base.__name__, (PrunedMixin, base), {"__module__": __name__})


def pruned_layer(cache: Cache, i: int, batch: int, device: torch.device) -> PrunedMixin:
    """Layer i of the cache as a pruned layer, converted in place at the first call."""
    while len(cache.layers) <= i:  # DynamicCache() makes its layers on the first update
        cache.layers.append(cache.layer_class_to_replicate())
    layer = cache.layers[i]
    if isinstance(layer, PrunedMixin) and layer.kept is not None:
        return layer
    if not isinstance(layer, PrunedMixin):
        base: Any = type(layer)
        kind = PrunedDynamicLayer if base is DynamicLayer else _pruned_class(base)
        new: Any = object.__new__(kind)
        new.__dict__.update(layer.__dict__)  # `layer.__class__ = ...` raises on differing layouts
        cache.layers[i] = layer = new
    n = layer.physical_length()
    layer.kept = torch.arange(n, device=device).expand(batch, n)
    layer.visual = torch.zeros(batch, n, dtype=torch.bool, device=device)
    layer.scratch, layer.budgets = {}, {}
    return layer


def existing_pruned(cache: Cache | None, i: int) -> PrunedMixin | None:
    """Layer i if it was compressed before, else None."""
    if cache is None or i >= len(cache.layers):
        return None
    layer = cache.layers[i]
    return layer if isinstance(layer, PrunedMixin) and layer.kept is not None else None


def check_cache(cache: Any, evicts: bool) -> None:
    """Refuse, before anything is computed, a cache that cannot hold layers of different lengths.

    Raises:
        UnsupportedError: static, linear or unknown cache layers, or a window that tokens have left.
    """
    if cache is None:
        return
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise UnsupportedError(
            f"{type(cache).__name__} cannot be compressed; use the default DynamicCache"
        )
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, DynamicSlidingWindowLayer):
            if layer.keys is not None and layer.keys.shape[-2] < layer.cumulative_length:
                raise UnsupportedError(
                    f"cache layer {i} was filled without vtc beyond its sliding window of "
                    f"{layer.sliding_window} tokens, which has dropped what a compressed layer "
                    "would need; start the conversation with the wrapped model"
                )
            continue
        if not isinstance(layer, DynamicLayer):
            raise UnsupportedError(
                f"cache layer {i} is a {type(layer).__name__}, whose slots are fixed; use the "
                "default DynamicCache (drop cache_implementation=...), or vtc.compress_inputs"
            )
        name = type(layer).__name__.replace("Packed", "", 1).replace("Pruned", "", 1)
        if evicts and name != "DynamicLayer":
            raise UnsupportedError(
                f"evicting from a {type(layer).__name__} would need to dequantize it; use the "
                "default DynamicCache, or a method that drops tokens before they reach the cache"
            )


def begin(cache: Any) -> None:
    """Note on a cache that a forward begins to fill it; `finish` takes the note away.

    Raises:
        ValueError: the last one that began has failed on the way.
    """
    if getattr(cache, "vtc_unfinished", False):
        raise ValueError(
            "the last forward with this KV cache has failed on the way, and some layers may hold "
            "its tokens while others do not; start again with a new cache"
        )
    if isinstance(cache, Cache):
        cache.vtc_unfinished = True


def finish(cache: Any) -> None:
    """A forward got through all layers, and the methods have had their turn."""
    if isinstance(cache, Cache):
        cache.vtc_unfinished = False


def widen(cache: Cache) -> None:
    """Make layers that hold a sliding window hold all tokens, in place.

    A window that counts slots would count kept tokens. Hugging Face's mask counts logical columns
    whatever the layer holds, and rows and columns of it are gathered: so the layer keeps what the
    methods keep, the mask hides what has left the window, and nothing is different. What has left
    it by the end of a prompt is removed then (`PrunedMixin.trim`).
    """
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, DynamicSlidingWindowLayer):
            continue
        wide: Any = DynamicLayer()
        known = vars(layer)
        wide.__dict__.update({k: known[k] for k in vars(wide) if k in known})
        for name in ("dtype", "device"):
            if name in known:
                setattr(wide, name, known[name])
        wide.window = layer.sliding_window
        cache.layers[i] = wide


def overflows(cache: Cache, i: int, logical: int) -> bool:
    """Whether tokens leave the window of layer i, if it has one, when it has seen ``logical``."""
    window = getattr(cache.layers[i], "window", None) if i < len(cache.layers) else None
    return window is not None and logical >= window


def cache_bytes(cache: Cache | None) -> tuple[int, int]:
    """Bytes of all keys and values held, and the bytes the same tokens take without compression."""
    held = full = 0
    for layer in getattr(cache, "layers", []):
        tensors = [t for t in vars(layer).values() if isinstance(t, Tensor) and t.dim() == 4]
        size = sum(t.numel() * t.element_size() for t in tensors)
        held += size
        if hasattr(layer, "packed_bytes"):  # what is not packed tells the size of a slot
            held += layer.packed_bytes()
            slot = sum(t.shape[0] * t.shape[1] * t.shape[3] * t.element_size() for t in tensors)
            full += slot * layer.get_seq_length()
            continue
        n = layer.physical_length() if isinstance(layer, PrunedMixin) else layer.get_seq_length()
        logical = layer.get_seq_length()
        window = getattr(layer, "window", None)  # the stock layer holds one less
        logical = logical if window is None else min(logical, window - 1)
        full += size * logical // max(int(n), 1)
    return held, full


class Slots(NamedTuple):
    """The slots of a compressed layer, (B, P): their logical columns, whether visual, whether they
    only fill a short row; and the first column that the sliding window leaves."""

    columns: Tensor
    visual: Tensor
    filler: Tensor | None
    first: int

    @property
    def held(self) -> Tensor:
        """(B, P) bool, the visual tokens that stay."""
        held = self.visual if self.filler is None else self.visual & ~self.filler
        return held & (self.columns >= self.first) if self.first else held


def slots_of(cache: Cache | None) -> list[Slots | None]:
    """The slots of each layer before `PrunedMixin.trim`; None where it was not compressed."""
    return [
        Slots(layer.kept, layer.visual, layer.filler, layer.horizon)
        if isinstance(layer, PrunedMixin) and layer.kept is not None
        else None
        for layer in getattr(cache, "layers", [])
    ]
