# SPDX-License-Identifier: Apache-2.0
"""The KV cache stage: what methods note of the attention of each layer, and what they evict."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cache import pruned as kv
from ...cache.codecs import Packing
from ...cache.quantized import pack_layer
from ...hooks import attention_rows
from ...method import Method
from ...reduction import gather_tokens
from ...transformers_contract import check_tap
from ...views.cache import CacheView
from ..finite import Finite
from ..record import Eviction, Recording, Records
from .forward import Forward


class CacheStage(Recording):
    """Runs the methods of the cache stage."""

    def __init__(
        self, methods: tuple[Method, ...], depth: int, records: Records, finite: Finite
    ) -> None:
        """
        Args:
            methods: the whole chain.
            depth: layers of the LLM.
        """
        self.depth, self.records, self.finite = depth, records, finite
        self.methods = [(i, m) for i, m in enumerate(methods) if "cache" in m.stages]
        self.noting = [s for s in self.methods if type(s[1]).note_cache is not Method.note_cache]
        self.steadily = any(m.while_decoding for _, m in self.methods)

    def acts(self, st: Forward | None) -> bool:
        """Whether a method is asked in this forward, None while decoding."""
        return bool(self.methods) and (st is not None or self.steadily)

    def note(
        self,
        i: int,
        st: Forward | None,
        cache: Any,
        mask: Tensor | None,
        t: attention_rows.Tap | None,
    ) -> None:
        """Let methods note what they will need of the attention of layer i.

        Args:
            st: None while decoding.
            mask: (B, logical length) of the prompt and all since, False on padding.
            t: tells the attention of the layer; None where no method reads it.
        """
        layer: Any = kv.existing_pruned(cache, i)
        if layer is None:
            if st is None:
                return
            stock = cache.layers[i]
            batch, n = stock.keys.shape[0], stock.keys.shape[2]
            layer = kv.pruned_layer(cache, i, batch, stock.keys.device)
            layer.visual[:, n - st.visual.shape[1] :] = st.visual.to(stock.keys.device)
        if st is not None:
            layer.prefilled = st.base + st.length
            for index, method in self.methods:
                asked = [sum(method.budget(n) for n in row) for row in st.images]
                layer.budgets[index] = layer.budgets.get(index, 0) + torch.tensor(
                    asked, device=layer.keys.device
                )
        for index, method in self.noting:
            if t is not None:
                check_tap(layer, t.query)
            if st is None and not method.while_decoding:
                continue
            method.note_cache(self._view(index, i, layer, mask, t))

    def _view(
        self, index: int, i: int, layer: Any, mask: Tensor | None, t: attention_rows.Tap | None
    ) -> CacheView:
        device = layer.keys.device
        valid = None if layer.filler is None else ~layer.padded("filler", device)
        if mask is not None:
            real = mask.to(device).bool().gather(1, layer.columns(device))
            valid = real if valid is None else valid & real
        scratch = layer.scratch.setdefault(index, {})
        n = layer.physical_length()
        for name, x in scratch.items():
            scratch[name] = torch.cat([x, x.new_zeros(x.shape[0], n - x.shape[1], *x.shape[2:])], 1)
        return CacheView(
            keys=layer.keys,
            values=layer.values,
            visual=layer.padded("visual", device),
            valid=valid,
            layer=i,
            depth=self.depth,
            step=layer.get_seq_length() - layer.prefilled,
            budget=layer.budgets[index],
            tap=attention_rows.no_tap if t is None else t,
            scratch=scratch,
        )

    def run(self, st: Forward | None, cache: Any, mask: Tensor | None) -> None:
        """Once a forward is complete: let methods evict, layer by layer; arguments as in `note`."""
        layers: list[Any] = [kv.existing_pruned(cache, i) for i in range(self.depth)]
        if any(layer is None for layer in layers):
            return
        alive = None if st is None else st.reached_end()
        for index, method in self.methods:
            if st is None and not method.while_decoding:
                continue
            if st is not None:
                for layer in layers:
                    _carry_on(st, st.scratch.get(index, {}), index, layer)
            views = [self._view(index, i, layer, mask, None) for i, layer in enumerate(layers)]
            peers = [view.scratch for view in views]
            for i, (layer, view) in enumerate(zip(layers, views, strict=True)):
                view.peers = peers
                if alive is not None:
                    columns = layer.columns(view.keys.device)
                    view.reaches_end = alive.to(view.keys.device).gather(1, columns)
                if st is None:  # every slot again for each token that is decoded
                    answer = method.on_cache(view)
                else:
                    answer = self.finite.ask(method.on_cache, view, method.name, "cache", i)
                if isinstance(answer, Packing):
                    layers[i] = pack_layer(cache, i, answer, view.valid)
                elif answer is not None:
                    if st is not None and answer.scores is not None:
                        self.record.evictions.append(Eviction(i, layer.kept, answer.scores))
                    layer.evict(answer)


def _carry_on(st: Forward, notes: dict[str, Tensor], index: int, layer: Any) -> None:
    """Bring a method's notes on visual tokens (B, N, ...) to their slots in a cache layer.

    Tokens that left before the last LLM layer have lost theirs: zeros.
    """
    if not notes:
        return
    device = layer.keys.device
    columns, base = layer.columns(device), st.base
    visual = st.visual.to(device)
    place = visual.long().argsort(dim=1, descending=True, stable=True)
    for name, x in notes.items():
        ones = [1] * (x.dim() - 2)
        here = place[:, : x.shape[1]]
        real = visual.gather(1, here).reshape(*here.shape, *ones)  # short rows are padded
        there = x.to(device).masked_fill(~real, 0)
        if st.local is not None:
            here = st.local.to(device).gather(1, here)
        known = there.new_zeros(here.shape[0], st.length, *x.shape[2:])
        known.scatter_(1, here.reshape(*here.shape, *ones).expand_as(there), there)
        known = gather_tokens(known, (columns - base).clamp(min=0))
        old = layer.scratch.setdefault(index, {}).get(name)
        if old is None:
            old = known.new_zeros(known.shape[0], 0, *known.shape[2:])
        short = known.shape[1] - old.shape[1]
        old = torch.cat([old, old.new_zeros(old.shape[0], short, *old.shape[2:])], 1)
        new = (columns >= base).reshape(*columns.shape, *ones)
        layer.scratch[index][name] = known.where(new, old)
