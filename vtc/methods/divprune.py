# SPDX-License-Identifier: Apache-2.0
"""DivPrune: the subset of visual tokens with the largest minimum distance.

Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models,
CVPR 2025, arXiv 2503.02175. With d_ij = 1 - cos(x_i, x_j) of the projected features:

    first = argmax_i min_{j != i} d_ij
    next  = argmax over the others of the distance to the nearest chosen token, until k are chosen

Departures: each image is a pool of its own, on models with crops each crop, which share the budget
in proportion to their patches without padding, and newline tokens are no part; the paper pools the
whole row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..kernels.similarity_reduce import best_match
from ..method import Method, register
from ..reduction import Reduction, gather_tokens
from ..views import FeaturesView
from ._common import unit


def greedy_order(
    x: Tensor, k: int, start: Tensor | None = None, valid: Tensor | None = None
) -> Tensor:
    """The k tokens of x (B, N, C) in the order they are chosen, (B, k) int64; ties to the first.

    Args:
        start: (B, N) bool, tokens that are chosen already, at least one in each row; they are not
            among the k, which keep away from them.
        valid: (B, N) bool, False on entries that are no tokens.
    """
    x = unit(x)
    nearest = torch.full_like(x[..., 0], torch.inf)
    if valid is not None:
        nearest = nearest.masked_fill(~valid, -torch.inf)
    others = valid if start is None else start
    most, _ = best_match(x, x, normalize=False, exclude_diag=True, b_mask=others)
    first = torch.minimum(1 - most, nearest)
    if start is not None:
        nearest = first = first.masked_fill(start, -torch.inf)
    chosen = [first.argmax(1, keepdim=True)]
    for _ in range(k - 1):  # one row of distances at a time: all of them would be N x N
        distance = 1 - (x @ gather_tokens(x, chosen[-1]).mT)[..., 0]
        nearest = torch.minimum(nearest, distance).scatter(1, chosen[-1], -torch.inf)
        chosen.append(nearest.argmax(1, keepdim=True))
    return torch.cat(chosen, 1)


@register
@dataclass(frozen=True, kw_only=True)
class DivPrune(Method):
    """Keep the visual tokens that are farthest from each other."""

    name = "divprune"
    summary = "Keeps the visual tokens farthest from each other (DivPrune, CVPR 2025)"
    default_ratio = 0.098
    presets: ClassVar[dict[tuple[str, int], dict[str, Any]]] = {
        ("llava-1.5", 56): {"keep_ratio": 0.098},
    }

    def on_features(self, v: FeaturesView) -> Reduction | None:
        k = v.budget(self)
        if k >= v.count:
            return None
        return Reduction.from_keep(greedy_order(v.projected, k).sort(1).values, v.count)
