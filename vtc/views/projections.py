# SPDX-License-Identifier: Apache-2.0
"""Queries, keys and attention of one block, computed when asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ..kernels.attention_reduce import column_sums
from ..reduction import Reduction

if TYPE_CHECKING:
    from functools import cached_property
else:

    class cached_property:
        """functools' without its lock (Python 3.11 and older), which torch.compile cannot trace."""

        def __init__(self, compute: Callable[[Any], Any]) -> None:
            self.compute = compute
            self.__doc__ = compute.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self.name = name

        def __get__(self, view: Any, owner: type | None = None) -> Any:
            if view is None:  # pragma: no cover (asked of the class, by help())
                return self
            value = self.compute(view)
            setattr(view, self.name, value)  # found before this descriptor from now on
            return value


How = Literal["sum", "mean"]


def fold(reduction: Reduction | None, x: Tensor, how: How) -> Tensor:
    """x (B, T, ...), reduced like tokens: each survivor gets the sum or the mean of its group."""
    if reduction is None:
        return x
    total = reduction.sum(x)
    return total if how == "sum" else total / reduction.sum(torch.ones_like(x)).clamp(min=1)


Watched = tuple[dict[str, Tensor], Tensor | None]
"""Candidates of a choice, tensors (B, T, ...) by name; (B, T) bool, the tokens that count."""


@dataclass
class Projections:
    """Queries and keys of one encoder block, captured or recomputed on demand.

    Attributes:
        query: gives (B, H, T, d) for the token rows asked for (a slice of T).
        key: gives (B, H, T, d).
        scale: the factor on q k^T.
        bias: (B, T) additive bias on the keys in this block (proportional attention), or None.
        later: the reduction applied to this block's tokens after its attention, or None.
        mean: gives (B, T, d) head-averaged keys where that is cheaper than averaging ``key()``.
        lengths: tokens of each of the sequences that lie one behind the other in this one and do
            not see each other (`received` knows, `attention` does not); None where there is one.
        whole: of the nearest block that sees whole images, where this one sees windows only.
    """

    query: Callable[[slice], Tensor]
    key: Callable[[], Tensor]
    scale: float
    bias: Tensor | None = None
    later: Reduction | None = None
    mean: Callable[[], Tensor] | None = None
    lengths: list[int] | None = None
    whole: Projections | None = None

    def key_mean(self) -> Tensor:
        """(B, T, d) keys averaged over heads."""
        return self.key().mean(1) if self.mean is None else self.mean()

    def fold(self, x: Tensor, how: How) -> Tensor:
        """x (B, T, ...) of this block's tokens, reduced like the tokens have been since."""
        return fold(self.later, x, how)

    def logits(self, rows: slice) -> Tensor:
        """q k^T * scale in fp32 for the query rows, (B, H, rows, T)."""
        scores = self.query(rows).float() @ self.key().float().transpose(-1, -2) * self.scale
        bias = self.bias
        return scores if bias is None else scores + bias[:, None, None, :].to(scores)

    def attention(self, rows: slice) -> Tensor:
        """Attention probabilities in fp32 for the query rows, (B, H, rows, T)."""
        return self.logits(rows).softmax(-1)

    def received(self, weights: Tensor | None = None, chunk: int = 256) -> Tensor:
        """(B, H, T) attention in fp32 that each key receives from all query rows: A^T w.

        Args:
            weights: (B, H, T) w of the rows; ones when None.
            chunk: query rows held at once where there is a bias.
        """
        key = self.key()
        if self.bias is None:  # each sequence by itself: a batch is padded to the longest
            lengths = [key.shape[2]] if self.lengths is None else self.lengths
            queries, keys = (x.split(lengths, 2) for x in (self.query(slice(None)), key))
            ws = [None] * len(lengths) if weights is None else weights.split(lengths, 2)
            parts = zip(queries, keys, ws, strict=True)
            return torch.cat(
                [column_sums(q, k, weights=w, scale=self.scale) for q, k, w in parts], 2
            )
        total: Any = 0.0
        for start in range(0, key.shape[2], chunk):
            rows = slice(start, start + chunk)
            part = self.attention(rows)
            total = total + (part if weights is None else part * weights[:, :, rows, None]).sum(2)
        return total

    def folded_attention(self) -> Tensor:
        """(B, H, T', T') probabilities in fp32 among the T' tokens left of this block's tokens.

        A query row is the mean of its group, a key column the sum of its group.
        """
        rows = self.attention(slice(None))
        if self.later is None:
            return rows
        rows = self.fold(rows.permute(0, 3, 1, 2), "sum")  # keys first, then queries
        return self.fold(rows.transpose(1, 3), "mean").permute(0, 2, 1, 3)

    def by_heads(self, most: int = 1 << 24) -> list[Projections]:
        """The same block, a few heads at a time, for who needs maps of all of them in turn.

        Args:
            most: weights of the maps of a few heads; one head may have more.
        """
        query, key = self.query(slice(None)), self.key()
        batch, _, tokens, _ = key.shape
        chunk = min(4, max(1, most // (batch * tokens**2)))

        def part(heads: slice) -> Projections:
            q, k = query[:, heads], key[:, heads]
            return replace(self, query=lambda rows: q[:, :, rows], key=lambda: k, mean=None)

        return [part(slice(i, i + chunk)) for i in range(0, query.shape[1], chunk)]
