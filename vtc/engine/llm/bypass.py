# SPDX-License-Identifier: Apache-2.0
"""The bypass stage: tokens go around a layer of the LLM, or its attention, and come back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...method import Method
from ...reduction import gather_tokens
from ...transformers_contract import HIDDEN
from ..finite import Finite
from ..record import Choice, Recording, Records
from .forward import Bypass, Forward
from .view_factory import ViewFactory


class BypassStage(Recording):
    """Runs the methods of the bypass stage.

    Attributes:
        methods: each with its place in the chain and the layers that it lets tokens go around.
    """

    def __init__(
        self,
        methods: tuple[Method, ...],
        depth: int,
        records: Records,
        finite: Finite,
        views: ViewFactory,
    ) -> None:
        """
        Args:
            methods: the whole chain.
            depth: layers of the LLM.
        """
        self.records, self.finite, self.views = records, finite, views
        self.methods = [
            (i, m, frozenset(m.bypass_layers(depth)))
            for i, m in enumerate(methods)
            if "bypass" in m.stages
        ]

    @property
    def around_attention(self) -> bool:
        """Whether tokens go around the attention alone."""
        return any(m.bypass == "attention" for _, m, _ in self.methods)

    def enter(
        self, i: int, st: Forward, hidden: Tensor, cache: Any, kwargs: dict[str, Any]
    ) -> tuple[Forward, Tensor]:
        """The state and hidden states of the tokens that take part in layer i; usually all."""
        st.bypass = None
        for index, method, layers in self.methods:
            if i not in layers:
                continue
            view = self.views.of_method(index, i, st, hidden, cache, kwargs)
            reduction = self.finite.ask(method.on_bypass, view, method.name, "bypass", i - 1)
            if reduction is None:
                continue
            part = replace(st, scratch={}, memos={}, memo={})
            short = part.drop(hidden, view, reduction)
            here: Any = part.local
            if st.local is not None:
                rows = st.local.to(hidden.device).contiguous()
                here = torch.searchsorted(rows, part.local.contiguous())  # type: ignore[union-attr]
            part.shift = None if st.shift is None else gather_tokens(st.shift, here)
            part.lost = st.lost
            st.bypass = Bypass(hidden, here, part.filler, method.bypass)
            st.partial.add(i)
            processed = st.tokens if method.bypass == "attention" else part.tokens
            self.record.layer(i, processed, part.tokens)
            choice = Choice(i, view.image, view.position, view.valid, reduction, bypass=True)
            self.record.choices.append(choice)
            return part, short
        self.record.layer(i, st.tokens, st.tokens)
        return st, hidden

    def leave(self, st: Forward | None, output: Any) -> Any:
        """The output of a layer for all tokens, those that went around it as they came; or None."""
        if st is None or st.bypass is None or st.bypass.around == "attention":
            return None
        return _with_first(output, st.bypass.back(_first(output), st.bypass.hidden))

    def into_attention(
        self, st: Forward | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """The call of an attention module for the tokens that enter it."""
        if st is None or st.bypass is None:
            return None
        if args:
            return (gather_tokens(args[0], st.bypass.index), *args[1:]), kwargs
        kwargs = dict(kwargs)
        HIDDEN.put(kwargs, gather_tokens(HIDDEN.of(kwargs), st.bypass.index))
        return args, kwargs

    def out_of_attention(self, st: Forward | None, output: Any) -> Any:
        """Its output for all: the others get nothing, the residual carries them to the MLP."""
        if st is None or st.bypass is None:
            return None
        nothing = torch.zeros_like(st.bypass.hidden)
        return _with_first(output, st.bypass.back(_first(output), nothing))


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _with_first(output: Any, first: Tensor) -> Any:
    return (first, *output[1:]) if isinstance(output, tuple) else first


def note_sublayer(
    tap: Any,
    name: str,
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    """Keep what attention or MLP of a layer was given and gave, for methods that read it."""
    given = args[0] if args else HIDDEN.of(kwargs)
    tap.sublayers[name] = (given, _first(output))
