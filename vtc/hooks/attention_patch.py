# SPDX-License-Identifier: Apache-2.0
"""Another attention implementation for the attention modules of one model.

Hugging Face names the implementation in the configuration, which models may share and users may
change. So the configuration is left alone: attention modules get a stand-in of it, which gives
another name, that of a function around the stock one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..transformers_contract import ATTENTION_FUNCTIONS, AttentionInterface


class _Config:
    """Stand-in for the config ``stock``: the same, but for the implementation."""

    def __init__(self, stock: Any, prefix: str, around: Callable[..., Any]) -> None:
        self.stock, self.prefix, self.around = stock, prefix, around

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "stock" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.stock, name)

    @property
    def _attn_implementation(self) -> str:
        return _registered(self.prefix, self.stock._attn_implementation, self.around)


_known: set[str] = set()


def _registered(prefix: str, stock: str, around: Callable[..., Any]) -> str:
    name = prefix + stock
    if name not in _known:

        def attention(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            if stock == "eager":  # has no entry: every model file brings its own
                inner = sys.modules[type(module).__module__].eager_attention_forward
            else:
                inner = ATTENTION_FUNCTIONS[stock]
            return around(inner, module, *args, **kwargs)

        AttentionInterface.register(name, attention)
        _known.add(name)
    return name


class Around:
    """Calls ``around(stock function, module, query, key, value, mask, ...)`` in these modules.

    Args:
        modules: attention modules, with a ``config``.
        prefix: of the implementation's name; one for each ``around``.
    """

    def __init__(self, modules: Sequence[Any], prefix: str, around: Callable[..., Any]) -> None:
        self.modules = modules
        for module in modules:
            module.config = _Config(module.config, prefix, around)
            _ = module.config._attn_implementation  # registered now, not in a compiled graph

    def remove(self) -> None:
        """Give the modules their configuration back."""
        for module in self.modules:
            module.config = module.config.stock
