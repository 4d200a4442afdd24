# SPDX-License-Identifier: Apache-2.0
"""Observers of the LLM engine: the masked oracle is one."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .forward import Forward


class Observer:
    """Is told what the engine has done; does nothing by itself. `DecoderEngine.observers` has them.

    What it is shown belongs to the engine and must not be changed.
    """

    def entering(
        self, i: int, st: Forward, given: Tensor, local: Tensor | None, hidden: Tensor
    ) -> None:
        """Tokens are about to enter layer i.

        Args:
            st: the forward, behind all that methods asked for in front of this layer.
            given: (B, T', D) the tokens before that, and `local` (B, T') which they were.
            hidden: (B, T, D) those that are left.
        """

    def taking_part(self, i: int, st: Forward, hidden: Tensor) -> None:
        """Of those tokens, hidden (B, T, D), some go around layer i: ``st.bypass``, or None."""

    def evicted(self, cache: Any) -> None:
        """The methods of the cache stage have had their turn on a KV cache."""
