# SPDX-License-Identifier: Apache-2.0
"""Everything about a model that `wrap` may touch and `unwrap` must give back."""

from __future__ import annotations

from typing import Any

from torch import nn

_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Module tree, attributes, hooks and attention implementation of every submodule."""
    out = {}
    for name, module in model.named_modules():
        config = getattr(module, "config", None)
        out[name] = (
            type(module),
            sorted(module.__dict__),
            {h: list(getattr(module, h)) for h in _HOOKS},
            getattr(config, "_attn_implementation", None),
            "forward" in module.__dict__,
        )
    return out
