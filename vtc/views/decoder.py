# SPDX-License-Identifier: Apache-2.0
"""The view between LLM layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..errors import UnsupportedError
from ..reduction import gather_tokens
from .projections import Watched, cached_property

if TYPE_CHECKING:
    from ..budgets import HasBudget


@dataclass
class DecoderView:
    """Between two LLM layers at prefill; N counts visual tokens, padded to the longest row.

    Attributes:
        hidden: (B, T, D) hidden states of the current sequence, the input of layer ``layer + 1``.
        layer: 0-based index of the layer that has just run, -1 before the first; depth: all layers.
        visual: (B, T) bool, visual tokens; text: (B, T) bool, other tokens that are not padding.
        separator: (B, T) bool, newlines between rows of patches, which are neither; None without.
        visual_index: (B, N) columns of the visual tokens; valid: (B, N) bool, None if rectangular.
        image: (B, N) ordinal of the image in its row; position: (B, N) patch index in that image.
        images: number of images of each row, a list of per-image visual token counts.
        scratch: this method's named tensors (B, N, ...), gathered with the survivors.
        ran: (B, T) place of each token in the sequence that the layer has run on, where an earlier
            method of the chain has dropped some since; None if all are there.
        memo: this method's named tensors of this forward without a visual token axis (B, ...),
            never gathered; text tokens never leave, so notes in the order of `text_index` hold.
        unnoted: whether the scratch is zero for an image that was encoded elsewhere.
    """

    hidden: Tensor
    layer: int
    depth: int
    visual: Tensor
    text: Tensor
    visual_index: Tensor
    valid: Tensor | None
    image: Tensor
    position: Tensor
    images: list[list[int]]
    tap: Any
    ahead: Callable[[], Any]
    ran: Tensor | None = None
    scratch: dict[str, Tensor] = field(default_factory=dict)
    memo: dict[str, Tensor] = field(default_factory=dict)
    separator: Tensor | None = None
    unnoted: bool = False

    @property
    def watched(self) -> Watched:
        """The text too, which tokens are ranked by."""
        return {"hidden states": self.hidden}, self.visual | self.text

    @property
    def count(self) -> int:
        """N, visual tokens now (of the longest row)."""
        return self.visual_index.shape[1]

    def per_row(self, tokens: Callable[[int], int]) -> int | Tensor:
        """Visual tokens of each row, summed over its images: one int if rows agree, else (B,).

        Args:
            tokens: of an image with n visual tokens in the prompt, how many.
        """
        counts = [sum(tokens(n) for n in row) for row in self.images]
        if len(set(counts)) == 1 and self.valid is None:
            return min(counts[0], self.count)
        return torch.tensor(counts, device=self.hidden.device)

    def budget(self, method: HasBudget) -> int | Tensor:
        """Visual tokens each row keeps: one int when all rows agree, else (B,) int64."""
        return self.per_row(method.budget)

    def within(self, tokens: Callable[[int], int]) -> bool:
        """True when no row has more visual tokens than `per_row` would give it."""
        now = [self.count] * len(self.images) if self.valid is None else self.valid.sum(1).tolist()
        return all(
            n <= sum(tokens(i) for i in row) for n, row in zip(now, self.images, strict=True)
        )

    def within_budget(self, method: HasBudget) -> bool:
        """True when no row has more visual tokens than the method would keep."""
        return self.within(method.budget)

    def noted(self, name: str) -> Tensor:
        """Notes that this method took while images were encoded, (B, N, ...).

        Raises:
            UnsupportedError: nothing on some of them, which were encoded without it.
        """
        if name not in self.scratch or self.unnoted:
            raise UnsupportedError(
                "image features that were not made by the wrapped model reached the language "
                "model, and the method needs notes it takes while encoding; encode and prefill in "
                "one call"
            )
        return self.scratch[name]

    @cached_property
    def tokens(self) -> Tensor:
        """(B, N, D) hidden states of the visual tokens."""
        return gather_tokens(self.hidden, self.visual_index)

    @cached_property
    def last_row(self) -> Tensor:
        """(B,) column of the last token of each row that is not padding."""
        columns = torch.arange(self.text.shape[1], device=self.text.device)
        real = self.text | self.visual
        real = real if self.separator is None else real | self.separator
        return (columns * real).amax(1)

    @cached_property
    def prompt(self) -> Tensor:
        """(B, T) bool, text behind the last image; the last token where there is none."""
        columns = torch.arange(self.text.shape[1], device=self.text.device).expand_as(self.text)
        last_visual = columns.where(self.visual, -1).amax(1, keepdim=True)
        rows = self.text & (columns > last_visual)
        return rows.where(rows.any(1, keepdim=True), columns == self.last_row[:, None])

    @cached_property
    def text_index(self) -> tuple[Tensor, Tensor]:
        """Columns of the text tokens (B, M), and (B, M) bool: False where a row has fewer."""
        return _columns_of(self.text)

    @cached_property
    def key(self) -> Tensor:
        """(B, H_kv, T, d) keys of the current sequence in the layer just run, RoPE included."""
        key = self.tap.key[:, :, -self.tap.length :].transpose(1, 2)
        return self._left(key).transpose(1, 2)

    @property
    def key_partners(self) -> Tensor | None:
        """(d,) the channel of a head that RoPE turns each channel of `key` with; None: d / 2 on."""
        return self.tap.partners

    def _left(self, x: Tensor) -> Tensor:
        """Of x (B, T, ...) of the layer that has run, the tokens that are left now."""
        return x if self.ran is None else gather_tokens(x, self.ran)

    def attention(
        self, rows: Literal["last", "prompt"] | Tensor = "last", ahead: bool = False
    ) -> Tensor:
        """Attention of chosen query rows to the visual tokens.

        Softmax in fp32 over all keys the row may see, then the visual columns.

        Args:
            rows: the last token of each row, all text behind the last image, or columns (B, R).
            ahead: False, in the layer that has just run; True, in the next one, from its own norm,
                projections and RoPE at the positions now in use.

        Returns:
            (B, H, R, N); R is 1 for "last", the longest prompt for "prompt" (short rows and
            padded columns hold zeros).
        """
        alive = None
        if isinstance(rows, Tensor):
            index = rows
        elif rows == "last":
            index = self.last_row[:, None]
        else:
            index, alive = _columns_of(self.prompt)
        visual, source = self.visual_index, self.ahead() if ahead else self.tap
        if self.ran is not None and not ahead:
            index, visual = self.ran.gather(1, index), self.ran.gather(1, visual)
        weights = source.attention(index)
        columns = (visual + weights.shape[-1] - source.length)[:, None, None, :]
        out = weights.gather(3, columns.expand(*weights.shape[:3], -1))
        if alive is not None:
            out = out.masked_fill(~alive[:, None, :, None], 0)  # rows of padding are NaN
        return out if self.valid is None else out * self.valid[:, None, None, :]

    @property
    def attention_input(self) -> Tensor:
        """(B, T, D) normed input of the attention of the layer just run (needs "sublayers")."""
        return self._left(self.tap.sublayers["attention"][0])

    @property
    def attention_output(self) -> Tensor:
        """(B, T, D) output of the attention of the layer just run, before the residual add."""
        return self._left(self.tap.sublayers["attention"][1])

    @property
    def mlp_input(self) -> Tensor:
        """(B, T, D) normed input of the MLP of the layer just run (needs "sublayers")."""
        return self._left(self.tap.sublayers["mlp"][0])

    @property
    def mlp_output(self) -> Tensor:
        """(B, T, D) output of the MLP of the layer just run, before the residual add."""
        return self._left(self.tap.sublayers["mlp"][1])


def _columns_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of the True entries of (B, T), ascending, (B, M); and (B, M) bool, which are real."""
    counts = mask.sum(1)
    m = int(counts.max())
    index = mask.long().argsort(dim=1, descending=True, stable=True)[:, :m]
    return index, torch.arange(m, device=mask.device) < counts[:, None]
