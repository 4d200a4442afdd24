# SPDX-License-Identifier: Apache-2.0
"""Views of the tokens between two layers of the LLM, as methods get them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...cache import pruned as kv
from ...hooks import attention_rows
from ...transformers_contract import MASK, TABLES, check_tap
from ...views.decoder import DecoderView
from .forward import Forward
from .layer_arguments import Arguments


class ViewFactory:
    """Makes the views of one language model.

    Attributes:
        taps: of each layer's attention, empty where no method reads any.
    """

    def __init__(self, layers: list[Any], arguments: Arguments) -> None:
        self.layers, self.arguments = layers, arguments
        self.taps: list[attention_rows.Tap] = []

    def plain(self, st: Forward, hidden: Tensor) -> DecoderView:
        """A view in front of layer 0, for the engine itself."""
        return self._view(-1, st, hidden, {}, {})

    def of_method(
        self, index: int, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> DecoderView:
        """The view of method ``index`` in front of layer i."""
        view = self._view(
            i - 1,
            st,
            hidden,
            st.scratch.setdefault(index, {}),
            st.memos.setdefault(index, {}),
            lambda: self._ahead(i, st, hidden, cache, kwargs),
        )
        if st.local is not st.ran:
            left: Any = st.local
            view.ran = left if st.ran is None else torch.searchsorted(st.ran.contiguous(), left)
            view.ran = view.ran.to(hidden.device)
        return view

    def _ahead(
        self, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> attention_rows.Ahead:
        """Attention of layer i, which has not run yet, on the tokens that are left now."""
        layer, stored, past = self.layers[i], kv.existing_pruned(cache, i), None
        if stored is not None or st.local is not None:
            kwargs = self.arguments.gathered(i, st, hidden, stored, kwargs, commit=False)
        if cache is not None and i < len(cache.layers) and cache.layers[i].get_seq_length():
            past = cache.layers[i].keys if stored is None else stored.unpacked()[0]
        tables, mask = TABLES.of(kwargs), MASK.of(kwargs)
        return attention_rows.Ahead(
            layer.self_attn, layer.input_layernorm(hidden), tables, mask, past
        )

    def _view(
        self,
        layer: int,
        st: Forward,
        hidden: Tensor,
        scratch: dict[str, Tensor],
        memo: dict[str, Tensor],
        ahead: Any = None,
    ) -> DecoderView:
        visual = st.visual.to(hidden.device)
        separator = None if st.separator is None else st.separator.to(hidden.device)
        other = visual if separator is None else visual | separator
        index, valid = st.visual_places(hidden.device)
        readable = bool(self.taps) and layer >= 0 and layer not in st.partial
        if readable:
            check_tap(self.layers[layer].self_attn, self.taps[layer].query)
        return DecoderView(
            hidden=hidden,
            layer=layer,
            depth=len(self.layers),
            visual=visual,
            text=st.real.to(hidden.device) & ~other,
            separator=separator,
            visual_index=index,
            valid=valid,
            image=st.image.to(hidden.device).gather(1, index),
            position=st.position.to(hidden.device).gather(1, index),
            images=st.images,
            tap=self.taps[layer] if readable else attention_rows.no_tap,
            ahead=ahead,
            memo=memo,
            scratch=scratch,
            unnoted=st.unnoted,
        )
