# SPDX-License-Identifier: Apache-2.0
"""Reductions over the columns of a similarity matrix X Y^T that is never stored.

* `energy`: mean over columns of ELU(s - margin), or of Eq. 4 of PiToMe (arXiv 2405.16148).
* `best_match`: maximum and its column, as ToMe's matching needs (arXiv 2210.09461).
* `similarity_sum`, `similarity_count`: sum, and columns above a threshold.

Inputs are fp32, fp16 or bf16; sums are fp32. None of them is differentiable: they rank tokens.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..dispatch import implementation, unseen


@torch.library.custom_op("vtc::similarity_sum", mutates_args=())
def _similarity_sum(
    x: Tensor,
    y: Tensor | None,
    kind: str,
    margin: float,
    alpha: float,
    normalize: bool,
    exclude_diag: bool,
    x_lengths: Tensor | None,
    y_lengths: Tensor | None,
) -> Tensor:
    return implementation("similarity_reduce", x).similarity_sum(
        x, y, kind, margin, alpha, normalize, exclude_diag, x_lengths, y_lengths
    )


@_similarity_sum.register_fake
def _(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[:2], dtype=torch.float32)


@torch.library.custom_op("vtc::best_match", mutates_args=())
def _best_match(
    a: Tensor,
    b: Tensor,
    normalize: bool,
    exclude_diag: bool,
    a_mask: Tensor | None,
    b_mask: Tensor | None,
    a_lengths: Tensor | None,
    b_lengths: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return implementation("similarity_reduce", a).best_match(
        a, b, normalize, exclude_diag, a_mask, b_mask, a_lengths, b_lengths
    )


@_best_match.register_fake
def _(a: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = a.shape[:2]
    return a.new_empty(shape, dtype=torch.float32), a.new_empty(shape, dtype=torch.int64)


def energy(
    x: Tensor,
    margin: float,
    alpha: float = 1.0,
    kind: Literal["elu", "paper"] = "elu",
    *,
    normalize: bool = True,
    exclude_diag: bool = False,
    lengths: Tensor | None = None,
) -> Tensor:
    """Energy of every token of x (B, N, C): E_i = mean_j f(cos(x_i, x_j) - margin), (B, N) fp32.

    Args:
        kind: "elu": f(s) = s if s > 0 else alpha (e^s - 1), the published code; "paper": Eq. 4,
            s + margin instead of s in the upper branch, which includes s = 0.
        normalize: False takes x as it is, already of unit length.
        exclude_diag: leave j = i out of the mean.
        lengths: (B,) int, tokens of each row; the rest is not read, its energy is 0.
    """
    if kind not in ("elu", "paper"):
        raise ValueError(f'kind is "elu" or "paper"; got {kind!r}')
    return _sum(x, None, kind, margin, alpha, normalize, exclude_diag, lengths, None)


def similarity_sum(
    x: Tensor,
    y: Tensor | None = None,
    *,
    normalize: bool = True,
    exclude_diag: bool = False,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Tensor:
    """Sum over columns j of cos(x_i, y_j): x (B, N, C), y (B, M, C) or x itself, (B, N) fp32."""
    return _sum(x, y, "sum", 0.0, 1.0, normalize, exclude_diag, x_lengths, y_lengths)


def similarity_count(
    x: Tensor,
    y: Tensor | None = None,
    *,
    threshold: float,
    normalize: bool = True,
    exclude_diag: bool = False,
    x_lengths: Tensor | None = None,
    y_lengths: Tensor | None = None,
) -> Tensor:
    """Columns j with cos(x_i, y_j) > threshold: x (B, N, C), y (B, M, C) or x, (B, N) int64."""
    count = _sum(x, y, "count", threshold, 1.0, normalize, exclude_diag, x_lengths, y_lengths)
    return count.long()


def _sum(x: Tensor, y: Tensor | None, *how: Any) -> Tensor:
    x, y = x.detach(), None if y is None else y.detach()
    if unseen(x, y):
        return implementation("similarity_reduce", x).similarity_sum(x, y, *how)
    return _similarity_sum(x, y, *how)


def best_match(
    a: Tensor,
    b: Tensor,
    *,
    normalize: bool = True,
    exclude_diag: bool = False,
    a_mask: Tensor | None = None,
    b_mask: Tensor | None = None,
    a_lengths: Tensor | None = None,
    b_lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The most similar row of b (B, M, C) for every row of a (B, N, C), ties to the lower index.

    Args:
        normalize: cosine similarity; False takes a b^T as it is.
        exclude_diag: row i must not match column i.
        a_mask, b_mask: (B, N), (B, M) bool, False on rows that must not match.
        a_lengths, b_lengths: (B,) int, valid rows of each; the rest is not read.

    Returns:
        edge (B, N) fp32, the similarity, and partner (B, N) int64, the row of b. Where nothing may
        match the edge is -inf and the partner 0, so that it can always be gathered.
    """
    a, b = a.detach(), b.detach()
    how = normalize, exclude_diag, a_mask, b_mask, a_lengths, b_lengths
    if unseen(a, b):
        return implementation("similarity_reduce", a).best_match(a, b, *how)
    return _best_match(a, b, *how)
