# SPDX-License-Identifier: Apache-2.0
"""Errors that vtc raises on purpose."""

from __future__ import annotations

from typing import Any


class UnsupportedError(ValueError):
    """A method, model and way of calling that do not go together.

    The message names what is missing and the nearest thing that works.
    """


class NotFiniteError(ValueError):
    """Values a method chose tokens by are no numbers, or so large that fp32 cannot hold their norm.

    Raised before any answer comes back; the model stays wrapped, and the next call is as usual. Not
    found under `torch.compile` and in captured CUDA graphs, where nothing can be read back: there
    features that are not a number count as dropped, which an assertion notices.

    Attributes:
        method: its name; empty where the features of an image were broken when no method had
            chosen yet.
        stage: "vision", "features", "decoder", "bypass" or "cache".
        layer: 0-based encoder block or LLM layer, -1 in front of the first; None in "features".
        rows: the images of the forward ("vision", "features") or the prompts of the batch.
    """

    def __init__(
        self, message: str, method: str, stage: str, layer: int | None, rows: tuple[int, ...]
    ) -> None:
        super().__init__(message)
        self.method, self.stage, self.layer, self.rows = method, stage, layer, rows

    def __reduce__(self) -> tuple[Any, ...]:
        """Exceptions pickle their message alone."""
        return type(self), (self.args[0], self.method, self.stage, self.layer, self.rows)
