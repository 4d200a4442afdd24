# SPDX-License-Identifier: Apache-2.0
"""ToMe: bipartite soft matching between attention and MLP of every encoder block.

Bolya et al., Token Merging: Your ViT But Faster, ICLR 2023, arXiv 2210.09461.

    k     = mean over heads of the keys of this block, scaled to unit length
    A, B  = tokens at even and at odd places of the sequence, prefix tokens included
    edges = every a in A proposes argmax_b cos(k_a, k_b); the r best edges stay
    x_b   = (m_b x_b + sum m_a x_a) / (m_b + sum m_a),  m_b = m_b + sum m_a

The next block adds log m to the attention scores of its keys (proportional attention).

Departures: survivors keep raster order instead of [rest of A, B], which changes the split of the
next block; with a budget r is spread evenly over the blocks so that exactly the asked number of
patches remains, and late blocks hand part of their r to earlier ones where half of their tokens
would not suffice; the inflected schedules of the published code are not offered.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..hyperparameters import check_count, check_no_budget
from ..method import Method
from ..reduction import Reduction
from ..registry import register
from ..views.vision import VisionView
from ._matching import match_parity


def even_counts(n: int, k: int, steps: int) -> list[int]:
    """Token counts after each of ``steps`` blocks, from n to exactly k, no block folding over half.

    Raises:
        ValueError: k is out of reach, because each block at best halves its tokens.
    """
    if n > k << steps:
        raise ValueError(
            f"{n} -> {k} tokens is out of reach: each of the {steps} blocks can merge at most half "
            f"of its tokens; keep at least {-(-n >> steps)}"
        )
    counts, current = [], n
    for left in range(steps, 0, -1):
        target = min(current - round((current - k) / left), k << (left - 1))
        current = max(target, current - current // 2)
        counts.append(current)
    return counts


@register
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Merge the r most similar pairs of tokens in every encoder block.

    Args:
        r: tokens merged in each block, as published; instead of a budget. Never more than half.
        proportional_attention: add the log of the token sizes to the attention scores.
    """

    r: int | None = None
    proportional_attention: bool = True  # type: ignore[misc]

    name = "tome"
    summary = "Merges the most similar keys in every encoder block (ToMe, arXiv 2210.09461)"
    merges = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_no_budget(self, "r")
        check_count(self, "r", "a count of tokens to merge in each block", least=0, optional=True)

    @property
    def has_budget(self) -> bool:
        return self.r is None

    def schedule(self, n: int, depth: int, prefix: int = 0) -> list[int]:
        """Patch tokens left after each block, from n; prefix tokens make no difference."""
        if self.r is None:
            return even_counts(n, self.budget(n), depth)
        counts = []
        for _ in range(depth):
            n -= min(self.r, n // 2)
            counts.append(n)
        return counts

    def on_vision_layer(self, v: VisionView) -> Reduction | None:
        target = self.schedule(v.total, v.depth, v.prefix)[v.layer]
        r = min(v.count - target, v.count // 2)
        if r <= 0:
            return None
        into = match_parity(v.key_mean, r, v.prefix)
        return Reduction.from_merge(into, v.x.shape[1] - r)
